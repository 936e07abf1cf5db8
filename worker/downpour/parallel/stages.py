"""The graph of a model's calls, from which pipeline stages are cut.

Traced with ``torch.fx`` at the level of modules: those of torch stay whole, and so do blocks that cannot be traced,
blocks that do something else while training, and blocks that a model repeats often enough. The model stays as it is.
"""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from downpour.activations import repeated_blocks
from downpour.parallel.branches import Branches
from downpour.parallel.plan import Plan
from downpour.parallel.tensor_graph import plain
from downpour_common.errors import ModelError

_ADVICE = (
    'Name the modules that it must not look into, Plan(leaf=["blocks", ...]), or write the model as an nn.Sequential '
    "of blocks, or let its forward only call modules and functions of tensors"
)


@dataclass(frozen=True, slots=True)
class Traced:
    """``inputs``: the names of the arguments; ``work``: what is computed, in order; ``result``: the output's node."""

    inputs: tuple[fx.Node, ...]
    work: tuple[fx.Node, ...]
    result: fx.Node
    leaves: tuple[str, ...]
    """the modules that had to be left whole, besides torch's"""

    @property
    def fingerprint(self) -> str:
        """Equal for equal graphs, on all ranks."""
        text = "\n".join(_line(node) for node in (*self.inputs, *self.work, self.result))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def whole(model: nn.Module, plan: Plan | None, count: int) -> set[str]:
    """The modules that tracing does not look into: those the plan names, and blocks repeated ``count`` times."""
    plan = plan or Plan()
    named = {*plan.leaf, *(plan.branches or {})}
    patterns = [] if plan.tensor is None or plan.tensor == "auto" else list(plan.tensor)
    found = {
        name
        for name, _ in model.named_modules()
        if name and (name in named or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    }
    unknown = [name for name in plan.leaf if name not in dict(model.named_modules())]
    if unknown:
        raise ModelError(f"Plan(leaf=...): the model has no module {', '.join(unknown)}")
    repeated = set(repeated_blocks(model))
    starts = () if plan.split is None or plan.split == "auto" else plan.split
    looked_into = {block for block in repeated if any(start.startswith(f"{block}.") for start in starts)}
    return found | (repeated - looked_into if len(repeated) >= count else set())


def trace(model: nn.Module, given: int, leaves: Collection[str]) -> Traced:
    """The calls that ``model`` makes when it is called with ``given`` arguments.

    Raises :class:`ModelError`, which says what to do, if that cannot be found out.
    """
    left = set(leaves)
    while True:
        attempts: list[fx.Graph] = []
        for training in (True, False):
            tracer = _Tracer(left)
            try:
                attempts.append(_graph(tracer, model, training, given))
            except ModelError:
                raise
            except Exception as error:
                # A user's forward under proxies can raise anything. The innermost block that did stays whole.
                if tracer.failed is None:
                    raise ModelError(
                        f"the calls of {type(model).__name__}.forward cannot be followed, so the model cannot be cut "
                        f"into pipeline stages ({type(error).__name__}: {str(error).strip().splitlines()[0]}). "
                        f"{_ADVICE}"
                    ) from error
                left.add(tracer.failed)
                break
        if len(attempts) < 2:
            continue
        different = _difference(*attempts)
        if different is None:
            return _ordered(attempts[0], left - set(leaves))
        if not different:
            raise ModelError(
                f"{type(model).__name__}.forward itself does something else while training than in evaluation: use a "
                "module for it, such as nn.Dropout in place of F.dropout"
            )
        left.add(different)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[str]) -> None:
        super().__init__()
        self._leaves = leaves
        self.failed: str | None = None
        """the innermost module whose forward raised"""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = module_qualified_name in self._leaves or isinstance(m, Branches) or not plain(m)
        if isinstance(m, nn.TransformerEncoder):
            return named
        return named or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if isinstance(m, nn.TransformerEncoder) and not self.is_leaf_module(m, name):
            return super().call_module(m, lambda *a, **k: _encode(m, *a, **k), args, kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = name
            raise


def _encode(
    encoder: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
) -> Any:
    """The forward of ``nn.TransformerEncoder`` without its shortcuts for nested tensors, which look at values."""
    for layer in encoder.layers:
        hint = bool(is_causal) and mask is not None
        src = layer(src, src_mask=mask, is_causal=hint, src_key_padding_mask=src_key_padding_mask)
    return src if encoder.norm is None else encoder.norm(src)


def _graph(tracer: _Tracer, model: nn.Module, training: bool, given: int) -> fx.Graph:
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    kinds = {p.kind for p in parameters[:given]}
    if given > len(parameters) or kinds - {inspect.Parameter.POSITIONAL_OR_KEYWORD}:
        raise ModelError(
            f"{type(model).__name__}.forward is called with {given} argument{'' if given == 1 else 's'}, and is to be "
            f"cut into pipeline stages: let it name each of them, in place of {inspect.signature(model.forward)}"
        )
    defaults = {p.name: p.default for p in parameters[given:] if p.default is not inspect.Parameter.empty}
    with _mode(model, training), warnings.catch_warnings(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        graph = tracer.trace(model, concrete_args=defaults or None)
    # Arguments that are not given are constants; what fx adds to check them goes, with what nobody uses.
    names = {p.name for p in parameters[:given]}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.target not in names:
            _erase(graph, node)
    return graph


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in before:
            m.training = training
        yield
    finally:
        for m, was in before:
            m.training = was


def _difference(first: fx.Graph, second: fx.Graph) -> str | None:
    """The innermost module that calls something else, "" if it is the model itself; None if the graphs are equal."""
    one, other = list(first.nodes), list(second.nodes)
    for a, b in zip(one, other, strict=False):
        if _line(a) != _line(b):
            return module_of(a)
    return None if len(one) == len(other) else module_of((one if len(one) > len(other) else other)[-1])


def module_of(node: fx.Node) -> str:
    """The module within whose forward ``node`` is called, by name; "" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    names = [str(name) for name, _ in stack]
    if node.op == "call_module" and names and names[-1] == node.target:
        names.pop()
    return names[-1] if names else ""


def modules_of(node: fx.Node) -> list[str]:
    """All modules within whose forwards ``node`` is called, its own included if it calls one."""
    names = [str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return [*names, str(node.target)] if node.op == "call_module" else names


def _line(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else torch.typename(node.target)
    return f"{node.name} {node.op} {target} {node.args} {node.kwargs}"


def _ordered(graph: fx.Graph, left: Collection[str]) -> Traced:
    """The calls in order, with what only takes something out of a value right behind that value, so that it is this
    that goes to other stages."""
    takers: dict[fx.Node, list[fx.Node]] = {}
    nodes = list(graph.nodes)
    for node in nodes:
        if _takes(node):
            takers.setdefault(node.all_input_nodes[0], []).append(node)
    work: list[fx.Node] = []

    def add(node: fx.Node) -> None:
        work.append(node)
        for taker in takers.get(node, ()):
            add(taker)

    for node in nodes:
        if node.op == "placeholder":
            for taker in takers.get(node, ()):
                add(taker)
        elif node.op.startswith("call_") and not (_takes(node) and node.all_input_nodes[0].op != "get_attr"):
            add(node)
    inputs = tuple(node for node in nodes if node.op == "placeholder")
    return Traced(inputs, tuple(work), nodes[-1], tuple(sorted(left)))


def _takes(node: fx.Node) -> bool:
    if len(node.all_input_nodes) != 1 or node.args[:1] != (node.all_input_nodes[0],):
        return False
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op != "call_function" or node.target not in (operator.getitem, getattr):
        return False
    # What lists and masks index is a copy, whose content depends on when it is made.
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(i is None or i is Ellipsis or isinstance(i, int | str | slice) for i in index)


def bound(model: nn.Module, work: Sequence[fx.Node]) -> list[bool]:
    """For each call, whether a stage must not begin with it: what is changed in place stays with what made it."""
    at = {node: index for index, node in enumerate(work)}
    found = [False] * len(work)
    for index, node in enumerate(work):
        source = at.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if source is not None and _in_place(model, node):
            found[source + 1 : index + 1] = [True] * (index - source)
    return found


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    ends = name.endswith("_") and not name.endswith("__")
    return ends or bool(node.kwargs.get("inplace")) or name in ("setitem", "iadd", "isub", "imul", "itruediv")
