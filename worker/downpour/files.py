"""Writing a model's state dict as a file that torch and safetensors alone can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from downpour.staging import host_bytes
from downpour_common.tensorfile import TensorHead, write_tensors


def save_state_dict(
    model: nn.Module, path: str, read: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> None:
    """Write ``model.state_dict()`` as safetensors; tied weights once per name. Raises :class:`CheckpointError`.

    ``read`` gives the contents of one of its tensors when it is written.
    """
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, torch.Tensor)}
    heads = [TensorHead(k, str(v.dtype).removeprefix("torch."), tuple(v.shape)) for k, v in state.items()]

    def data() -> Iterator[memoryview]:
        for tensor in state.values():
            yield host_bytes(read(tensor).cpu().contiguous().reshape(-1))

    write_tensors(path, heads, data(), {"format": "pt"})
