"""From the user's model and optimizer to the :class:`ModelSpec` that every worker must agree on."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import nn

from downpour.update_rule import Rule, check_steps_here, rule_of
from downpour_common.dtypes import ITEMSIZE, TRAINABLE
from downpour_common.errors import ModelError
from downpour_common.layout import Kind, ModelSpec, TensorSpec
from downpour_common.optimizers import IMPLEMENTATION_OPTIONS, OUTER_RULE


@dataclass(frozen=True, slots=True)
class Described:
    """A model's specification and its tensors by the names in it."""

    spec: ModelSpec
    tensors: Mapping[str, torch.Tensor]
    device: torch.device


def describe(
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    buffers: str,
    meta: bool = False,
    own_rule: str = "",
    outer: Mapping[str, Any] | None = None,
) -> Described:
    """Describe what is to be trained. Raises :class:`ModelError` for what cannot be distributed, with the way out.

    Parameters in the optimizer that require gradients are trainable; all others are frozen: sent once, so that
    every worker has the same. Buffers that are not part of the state dict stay each worker's own. ``meta``: parameters
    may be on the meta device, and are going to be on the host. ``own_rule``: ``module:Class`` that the job brings.
    ``outer``: the optimizer steps in the worker, whatever it is, and the servers' rule is SGD with these options.
    """
    rule, groups = _rule(optimizer, own_rule, outer is not None)
    named = _named_tensors(model, groups)
    specs: list[TensorSpec] = []
    tensors: dict[str, torch.Tensor] = {}
    for names, tensor in named:
        group = groups.get(id(tensor), -1)
        trainable = group >= 0 and tensor.requires_grad
        kind: Kind = "trainable" if trainable else "frozen" if isinstance(tensor, nn.Parameter) else "buffer"
        dtype = str(tensor.dtype).removeprefix("torch.")
        _check_dtype(names[0], dtype, trainable)
        specs.append(
            TensorSpec(
                names[0],
                tuple(names[1:]),
                tuple(tensor.shape),
                dtype,
                kind,
                group if trainable else -1,
            )
        )
        tensors[names[0]] = tensor
    if optimizer is not None and not any(s.kind == "trainable" for s in specs):
        raise ModelError(
            "nothing to train: the optimizer holds no parameter that requires a gradient; "
            "check requires_grad and what was given to the optimizer"
        )
    in_force = [] if optimizer is None else optimizer.param_groups
    options = tuple(options_of(group) if outer is None else dict(outer) for group in in_force)
    device = _device([tensors[s.name] for s in specs if s.kind == "trainable"] or list(tensors.values()), meta)
    spec = ModelSpec(tuple(specs), rule.name, options, buffers, whole=rule.whole)
    return Described(spec, tensors, device)


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that the update rule needs: plain numbers, booleans, strings and lists.

    Raises :class:`ModelError` for an option that is none of these, because dropping it would change the training.
    """
    options: dict[str, Any] = {}
    for name, value in group.items():
        if name in IMPLEMENTATION_OPTIONS or name == "param_names":
            continue
        plain = _plain(value)
        if plain is None and value is not None:
            raise ModelError(f"the optimizer's option {name} is {value!r}, which is not a plain number or list of them")
        options[name] = plain
    return options


def _plain(value: Any) -> Any:
    """``value`` as JSON knows it, or None; scalars of torch, numpy and ``numbers`` become Python's."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if callable(getattr(value, "item", None)) and getattr(value, "shape", None) in ((), (1,)):
        return _plain(value.item())
    return float(value) if isinstance(value, (numbers.Real, Decimal)) else None


def _rule(optimizer: torch.optim.Optimizer | None, own_rule: str, local: bool) -> tuple[Rule, dict[int, int]]:
    """The update rule, and the parameter group of each parameter by id. ``local``: it steps in the worker."""
    if optimizer is None:
        return Rule("", False), {}
    groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    if local:
        check_steps_here(optimizer)
        return Rule(OUTER_RULE, False), groups
    rule = rule_of(optimizer, own_rule)
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ModelError("an optimizer with differentiable=True cannot be distributed: the update runs elsewhere")
    if any(float(state.get("step", 1)) > 0 for state in optimizer.state.values() if state):
        raise ModelError(
            "the optimizer has state already (steps taken, or load_state_dict), which the servers do not take over; "
            "give prepare a fresh optimizer, and go on from an earlier run with downpour run --resume DIR"
        )
    return rule, groups


def _named_tensors(model: nn.Module | None, groups: Mapping[int, int]) -> list[tuple[list[str], torch.Tensor]]:
    """Every distinct tensor of the state dict with all its names, in the state dict's order."""
    named: dict[int, tuple[list[str], torch.Tensor]] = {}
    if model is not None:
        own = {id(t) for t in [*model.parameters(), *model.buffers()]}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and id(tensor) in own:
                named.setdefault(id(tensor), ([], tensor))[0].append(name)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise ModelError(
                    f"parameter {name} has no shape yet (a lazy module); run one batch through the model before prepare"
                )
            named.setdefault(id(parameter), ([name], parameter))
    outside = [i for i in groups if i not in named]
    if outside:
        raise ModelError(
            f"the optimizer holds {len(outside)} parameter(s) that the model given to prepare does not have; "
            "register them in the model (nn.ParameterDict, nn.ModuleDict) and give prepare that model"
        )
    return list(named.values())


def _check_dtype(name: str, dtype: str, trainable: bool) -> None:
    if dtype not in ITEMSIZE:
        raise ModelError(f"{name} has dtype {dtype}, which Downpour does not carry")
    if trainable and dtype not in TRAINABLE:
        raise ModelError(
            f"parameter {name} has dtype {dtype}; trainable parameters may be {', '.join(sorted(TRAINABLE))}"
        )


def _device(tensors: list[torch.Tensor], meta: bool) -> torch.device:
    devices = {torch.device("cpu") if meta and t.is_meta else t.device for t in tensors}
    if any(device.type == "meta" for device in devices):
        raise ModelError(
            "parameters on the meta device have no weights: make the model without it, or have its layers made, "
            "fetched and dropped one at a time (downpour run --set fetch=layers)"
        )
    if len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise ModelError(f"the trainable parameters lie on several devices ({names}); a worker trains on one")
    device = devices.pop() if devices else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"parameters on {device} are not supported; move the model to the CPU or a CUDA device")
    return device
