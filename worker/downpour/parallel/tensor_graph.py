"""Which layers of a model can stay split from one to the next: found in its graph, where it can be traced.

A *region* begins with layers split by ``columns``, goes through what treats every feature or channel by itself, and
ends with layers split by ``rows``: within it nothing is sent. Whatever is not known to be harmless ends the search, and
the layers are left to others.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from downpour.parallel.branches import Branches
from downpour.parallel.plan import How
from downpour.parallel.styles import feature_dim, sizes

_LINES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh),
    *(nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
    *(nn.LogSigmoid, nn.Threshold, nn.Identity),
)
_ELEMENTWISE_FUNCTIONS = {
    *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.hardtanh),
    *(F.hardsigmoid, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid, torch.relu, torch.sigmoid, torch.tanh),
    *(torch.square, torch.abs, torch.exp, torch.neg, operator.neg, torch.relu_),
}
_ELEMENTWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "square", "abs", "exp", "contiguous"}
_BINARY = {
    *(operator.add, operator.mul, operator.sub, operator.truediv, operator.iadd, operator.imul),
    *(torch.add, torch.mul, torch.sub, torch.div),
}
_BINARY_METHODS = {"add", "mul", "sub", "div", "add_", "mul_"}
_POOLS = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.Upsample),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.Upsample),
}
_POOL_FUNCTIONS = {
    1: {F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.interpolate},
    2: {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate},
    3: {F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.interpolate},
}
_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DROPOUTS = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}


@dataclass(frozen=True, slots=True)
class Choice:
    """How one module is split. ``size`` and ``dim``: see :class:`~downpour.parallel.styles.Channels`; ``unit``: see
    :class:`~downpour.parallel.styles.Rows`; ``ranks``: of the branches."""

    name: str
    how: How
    size: int = 0
    dim: int = -1
    unit: int = 1
    ranks: tuple[int, ...] | None = None


def plain(module: nn.Module) -> bool:
    """Whether a module runs nothing but its own forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__


def elementwise(activation: Any) -> bool:
    """Whether a module or function treats every element by itself, without parameters."""
    if isinstance(activation, nn.Module):
        return type(activation) in _ELEMENTWISE and plain(activation)
    return activation in _ELEMENTWISE_FUNCTIONS


def regions(
    module: nn.Module, width: int, untouched: Collection[str], leaves: Collection[str]
) -> tuple[list[Choice], set[str]] | None:
    """The choices of all regions of ``module`` over ``width`` ranks, or None if it cannot be traced.

    ``untouched``: modules that must stay whole; ``leaves``: modules not to be traced into. What holds only while
    training, or only else, is not taken. Also given: the modules whose tensors are used other than by calling them.
    """
    found, reached = [], set()
    for training in (True, False):
        graph = traced(module, training, leaves)
        if graph is None:
            return None
        search = _Search(module, graph, width, untouched)
        reached |= search.reached
        found.append(search.all())
    return [choice for region in found[0] if region in found[1] for choice in region], reached


def traced(module: nn.Module, training: bool, leaves: Collection[str]) -> fx.Graph | None:
    """The graph of calls, or None. Leaves no trace in the module or in torch's random state."""
    try:
        with _as_it_was(module, training), warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")
            return _Tracer(leaves).trace(module)
    except Exception:
        # A user's forward under proxies can raise anything; each of its parts is then looked at for itself.
        return None


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Collection[str]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = module_qualified_name in self._leaves or isinstance(m, Branches) or not plain(m)
        return named or super().is_leaf_module(m, module_qualified_name)


@contextmanager
def _as_it_was(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        for m, _ in before:
            m.training = training
        yield
    finally:
        for m, attributes in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)


Value = tuple[int, int, bool]
"""A split value: how many features or channels it has in all, the dimension they lie in, and whether more was flattened
into that dimension after them."""


class _Search:
    """The regions of one graph, in the order of its calls: a layer belongs to the first that takes it."""

    def __init__(self, root: nn.Module, graph: fx.Graph, width: int, untouched: Collection[str]) -> None:
        self._modules: dict[str, nn.Module] = dict(root.named_modules())
        self._graph = graph
        self.width = width
        self._calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.reached = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        self._taken = {*untouched, *self.reached}

    def all(self) -> list[tuple[Choice, ...]]:
        found = []
        for node in self._graph.nodes:
            if self._line(node) is not None:
                region = _Region(self, node).choices()
                if region is not None:
                    self._taken |= {choice.name for choice in region}
                    found.append(region)
        return found

    def free(self, node: fx.Node) -> nn.Module | None:
        """The module that ``node`` calls, if it is called once, with one value, and is nobody's yet."""
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if module is None or self._calls[node.target] > 1 or str(node.target) in self._taken or not plain(module):
            return None
        return module if len(node.args) == 1 and not node.kwargs else None

    def _line(self, node: fx.Node) -> nn.Module | None:
        """The layer that ``node`` calls, if its outputs can be split."""
        module = self.free(node)
        fits = type(module) in _LINES and getattr(module, "groups", 1) == 1
        return module if module is not None and fits and sizes(module)[1] >= self.width else None

    def value_of(self, node: fx.Node) -> Value | None:
        """What a layer gives when split by columns."""
        module = self._line(node)
        return None if module is None else (sizes(module)[1], feature_dim(module), False)

    def module(self, node: fx.Node) -> nn.Module:
        """What ``node`` calls."""
        return self._modules[str(node.target)]


