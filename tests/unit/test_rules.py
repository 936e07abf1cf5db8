"""Every update rule against torch's own optimizer, whole and in chunks, and across a save and a load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from downpour_common.optimizers import OUTER_RULE, RULE_NAMES, WHOLE_RULES
from downpour_common.rules import optimizer_class
from downpour_server.rules import RULES, Rule

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "SGD nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD dampening maximize": ("SGD", {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.01}),
    "Adam amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
    "AdamW": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.2}),
    "RMSprop": ("RMSprop", {"lr": 0.01}),
    "RMSprop centered": ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "Adamax": ("Adamax", {"lr": 0.01, "weight_decay": 0.1}),
    "NAdam": ("NAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": ("RAdam", {"lr": 0.01, "weight_decay": 0.1}),
    "Adadelta": ("Adadelta", {"lr": 0.5, "weight_decay": 0.01}),
    "ASGD": ("ASGD", {"lr": 0.05, "t0": 5.0, "lambd": 0.01}),
    "Rprop": ("Rprop", {"lr": 0.01}),
    "Muon": ("Muon", {"lr": 0.02, "weight_decay": 0.1}),
    "LAMB": ("LAMB", {"lr": 0.02, "betas": (0.8, 0.99)}),
    "LARS": ("LARS", {"lr": 5.0, "trust": 0.01, "weight_decay": 0.01}),
    "FTRL": ("FTRL", {"lr": 0.3, "l1": 0.01, "l2": 0.1}),
    "Lion": ("Lion", {"lr": 0.01, "weight_decay": 0.1}),
    "MuonAdamW": ("MuonAdamW", {"lr": 0.02, "adamw_ratio": 1.0}),
}
CUT = [case for case, (name, _) in CASES.items() if name not in WHOLE_RULES]
"""Those that act on any slice of a tensor."""
STEPS, SIZE = 30, 37
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
CHANGES: dict[int, dict[str, Any]] = {10: {"lr": 0.003}, 20: {"lr": 0.03, "weight_decay": 0.02}}


def make(name: str, options: Mapping[str, Any], numel: int = SIZE) -> Rule:
    """A rule for a chunk; Muon's are matrices."""
    return RULES[name](travelled(options), (numel, 1) if name == "Muon" else None)


