"""Tensor parallelism: a model, or one stage of it, split over the ranks of a stage.

Every rank's forward takes whole inputs and gives whole outputs; in between, each rank computes with its own part of the
weights. ``torch.distributed.tensor.parallel`` does linear layers and embeddings, and our styles of the same form do the
rest (``styles``, ``styles_attention``, ``branches``).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from downpour.parallel.branches import Branches, Placed, balanced
from downpour.parallel.group import Group
from downpour.parallel.held import Held
from downpour.parallel.plan import Plan
from downpour.parallel.styles import Channels, Columns, Rows, kept, sizes
from downpour.parallel.styles_attention import Heads
from downpour.parallel.tensor_auto import bytes_of, choose
from downpour.parallel.tensor_graph import Choice
from downpour.space import local
from downpour_common.errors import ModelError
from downpour_common.layout import Part


def split_tensor(
    module: nn.Module, group: Group, plan: Plan | None, names: Mapping[int, str], whole: Collection[str] = ()
) -> list[Held]:
    """Split ``module`` in place over the ranks of this stage, and say what this rank holds of it.

    ``names``: of the unsplit model's tensors, by ``id``; all ranks have equal values at the call. ``whole``: names of
    tensors that must not be split, because other stages have them too. Gradients of what several ranks hold are equal
    on all of them, and gradients of parts are the parts of the unsplit model's.
    Raises :class:`ModelError` for a plan that does not fit the model.
    """
    plan = plan or Plan()
    slots = list(_slots(module))
    named = {id(tensor): names[id(tensor)] for _, _, tensor in slots if id(tensor) in names}
    if group.place.width > 1:
        firm = {name for name, each in module.named_modules() if _names_of(each, names) & set(whole)}
        styles = _styles(module, group, plan, firm)
        mesh = group.tensor_mesh()
        with warnings.catch_warnings():
            # torch says that it has no tracker of random states for meshes of CPUs; ours need none.
            warnings.filterwarnings("ignore", message="DTensor random operators")
            for name, style in styles.items():
                parallelize_module(module.get_submodule(name), mesh, style, src_data_rank=None)
        _tie(module, slots)
        _slim(module)
        _no_fast_path(module)
        _not_in_place(module)
    held = _held(module, slots, named)
    _free(module, slots, held)
    return held


def describe_plan(module: nn.Module, width: int, plan: Plan | None = None) -> list[str]:
    """Lines that say how ``module`` would be split over ``width`` ranks, and the bytes that the fullest rank holds.

    The bytes of modules that one of torch's styles splits are counted whole: the style says only when it is applied.
    """
    plan = plan or Plan()
    lines, split = [], 0
    total = bytes_of(module)
    seen: set[int] = set()  # a weight that two modules share counts once
    for name, how in _described(module, width, plan):
        each = module.get_submodule(name)
        whole = bytes_of(each)
        new = {id(p): p.numel() * p.element_size() for p in each.parameters() if id(p) not in seen}
        seen |= new.keys()
        part = sum(new.values())
        if isinstance(how, Choice) and whole:
            part = part * _bytes_kept(each, how, width) // whole
        split += part
        text = how.how if isinstance(how, Choice) else type(how).__name__
        of = f"{part:,} of {sum(new.values()):,} bytes a rank"
        lines.append(f"{name or 'model'}: {type(each).__name__} by {text}, {of}")
    left = sum(p.numel() * p.element_size() for p in module.parameters() if id(p) not in seen)
    lines.append(f"everything else: whole on every rank, {left:,} bytes")
    lines.append(f"together: {split + left:,} of {total:,} bytes a rank ({100 * (split + left) / max(total, 1):.0f} %)")
    return lines


def _described(module: nn.Module, width: int, plan: Plan) -> list[tuple[str, Choice | ParallelStyle]]:
    if plan.tensor is None or plan.tensor == "auto":
        return [(choice.name, choice) for choice in choose(module, width, plan)]
    return list(_given(module, plan, True).items())


def _bytes_kept(module: nn.Module, choice: Choice, width: int) -> int:
    """Bytes of parameters of the rank that holds most."""
    total = bytes_of(module)
    if isinstance(module, Branches) and choice.how == "branches":
        ranks = choice.ranks or balanced(module, width)
        return max(sum(bytes_of(b) for b, r in zip(module, ranks, strict=True) if r == rank) for rank in range(width))
    bias: Any = getattr(module.out_proj if isinstance(module, nn.MultiheadAttention) else module, "bias", None)
    fixed = bias.numel() * bias.element_size() if choice.how in ("rows", "heads") and bias is not None else 0
    if choice.how == "heads":
        units: int = module.num_heads  # type: ignore[assignment]
    elif choice.how == "channels":
        units = width
    else:
        # An embedding's rows are its vocabulary, a layer's rows are its inputs: both come first.
        units = sizes(module)[0] // choice.unit if choice.how == "rows" else sizes(module)[1]
    return fixed + (total - fixed) * -(-units // width) // units


def _styles(module: nn.Module, group: Group, plan: Plan, firm: set[str]) -> dict[str, ParallelStyle]:
    width = group.place.width
    _check_branches(module, plan, len(group.place.widths) == 1)
    if plan.tensor is None or plan.tensor == "auto":
        return {choice.name: _style(module, choice, width) for choice in choose(module, width, plan, firm)}
    styles: dict[str, ParallelStyle] = {}
    for name, given in _given(module, plan, len(group.place.widths) == 1).items():
        if name in firm:
            raise ModelError(f"Plan(tensor=...) splits {name}, whose weight is used in several stages: leave it out")
        styles[name] = _style(module, given, width) if isinstance(given, Choice) else given
    return styles


def _given(module: nn.Module, plan: Plan, all_here: bool) -> dict[str, Choice | ParallelStyle]:
    """The user's plan, by the names of the modules that are meant; ``all_here``: each entry must mean some."""
    assert isinstance(plan.tensor, Mapping)
    found: dict[str, Choice | ParallelStyle] = {}
    names = [name for name, _ in module.named_modules()]
    for pattern, style in plan.tensor.items():
        tokens = pattern.split(".")
        matching = [n for n in names if len(n.split(".")) == len(tokens) and all(map(fnmatch, n.split("."), tokens))]
        if not matching and all_here:
            raise ModelError(f"Plan(tensor=...) names {pattern!r}, but the model has no such module")
        for name in matching:
            found.pop(name, None)  # as in torch, what is said later counts
            if isinstance(style, ParallelStyle):
                found[name] = style
            elif style != "replicate":
                ranks = (plan.branches or {}).get(name)
                found[name] = Choice(name, style, ranks=None if ranks is None else tuple(ranks))
    return found


