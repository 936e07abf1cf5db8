"""How a model is split over the ranks of a replica, as the script says it; the launcher's flags say over how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from downpour_common.errors import ModelError

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

How = Literal["columns", "gather", "rows", "heads", "channels", "branches", "replicate"]
"""Our names for ways to split a module:

``columns``: a linear layer, convolution or embedding by its outputs, which stay split; ``gather``: the same, with the
outputs put together; ``rows``: by its inputs (an embedding: by its vocabulary), outputs added up; ``heads``:
``nn.MultiheadAttention`` by heads; ``channels``: batch norm, group norm, a grouped convolution or a dropout between
``columns`` and ``rows``; ``branches``: the children of a :class:`downpour.Branches`; ``replicate``: not at all.
"""

TensorPlan = Mapping[str, "ParallelStyle | How"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to split a model. Everything may be left out: then it is found automatically.

    ``tensor``: None or "auto", or for module names (``fnmatch`` patterns between the dots, as in
    ``torch.distributed.tensor.parallel.parallelize_module``) one of torch's parallel styles or one of :data:`How`;
    modules that are not named stay whole on every rank.
    ``branches``: for names of :class:`downpour.Branches` modules, the tensor rank of each of their branches; those not
    named are balanced by their parameters' bytes.
    ``split``: None or "auto", or the names of the modules before which a pipeline stage begins, in the forward's order.
    ``leaf``: names of modules that the search for stages and pairs of layers does not look into.

    Raises :class:`ModelError` for values that mean nothing.
    """

    tensor: Literal["auto"] | TensorPlan | None = None
    branches: Mapping[str, Sequence[int]] | None = None
    split: Literal["auto"] | Sequence[str] | None = None
    leaf: Sequence[str] = ()

    def __post_init__(self) -> None:
        problems = [*self._tensor_problems(), *self._branch_problems(), *self._name_problems()]
        if problems:
            raise ModelError("\n".join(problems))

    def _tensor_problems(self) -> list[str]:
        if self.tensor is None or self.tensor == "auto":
            return []
        if not isinstance(self.tensor, Mapping):
            return [f'Plan(tensor={self.tensor!r}): give None, "auto", or a dict of module names and styles']
        hows = get_args(How)
        return [
            f"Plan(tensor=...): {name!r} has {style!r}; give one of torch's parallel styles or of {', '.join(hows)}"
            for name, style in self.tensor.items()
            if not isinstance(name, str) or (style not in hows if isinstance(style, str) else not _is_style(style))
        ]

    def _branch_problems(self) -> list[str]:
        return [
            f"Plan(branches=...): {name!r} has {ranks!r}; give the tensor rank (0, 1, ...) of each branch, in order"
            for name, ranks in (self.branches or {}).items()
            if isinstance(ranks, str) or any(not isinstance(rank, int) or rank < 0 for rank in ranks)
        ]

    def _name_problems(self) -> list[str]:
        problems = []
        if self.split is not None and self.split != "auto":
            if isinstance(self.split, str) or not all(isinstance(name, str) and name for name in self.split):
                problems.append(f'Plan(split={self.split!r}): give None, "auto", or a list of module names')
            elif len(set(self.split)) < len(self.split):
                problems.append(f"Plan(split={list(self.split)!r}) names a module twice; a stage begins there once")
        if isinstance(self.leaf, str) or not all(isinstance(name, str) and name for name in self.leaf):
            problems.append(f"Plan(leaf={self.leaf!r}): give a list of module names")
        return problems


def _is_style(style: object) -> bool:
    from torch.distributed.tensor.parallel import ParallelStyle

    return isinstance(style, ParallelStyle)
