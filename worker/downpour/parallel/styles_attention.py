"""``nn.MultiheadAttention`` split by heads: each rank has the projections of its heads, and a term of the output."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from downpour.parallel.styles import keep, turn
from downpour.parallel.tensor_comm import Peers, Span, add_up, enter, gather
from downpour_common.errors import ModelError


def splits_by_heads(module: nn.MultiheadAttention, width: int) -> bool:
    """Whether :class:`Heads` knows this attention: no extra keys, and at least a head for each rank."""
    return module.num_heads >= width and module.bias_k is None and not module.add_zero_attn


class Heads(ParallelStyle):
    """Whole inputs and outputs; the projections of q, k and v by rows, ``out_proj`` by columns.

    Attention dropout uses this rank's slice of the unsplit model's mask. Attention weights, if asked for, are those of
    all heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        peers = Peers(device_mesh)
        if not isinstance(module, nn.MultiheadAttention) or not splits_by_heads(module, peers.width):
            raise ModelError(
                f"{type(module).__name__} cannot be split by heads over {peers.width} ranks: that takes an "
                "nn.MultiheadAttention with as many heads, without add_bias_kv and add_zero_attn"
            )
        start, stop = (edge * module.head_dim for edge in peers.spans(module.num_heads)[peers.rank])
        packed = [(start + at, stop + at) for at in (0, module.embed_dim, 2 * module.embed_dim)]
        if module.in_proj_weight is not None:
            keep(module, "in_proj_weight", 0, *packed)
        else:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                keep(module, name, 0, (start, stop))
        keep(module, "in_proj_bias", 0, *packed)
        keep(module.out_proj, "weight", 1, (start, stop))
        module._split = (peers, peers.spans(module.num_heads))  # type: ignore[assignment]
        turn(module, _SplitHeads)
        return module


class _SplitHeads:
    _split: tuple[Peers, tuple[Span, ...]]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module, (peers, spans) = cast(nn.MultiheadAttention, self), self._split
        batched = query.dim() == 3
        q, k, v = _project(module, peers, query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not module.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        # (batch, heads, length, head_dim)
        q, k, v = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (q, k, v))
        if is_causal and attn_mask is None:
            raise ModelError("nn.MultiheadAttention with is_causal=True needs attn_mask as well")
        if is_causal and key_padding_mask is None and not need_weights:
            mask, hint = None, True
        else:
            mask, hint = _mask(attn_mask, key_padding_mask, q, module.num_heads, spans[peers.rank]), False
        dropout = module.dropout if module.training else 0.0
        weights = None
        if dropout > 0 or need_weights:
            weights = _weights(q, k, mask, hint)
            if dropout > 0:
                ones = weights.new_ones((q.shape[0], module.num_heads, *weights.shape[2:]))
                start, stop = spans[peers.rank]
                weights = weights * F.dropout(ones, dropout).narrow(1, start, stop - start)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=hint)
        # (length, batch, features) in memory, as torch has it: a dropout that follows draws its mask in that order.
        out = add_up(peers, F.linear(out.permute(2, 0, 1, 3).flatten(2), module.out_proj.weight))
        if module.out_proj.bias is not None:
            out = out + module.out_proj.bias.to(out.dtype)
        if not batched:
            out = out.squeeze(1)
        elif module.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        assert weights is not None
        shown = gather(peers, weights, 1, spans)
        shown = shown.mean(1) if average_attn_weights else shown
        return out, shown if batched else shown.squeeze(0)


def _project(
    module: nn.MultiheadAttention, peers: Peers, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[Any, Any, Any]:
    entered: dict[int, torch.Tensor] = {}
    for x in (query, key, value):
        if id(x) not in entered:
            entered[id(x)] = enter(peers, x)
    q, k, v = (entered[id(x)] for x in (query, key, value))
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif len(entered) == 1:
        return F.linear(q, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)  # type: ignore[return-value]
    else:
        weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))  # type: ignore[return-value]


def _mask(
    attention: torch.Tensor | None, padding: torch.Tensor | None, q: torch.Tensor, heads: int, mine: Span
) -> torch.Tensor | None:
    """Both masks as numbers to add, (batch or 1, this rank's heads or 1, target or 1, source)."""
    total = None
    if attention is not None:
        total = _numbers(attention, q.dtype)
        if total.dim() == 3:
            total = total.unflatten(0, (q.shape[0], heads)).narrow(1, mine[0], mine[1] - mine[0])
        else:
            total = total[None, None]
    if padding is not None:
        added = _numbers(padding, q.dtype)[:, None, None]
        total = added if total is None else total + added
    return total


def _numbers(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))


def _weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    scores = q * math.sqrt(1 / q.shape[-1]) @ k.transpose(-2, -1)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores if mask is None else scores + mask).softmax(-1)