def _check_branches(module: nn.Module, plan: Plan, all_here: bool) -> None:
    modules = dict(module.named_modules())
    for name in plan.branches or {}:
        if name in modules and not isinstance(modules[name], Branches):
            raise ModelError(
                f"Plan(branches=...) names {name}, a {type(modules[name]).__name__}: "
                "put its parallel modules into downpour.Branches([...])"
            )
        if name not in modules and all_here:
            raise ModelError(f"Plan(branches=...) names {name!r}, but the model has no such module")


def _style(module: nn.Module, choice: Choice, width: int) -> ParallelStyle:
    """torch's style where it has one that fits, else ours."""
    each, how = module.get_submodule(choice.name), choice.how
    torchs = isinstance(each, (nn.Linear, nn.Embedding))
    if how == "heads":
        return Heads()
    if how == "branches":
        return Placed(choice.ranks)
    if how == "channels":
        if isinstance(each, _DropoutNd) and not choice.size:
            raise ModelError(f"{choice.name}: a dropout is split by the automatic plan only; leave it out of the plan")
        return Channels(size=choice.size, dim=choice.dim)
    if not isinstance(each, (nn.Linear, nn.Embedding, _ConvNd)):
        raise ModelError(f"{choice.name} is a {type(each).__name__}, which cannot be split by {how}")
    if how == "rows":
        units = sizes(each)[0] // choice.unit
        if isinstance(each, nn.Embedding):
            return RowwiseParallel(input_layouts=Replicate())
        return RowwiseParallel() if torchs and units % width == 0 else Rows(unit=choice.unit)
    if torchs and sizes(each)[1] % width == 0:
        return ColwiseParallel(output_layouts=Replicate()) if how == "gather" else ColwiseParallel()
    return Columns(whole=how == "gather")


