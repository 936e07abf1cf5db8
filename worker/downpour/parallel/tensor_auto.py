"""The automatic plan of tensor parallelism: what is understood is split, and everything else stays whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import FunctionType

from torch import nn

from downpour.parallel.branches import Branches
from downpour.parallel.plan import Plan
from downpour.parallel.styles import sizes
from downpour.parallel.styles_attention import splits_by_heads
from downpour.parallel.tensor_graph import Choice, elementwise, plain, regions

_WORTH = 64
"""A layer that belongs to no region is split if it holds at least one part in so many of the model's bytes: it costs a
gathering of its outputs in every step."""

_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_ALONE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def choose(module: nn.Module, width: int, plan: Plan, whole: Collection[str] = ()) -> list[Choice]:
    """How each module is split over ``width`` ranks, in the model's order; the same wherever the model is the same.

    ``whole``: names of modules that must not be split.
    """
    modules = dict(module.named_modules())
    untouched = set(whole)
    tied = _tied(modules)
    choices: dict[str, Choice] = {}
    for names in tied:
        choices |= _pair(modules, names, width, untouched)
        untouched |= names
    bound = set(untouched)
    for name, each in modules.items():
        if type(each) in _TRANSFORMERS:
            choices |= _feedforward(name, each, width, untouched)
    untouched |= choices.keys()
    _search(module, "", width, untouched, plan, choices)
    total = bytes_of(module)
    below: list[str] = []
    for name, each in modules.items():
        if any(name.startswith(prefix) for prefix in below):
            continue
        if isinstance(each, Branches) and len(each) > 1 and plain(each):
            ranks = (plan.branches or {}).get(name)
            if not any(other.startswith(f"{name}." if name else "") for other in bound):
                choices[name] = Choice(name, "branches", ranks=None if ranks is None else tuple(ranks))
                below.append(f"{name}." if name else "")
        elif type(each) is nn.MultiheadAttention and plain(each):
            below.append(f"{name}." if name else "")
            if splits_by_heads(each, width) and not {name, f"{name}.out_proj".lstrip(".")} & untouched:
                choices[name] = Choice(name, "heads")
        elif name not in choices and name not in untouched and bytes_of(each) * _WORTH >= total and _alone(each, width):
            choices[name] = Choice(name, "gather")
    inside = tuple(f"{name}." for name, choice in choices.items() if choice.how == "branches")
    return [choices[name] for name in modules if name in choices and not name.startswith(inside)]


def _tied(modules: Mapping[str, nn.Module]) -> list[set[str]]:
    """Sets of modules that have a parameter in common."""
    owners: dict[int, set[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    return [names for names in owners.values() if len(names) > 1]


def _pair(modules: Mapping[str, nn.Module], names: set[str], width: int, untouched: set[str]) -> dict[str, Choice]:
    """An embedding and the output layer that shares its weight: both by the vocabulary."""
    if len(names) != 2 or names & untouched:
        return {}
    first, second = sorted(names, key=lambda name: isinstance(modules[name], nn.Linear))
    embedding, head = modules[first], modules[second]
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or not _alone(embedding, 1):
        return {}
    if embedding.padding_idx is not None or embedding.num_embeddings % width or not plain(head):
        return {}
    return {first: Choice(first, "rows"), second: Choice(second, "gather")}


def _feedforward(name: str, layer: nn.Module, width: int, untouched: set[str]) -> dict[str, Choice]:
    """The two linear layers of a transformer layer of torch's."""
    first, second, dropout = (layer.get_submodule(part) for part in ("linear1", "linear2", "dropout"))
    paths = [f"{name}.{part}".lstrip(".") for part in ("linear1", "linear2", "dropout")]
    lines = type(first) is nn.Linear and type(second) is nn.Linear and type(dropout) is nn.Dropout
    if not lines or not elementwise(layer.activation) or untouched & set(paths) or not plain(layer):
        return {}
    if not all(plain(part) for part in (first, second, dropout)) or sizes(first)[1] < width:
        return {}
    size = sizes(first)[1]
    made = (Choice(paths[0], "columns"), Choice(paths[1], "rows"), Choice(paths[2], "channels", size))
    return {choice.name: choice for choice in made}


def _search(
    module: nn.Module, name: str, width: int, untouched: set[str], plan: Plan, choices: dict[str, Choice]
) -> None:
    """Add the regions of ``module`` to ``choices``, and to ``untouched`` what they or the forward take."""
    prefix = f"{name}." if name else ""
    if isinstance(module, Branches) or type(module) in _TRANSFORMERS or not list(module.children()):
        return
    own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    if not own and name not in plan.leaf:
        inner = {each.removeprefix(prefix) for each in untouched if each.startswith(prefix)}
        leaves = {each.removeprefix(prefix) for each in plan.leaf if each.startswith(prefix)}
        found = regions(module, width, inner, leaves)
        if found is not None:
            for choice in found[0]:
                path = prefix + choice.name
                choices[path] = Choice(path, choice.how, choice.size, choice.dim, choice.unit)
                untouched.add(path)
            untouched |= {prefix + each for each in found[1]}
            return
        if _reaches(module):
            untouched |= {prefix + each for each, _ in module.named_children()}
    for child_name, child in module.named_children():
        _search(child, prefix + child_name, width, untouched, plan, choices)


def _reaches(module: nn.Module) -> bool:
    """Whether a forward that cannot be traced may use weights of modules without calling these."""
    forward = type(module).forward
    names = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
    return bool({"weight", "bias", "parameters", "in_proj_weight"} & set(names))


def _alone(module: nn.Module, width: int) -> bool:
    """Whether a layer can be split by its outputs, which are then put together."""
    if not plain(module):
        return False
    if isinstance(module, nn.Embedding):
        usual = type(module) is nn.Embedding and module.max_norm is None and not module.sparse
        return usual and module.embedding_dim >= width
    return type(module) in _ALONE and getattr(module, "groups", 1) == 1 and sizes(module)[1] >= width