def travelled(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they come out of msgpack: tuples are lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """One gradient per step, of very different sizes."""
    generator = torch.Generator().manual_seed(4)
    scale = torch.logspace(-4, 2, SIZE, dtype=torch.float64)
    return [(torch.randn(SIZE, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(STEPS)]


def start(dtype: torch.dtype) -> torch.Tensor:
    """The first weights."""
    return torch.linspace(-2, 3, SIZE, dtype=torch.float64).to(dtype)


def torchs_own(name: str, options: Mapping[str, Any], dtype: torch.dtype, changes: bool = True) -> torch.Tensor:
    """What the script's own optimizer would make of it."""
    weights = torch.nn.Parameter(start(dtype).view((SIZE, 1) if name == "Muon" else (SIZE,)))
    optimizer: Any = optimizer_class(name)
    optimizer = optimizer([weights], **options)
    for step, gradient in enumerate(gradients(dtype)):
        if changes:
            optimizer.param_groups[0].update(CHANGES.get(step, {}))
        weights.grad = gradient.clone().view_as(weights)
        optimizer.step()
    return weights.detach().view(-1)


def by_rule(
    name: str, options: Mapping[str, Any], dtype: torch.dtype, cuts: tuple[int, ...] = (), changes: bool = True
) -> torch.Tensor:
    """What the servers make of it, in chunks cut at ``cuts``."""
    weights = start(dtype)
    parts = list(torch.tensor_split(weights, cuts))
    rules = [make(name, options) for _ in parts]
    for step, gradient in enumerate(gradients(dtype)):
        for rule, part, piece in zip(rules, parts, torch.tensor_split(gradient, cuts), strict=True):
            if changes and step in CHANGES:
                rule.set_options(CHANGES[step])
            rule.apply(part, piece.clone())
    return weights


def test_every_rule_that_workers_may_ask_for_is_there() -> None:
    assert tuple(RULES) == (*RULE_NAMES, OUTER_RULE)
    assert {name for name, _ in CASES.values()} == set(RULE_NAMES), "and each is tested here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_a_rule_does_what_torch_does(case: str, dtype: torch.dtype) -> None:
    name, options = CASES[case]
    expected = torchs_own(name, options, dtype)
    assert not torch.allclose(expected, start(dtype), rtol=1e-3), "something happened"
    torch.testing.assert_close(by_rule(name, options, dtype), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CUT)
def test_a_vector_in_chunks_becomes_what_it_becomes_whole(case: str, dtype: torch.dtype) -> None:
    name, options = CASES[case]
    whole = by_rule(name, options, dtype)
    for cuts in ((10, 11), (1, 36)):
        in_chunks = by_rule(name, options, dtype, cuts)
        torch.testing.assert_close(in_chunks, whole, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_half_precisions_are_trained_as_torch_trains_them(case: str, dtype: torch.dtype) -> None:
    """torch 2.12 and 2.13 skip most elements in the fused SGD of half precisions (pytorch issue 191763)."""
    name, options = CASES[case]
    expected = torchs_own(name, options, dtype, changes=False)
    found = by_rule(name, options, dtype, changes=False)
    sound = expected.isfinite()  # in float16 torch's plain Adam divides by an eps of 0; its fused one does not
    torch.testing.assert_close(found[sound].double(), expected[sound].double(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("case", CASES)
def test_changed_options_count_from_the_next_update_on(case: str) -> None:
    """Before the first update too, when the rule has no torch optimizer yet."""
    name, options = CASES[case]
    early, late = make(name, options), make(name, {**options, "lr": 0.007})
    early.set_options({"lr": 0.007})
    one, two = start(torch.float64), start(torch.float64)
    gradient = gradients(torch.float64)[0]
    early.apply(one, gradient.clone())
    late.apply(two, gradient.clone())
    assert torch.equal(one, two)
    if name in ("ASGD", "Rprop", "LARS"):  # whose next step has its size from before
        return
    early.set_options({"lr": 0.0, "weight_decay": 0.0})
    before = one.clone()
    early.apply(one, gradient.clone())
    assert torch.equal(one, before), "a learning rate of zero stops it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_a_rule_goes_on_from_its_saved_state_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    name, options = CASES[case]
    straight, all_gradients = make(name, options), gradients(dtype)
    weights = start(dtype)
    for gradient in all_gradients[:12]:
        straight.apply(weights, gradient.clone())
    saved = _copied(straight)
    assert all(v.shape == weights.shape for v in saved.values() if isinstance(v, torch.Tensor)), "one per weight"
    resumed, mine = make(name, options), weights.clone()
    resumed.load_state(mine, saved)
    for gradient in all_gradients[12:]:
        straight.apply(weights, gradient.clone())
        resumed.apply(mine, gradient.clone())
    assert torch.equal(mine, weights)
    ours, theirs = _copied(resumed), _copied(straight)
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, torch.as_tensor(theirs[key])), key
        else:
            assert value == theirs[key], key


def _copied(rule: Rule) -> dict[str, torch.Tensor | float]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in rule.state().items()}


@pytest.mark.parametrize("case", CASES)
def test_a_single_weight_keeps_its_state_apart_from_the_count_of_steps(case: str) -> None:
    """With one element, a state of one element per weight must not be taken for a scalar, nor the other way round."""
    name, options = CASES[case]
    straight, weights = make(name, options, 1), torch.ones(1)
    for _ in range(3):
        straight.apply(weights, torch.full((1,), 0.5))
    saved = _copied(straight)
    assert all(not isinstance(saved[key], torch.Tensor) for key in ("step", "mu_product") if key in saved)
    resumed, mine = make(name, options, 1), weights.clone()
    resumed.load_state(mine, saved)
    straight.apply(weights, torch.full((1,), 0.25))
    resumed.apply(mine, torch.full((1,), 0.25))
    assert torch.equal(mine, weights)


@pytest.mark.parametrize("case", CASES)
def test_a_rule_that_has_done_nothing_has_no_state(case: str) -> None:
    name, options = CASES[case]
    fresh, loaded = make(name, options), make(name, options)
    assert fresh.state() == {}
    one, two = start(torch.float32), start(torch.float32)
    loaded.load_state(two, {})
    for gradient in gradients(torch.float32)[:3]:
        fresh.apply(one, gradient.clone())
        loaded.apply(two, gradient.clone())
    assert torch.equal(one, two)


@pytest.mark.parametrize("case", CASES)
def test_a_rule_follows_weights_that_moved(case: str) -> None:
    """Copy on write gives the chunk other memory between two updates."""
    name, options = CASES[case]
    still, moved = make(name, options), make(name, options)
    one, two = start(torch.float64), start(torch.float64)
    for gradient in gradients(torch.float64)[:5]:
        still.apply(one, gradient.clone())
        before, two = two, two.clone()
        kept = before.clone()
        moved.apply(two, gradient.clone())
        assert torch.equal(before, kept), "the old memory stays as it is"
    assert torch.equal(one, two)


def test_options_that_only_choose_how_torch_computes_do_not_travel() -> None:
    weights = start(torch.float32)
    options = {"lr": 0.1, "fused": None, "foreach": True, "capturable": True, "differentiable": False}
    RULES["Adam"](options).apply(weights, gradients(torch.float32)[0])
    assert weights.isfinite().all()


def test_options_of_schedulers_are_carried_along() -> None:
    weights = start(torch.float32)
    rule = RULES["SGD"]({"lr": 0.1, "initial_lr": 0.1, "momentum": 0})
    rule.apply(weights, torch.ones(SIZE))
    torch.testing.assert_close(weights, start(torch.float32) - 0.1)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] in ("SGD", "Adam", "AdamW", "Adagrad")])
def test_calling_a_kernel_directly_gives_what_the_optimizers_step_gives_bit_for_bit(
    case: str, dtype: torch.dtype
) -> None:
    """With options that change on the way, also to such as need state that was not there before."""
    name, options = CASES[case]
    fused = not (name == "SGD" and dtype is torch.bfloat16)
    weights, mine = torch.nn.Parameter(start(dtype)), start(dtype)
    optimizer = getattr(torch.optim, name)([weights], **options, **({"fused": True} if fused else {}))
    rule = make(name, options)
    late: dict[int, dict[str, Any]] = {**CHANGES, 15: {"momentum": 0.8} if name == "SGD" else {"lr": 0.02}}
    for step, gradient in enumerate(gradients(dtype)):
        if step in late:
            optimizer.param_groups[0].update(late[step])
            rule.set_options(travelled(late[step]))
        weights.grad = gradient.clone()
        optimizer.step()
        rule.apply(mine, gradient)
        assert torch.equal(mine, weights.detach()), step
    assert torch.equal(gradient, gradients(dtype)[-1]), "gradients stay as they are"


def test_an_option_that_needs_more_state_is_refused_as_torch_refuses_it() -> None:
    rule, weights = RULES["Adam"]({"lr": 0.1}), start(torch.float32)
    for _ in range(2):
        rule.apply(weights, torch.ones(SIZE))
    rule.set_options({"amsgrad": True})
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        rule.apply(weights, torch.ones(SIZE))