def _slots(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Every place where a tensor of the model stands."""
    for _, each in module.named_modules():
        for own in (each._parameters, each._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    yield each, name, tensor


def _names_of(module: nn.Module, names: Mapping[int, str]) -> set[str]:
    own = (*module._parameters.values(), *module._buffers.values())
    return {names[id(tensor)] for tensor in own if tensor is not None and id(tensor) in names}


def _now(module: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _tie(module: nn.Module, slots: list[tuple[nn.Module, str, torch.Tensor]]) -> None:
    """What was one parameter in several modules is one again."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for each, name, tensor in slots:
        places.setdefault(id(tensor), []).append((each, name))
    paths = {id(each): path for path, each in module.named_modules()}
    for shared in places.values():
        here = [(each, name) for each, name in shared if id(each) in paths]
        if len({id(_now(each, name)) for each, name in here}) < 2:
            continue
        first = _now(*here[0])
        alike = {(_part_of(each, name), isinstance(_now(each, name), DTensor)) for each, name in here}
        if len(alike) > 1:
            places_of = " and ".join(f"{paths[id(each)]}.{name}" for each, name in here)
            raise ModelError(f"{places_of} are one parameter, which the plan splits in different ways; leave them out")
        for each, name in here[1:]:
            each.register_parameter(name, first)  # type: ignore[arg-type]


def _slim(module: nn.Module) -> None:
    """Give back the memory of other ranks' parts, and let gradients lie as their parameters do."""
    seen: set[int] = set()
    for _, _, tensor in _slots(module):
        if not isinstance(tensor, DTensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        mine = tensor._local_tensor
        if mine.untyped_storage().nbytes() > mine.numel() * mine.element_size():
            tensor._local_tensor = mine.detach().clone(memory_format=torch.contiguous_format)
        if tensor.requires_grad:
            tensor.register_hook(_as_its_parameter(tensor.placements))


def _as_its_parameter(placements: tuple[Any, ...]) -> Any:
    """Sequence parallel layers leave terms of a sum as gradients of what every rank holds."""

    def placed(gradient: Any) -> Any:
        if isinstance(gradient, DTensor) and gradient.placements != placements:
            return gradient.redistribute(placements=placements)
        return gradient

    return placed


def _not_in_place(module: nn.Module) -> None:
    """What comes out of a split layer is a view, which autograd does not let be overwritten."""
    for each in module.modules():
        if getattr(each, "inplace", False) is True:
            vars(each)["inplace"] = False


def _no_fast_path(module: nn.Module) -> None:
    """torch's transformers, when they evaluate, hand a layer's weights to one kernel, which knows of no parts."""
    for each in module.modules():
        if isinstance(each, nn.TransformerEncoderLayer):
            each.activation_relu_or_gelu = 0
        elif isinstance(each, nn.TransformerEncoder):
            each.use_nested_tensor = False


def _part_of(module: nn.Module, name: str) -> Part | None:
    """Which part of its tensor this rank has. Raises :class:`ModelError` for placements that are no slice."""
    tensor = _now(module, name)
    if not isinstance(tensor, DTensor):
        return kept(module, name)
    (placement,) = tensor.placements
    if placement.is_replicate():
        return None
    if type(placement) is not Shard:
        raise ModelError(f"{name} of {type(module).__name__} is laid out as {placement}; a slice or the whole is known")
    size, mesh = tensor.shape[placement.dim], tensor.device_mesh
    each = -(-size // mesh.size())
    start = min(mesh.get_local_rank() * each, size)
    stop = min(start + each, size)
    if start == stop:
        raise ModelError(
            f"{name} of {type(module).__name__} has {size} along dimension {placement.dim}, too few for each of "
            f"{mesh.size()} ranks: leave it out of Plan(tensor=...)"
        )
    return Part(tuple(tensor.shape), placement.dim % tensor.dim(), ((start, stop),))


def _held(module: nn.Module, slots: list[tuple[nn.Module, str, torch.Tensor]], named: Mapping[int, str]) -> list[Held]:
    here = {id(each) for each in module.modules()}
    held: list[Held] = []
    seen: set[int] = set()
    for each, name, before in slots:
        if id(each) in here and id(before) in named:
            tensor = _now(each, name)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                held.append(Held(named[id(before)], tensor, _part_of(each, name)))
    return held


def _free(module: nn.Module, slots: list[tuple[nn.Module, str, torch.Tensor]], held: list[Held]) -> None:
    """Give back the memory of what this rank does not hold, whoever else may still have the tensor."""
    here = {id(each) for each in module.modules()}
    stay = {id(h.tensor) for h in held} | {id(local(h.tensor)) for h in held}
    for each, name, before in slots:
        replaced = id(each) not in here or _now(each, name) is not before
        if replaced and id(before) not in stay:
            before.data = before.new_empty(0)
            before.grad = None