class _Region:
    """What must be split together with one layer."""

    def __init__(self, search: _Search, start: fx.Node) -> None:
        self._search = search
        self._values: dict[fx.Node, Value] = {}
        self._choices: dict[str, Choice] = {}
        self._binary: list[fx.Node] = []
        self._queue: list[fx.Node] = []
        self._closed = False
        self._begin(start)

    def _begin(self, node: fx.Node) -> bool:
        value = self._search.value_of(node)
        if value is None or str(node.target) in self._choices:
            return False
        self._choices[str(node.target)] = Choice(str(node.target), "columns")
        self._add(node, value)
        return True

    def _add(self, node: fx.Node, value: Value) -> bool:
        if node not in self._values:
            self._values[node] = value
            self._queue.append(node)
        return self._values[node] == value

    def choices(self) -> tuple[Choice, ...] | None:
        while self._queue:
            node = self._queue.pop(0)
            if not all(self._follow(user, self._values[node]) for user in node.users):
                return None
        whole = all(self._values.get(x) == self._values[node] for node in self._binary for x in node.all_input_nodes)
        return tuple(self._choices.values()) if whole and self._closed else None

    def _follow(self, user: fx.Node, value: Value) -> bool:
        """Take ``user`` of a split value into the region; False if that cannot be."""
        dims = -1 - value[1]
        alone = len(user.all_input_nodes) == 1
        if user.op == "call_module":
            module = self._search.module(user)
            if type(module) in _ELEMENTWISE and plain(module):
                return self._add(user, value)
            free = self._search.free(user)
            if free is None or str(user.target) in self._choices:
                return False  # as well as one that has been split by columns, to be an operand of something else
            return self._into(str(user.target), free, value) or self._through(user, free, value)
        if user.target in _BINARY or (user.op == "call_method" and user.target in _BINARY_METHODS):
            self._binary.append(user)
            if user.kwargs or not all(self._reach(x, value) for x in user.all_input_nodes):
                return False
            return self._add(user, value)
        if user.op == "call_function":
            known = user.target in _ELEMENTWISE_FUNCTIONS
            pools = user.target in _POOL_FUNCTIONS.get(dims, ()) and not user.kwargs.get("return_indices")
            if alone and (known or pools):
                return self._add(user, value)
            flat = alone and user.target is torch.flatten and user.args[1:] == (1,) and not user.kwargs
            return flat and dims > 0 and self._add(user, (value[0], -1, True))
        if user.op == "call_method":
            if user.target == "size":
                return user.args[1:] == (0,)
            if alone and user.target in _ELEMENTWISE_METHODS and len(user.args) == 1:
                return self._add(user, value)
            flat = user.target == "flatten" and user.args[1:] == (1,) and not user.kwargs
            flat |= user.target in ("view", "reshape") and _by_sample(user)
            return flat and dims > 0 and self._add(user, (value[0], -1, True))
        return False

    def _reach(self, node: fx.Node, value: Value) -> bool:
        """The other operand: split already, or made so by splitting the layer that it comes from."""
        while node not in self._values:
            if self._begin(node):
                break
            unary = len(node.all_input_nodes) == 1 and (
                (node.op == "call_module" and elementwise(self._search.module(node)))
                or (node.op == "call_function" and node.target in _ELEMENTWISE_FUNCTIONS)
            )
            if not unary:
                return False
            node = node.all_input_nodes[0]
        return self._values[node] == value

    def _into(self, name: str, module: nn.Module, value: Value) -> bool:
        """A layer that the region ends with."""
        size, dim, flattened = value
        if type(module) not in _LINES or feature_dim(module) != dim or getattr(module, "groups", 1) != 1:
            return False
        inputs = sizes(module)[0]
        if inputs != size and (not flattened or inputs % size):
            return False
        self._choices[name] = Choice(name, "rows", unit=inputs // size)
        self._closed = True
        return True

    def _through(self, user: fx.Node, module: nn.Module, value: Value) -> bool:
        """A module with something of its own for each channel, or that works on each channel's pixels."""
        (size, dim, flattened), width, name = value, self._search.width, str(user.target)
        dims = -1 - dim
        kind = type(module)
        if flattened:
            return False
        if isinstance(module, nn.Flatten) and dims > 0 and module.start_dim == 1 and module.end_dim == -1:
            return self._add(user, (size, -1, True))
        if kind in _POOLS.get(dims, ()):
            return not getattr(module, "return_indices", False) and self._add(user, value)
        if kind is nn.Dropout or kind is _DROPOUTS.get(dims):
            self._choices[name] = Choice(name, "channels", size, dim)
            return self._add(user, value)
        if kind is _NORMS[dims] and module.num_features == size:
            self._choices[name] = Choice(name, "channels")
            return self._add(user, value)
        if isinstance(module, nn.GroupNorm) and module.num_channels == size and module.num_groups % width == 0:
            self._choices[name] = Choice(name, "channels")
            return self._add(user, value)
        if kind in _LINES and isinstance(module, _ConvNd) and feature_dim(module) == dim:
            if module.in_channels != size or module.groups % width:
                return False
            self._choices[name] = Choice(name, "channels")
            return self._add(user, (module.out_channels, dim, False))
        return False


def _by_sample(node: fx.Node) -> bool:
    """Whether a ``view`` makes one row of each sample."""
    shape = node.args[1:]
    if len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], fx.Node):
        return False
    return shape[0].op == "call_method" and shape[0].target == "size" and shape[0].args[1:] == (0,)
