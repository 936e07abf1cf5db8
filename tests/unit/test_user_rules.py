"""Update rules of a job's own: found beside the script, run per chunk, their state kept, their errors named."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import held, part, save, train, values
from unit_kit import ShardDriver, model, tensor

from downpour.update_rule import rule_of
from downpour_common.config import job_spec
from downpour_common.errors import ConfigError, ModelError, RuleError
from downpour_common.optimizers import missing_rule, parse_user_rule
from downpour_coordinator.processes import Process, explain
from downpour_deploy.agent import spawn
from downpour_deploy.agent.effects import Numbers, ProcessId
from downpour_deploy.agent.fetcher import Fetcher
from downpour_server.config import ShardConfig
from downpour_server.restore import restore
from downpour_server.rules import check_rule, make_rule, user_rules

MODULE = '''
import torch
from own_rules_helper import HALF

class Heavy(torch.optim.Optimizer):
    """SGD with momentum that counts, spoils its gradient and puts new memory into its parameter."""
    def __init__(self, params, lr, momentum=HALF):
        super().__init__(params, {"lr": lr, "momentum": momentum})
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                assert type(state["steps"]) is int
                state.setdefault("seen", torch.zeros((), dtype=torch.int64))
                state["seen"] += 1
                state["velocity"] = state.get("velocity", torch.zeros_like(p)) * group["momentum"] + p.grad
                p.grad.mul_(0)
                p.data = p.data - group["lr"] * state["velocity"] / (1 + state["steps"])

class Scaled(torch.optim.Optimizer):
    """Needs to see all of a tensor."""
    whole_tensors = True
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad / p.grad.norm(dim=0))

class Breaks(Heavy):
    def step(self, closure=None):
        raise ZeroDivisionError("no such luck")

class Rows(Heavy):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["rows"] = torch.zeros(2, 2)

class Needy(Heavy):
    def __init__(self, params, lr, total):
        super().__init__(params, lr)

thing = 3
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "own_rules.py").write_text(MODULE)
    (tmp_path / "own_rules_helper.py").write_text("HALF = 0.5\n")
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    user_rules._loaded.clear()
    for name in ("own_rules", "own_rules_helper", "broken_rules"):
        sys.modules.pop(name, None)


def checked(name: str, folder: Path) -> str:
    rule = f"own_rules:{name}"
    check_rule(rule, rule, str(folder))
    return rule


def test_it_is_imported_from_the_scripts_folder_which_comes_last_afterwards(folder: Path) -> None:
    rule = checked("Heavy", folder)
    assert sys.path[-1] == str(folder)
    weights, gradient = torch.ones(4), torch.full((4,), 2.0)
    made = make_rule(rule, {"lr": 0.1, "momentum": 0.5})
    address = weights.data_ptr()
    made.apply(weights, gradient)
    assert torch.equal(gradient, torch.full((4,), 2.0)), "its gradient is a copy"
    torch.testing.assert_close(weights, torch.full((4,), 0.9))
    assert weights.data_ptr() == address
    made.apply(weights, gradient)
    torch.testing.assert_close(weights, torch.full((4,), 0.9 - 0.1 * 3 / 3))
    made.set_options({"lr": 0.0})
    made.apply(weights, gradient)
    torch.testing.assert_close(weights, torch.full((4,), 0.8))


def test_its_state_is_in_checkpoints_each_number_as_what_it_was(folder: Path, tmp_path: Path) -> None:
    spec = model(
        tensor("w", 50, dtype="float64"), rule=checked("Heavy", folder), options=({"lr": 0.1, "momentum": 0.9},)
    )
    drivers = train(spec, 2, 64)
    saved = save(tmp_path / "run", drivers)
    resumed = [ShardDriver(spec, "sync", 1, 3, 100, shard) for shard in range(3)]
    for d in resumed:
        restore(saved, d.layout, d.shard.chunks)
        d.shard.start_from(3)
        for stored in d.shard.chunks.values():
            assert stored._rule is not None
            assert {"own.steps|int": 3.0, "own.seen|int64": 3.0}.items() <= stored._rule.state().items()
            d.push(stored.chunk.index, 0, 3, part(d.layout, stored, values(spec, 4)))
    straight = held(train(spec, 2, 64, steps=4))
    for what, flat in held(resumed)["w"].items():
        torch.testing.assert_close(flat, straight["w"][what], rtol=1e-12, atol=0)


def test_whole_tensors_come_in_their_shape(folder: Path) -> None:
    rule = checked("Scaled", folder)
    weights, gradient = torch.zeros(6), torch.tensor([3.0, 0.0, 4.0, 2.0, 0.0, 0.0])
    make_rule(rule, {"lr": 0.1}, (3, 2)).apply(weights, gradient)
    expected = -gradient.view(3, 2) / gradient.view(3, 2).norm(dim=0)
    torch.testing.assert_close(weights.view(3, 2)[:, 0], expected[:, 0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Nothing", r"own_rules\.py has no Nothing"),
        ("thing", r"thing is no torch\.optim\.Optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused(folder: Path, name: str, words: str) -> None:
    with pytest.raises(RuleError, match=f"update rule own_rules:{name}: .*{words}"):
        checked(name, folder)


@pytest.mark.parametrize("text", ["import not_there", "raise SystemExit(3)", "1 +"])
def test_a_module_that_cannot_be_imported_is_refused_with_the_cause(folder: Path, text: str) -> None:
    (folder / "broken_rules.py").write_text(text)
    with pytest.raises(RuleError, match="update rule broken_rules:X: importing broken_rules from") as caught:
        check_rule("broken_rules:X", "broken_rules:X", str(folder))
    assert caught.value.__cause__ is not None
    assert str(folder) not in sys.path[:-1]


def test_a_module_from_elsewhere_is_refused(folder: Path) -> None:
    with pytest.raises(RuleError, match="json is another module here"):
        check_rule("json:JSONDecoder", "json:JSONDecoder", str(folder))


def test_a_rule_that_the_job_does_not_bring_is_unknown(folder: Path) -> None:
    for own in ("", "own_rules:Other"):
        with pytest.raises(ConfigError, match="no update rule is called 'own_rules:Heavy'"):
            check_rule("own_rules:Heavy", own, str(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Breaks", "its step failed: ZeroDivisionError: no such luck"),
        ("Rows", r"its state 'rows' is a tensor of float32 of shape \[2, 2\]"),
        ("Needy", "missing 1 required positional argument: 'total'"),
    ],
)
def test_what_goes_wrong_in_it_names_it(folder: Path, name: str, words: str) -> None:
    spec = model(tensor("w", 3), rule=checked(name, folder), options=({"lr": 0.1, "momentum": 0.5},))
    d = ShardDriver(spec, "async", 1)
    d.init_all()
    with pytest.raises(RuleError, match=f"update rule own_rules:{name}: .*{words}"):
        d.push(0, 0, 0, torch.ones(3))


# ---------------------------------------------------------------- the worker's side


def optimizer_of(cls: Any) -> Any:
    return cls([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def test_the_script_makes_an_instance_of_the_rules_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    import own_rules  # type: ignore[import-not-found]

    assert rule_of(optimizer_of(own_rules.Heavy), "own_rules:Heavy") == ("own_rules:Heavy", False)
    assert rule_of(optimizer_of(own_rules.Scaled), "own_rules:Scaled") == ("own_rules:Scaled", True)
    with pytest.raises(ModelError, match=r"make it one of own_rules\.Heavy, or leave --rule out .* run SGD"):
        rule_of(optimizer_of(torch.optim.SGD), "own_rules:Heavy")
    with pytest.raises(ModelError, match=r"has no Nothing"):
        rule_of(optimizer_of(own_rules.Heavy), "own_rules:Nothing")
    with pytest.raises(ModelError, match="cannot be imported beside the script"):
        rule_of(optimizer_of(own_rules.Heavy), "not_there:Heavy")
    inside = type("Inside", (torch.optim.SGD,), {"__module__": "__main__"})
    with pytest.raises(ModelError, match="Inside is defined in the script"):
        rule_of(optimizer_of(inside), "t:Inside")
    with pytest.raises(ModelError, match="--rule MODULE:Heavy"):
        rule_of(optimizer_of(own_rules.Heavy))


# ---------------------------------------------------------------- the job's description


@pytest.mark.parametrize("text", ["x", "x:", ":X", "../x:Y", "a/b:C", "a..b:C", "x.py:Y:Z", "x:Y.Z", "x: Y", "é:Y"])
def test_names_are_names(text: str) -> None:
    with pytest.raises(ConfigError, match="rule: expected module:Class"):
        job_spec(name="j", script="t.py", workers=1, shards=1, rule=text)


def test_a_module_may_be_in_a_package() -> None:
    assert parse_user_rule("a.b_2:C") == ("a.b_2", "C")


def test_a_module_that_is_not_beside_the_script_is_missed_before_anything_starts(folder: Path) -> None:
    script = str(folder / "train.py")
    assert missing_rule("own_rules:X", script) == missing_rule("", script) == []
    (problem,) = missing_rule("lib.own_rules:X", script)
    assert problem.startswith("rule: there is no lib/own_rules.py beside")
    (problem,) = missing_rule("train:X", script)
    assert problem.startswith("rule: train is the script itself")


@pytest.mark.parametrize("mode", ["average:5", "diloco:5", "easgd:5", "lbfgs"])
def test_modes_with_an_outer_rule_of_their_own_take_none(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"rule: in mode .* the servers run the mode's own"):
        job_spec(name="j", script="t.py", workers=1, shards=1, mode=mode, rule="x:Y")


def test_the_last_word_of_a_shard_is_why_the_job_failed() -> None:
    tail = ("Traceback", "server/0: update rule a:B: its step failed: KeyError: 1")
    shard = Process("server", 0)
    shard.code, shard.tail = 1, tail
    assert explain(shard, False, None, "t.py").message == "update rule a:B: its step failed: KeyError: 1"
    shard.tail = ("Segmentation", "fault")
    assert explain(shard, False, None, "t.py").message == "exit code 1"


# ---------------------------------------------------------------- on the hosts of a cluster


class FakeFolder:
    """A data folder in which every bundle is already."""

    def __init__(self) -> None:
        self.unpacked: list[tuple[str, str]] = []

    def has_bundle(self, digest: str) -> bool:
        return True

    def unpack(self, job: str, digest: str) -> None:
        self.unpacked.append((job, digest))


@pytest.mark.parametrize("rule", ["", "own_rules:Heavy"])
@pytest.mark.parametrize("role", ["server", "worker"])
def test_code_is_brought_to_server_hosts_only_for_jobs_with_a_rule(role: str, rule: str) -> None:
    folder: Any = FakeFolder()
    spec = job_spec(name="j", script="src/t.py", workers=1, shards=1, rule=rule).model_dump(mode="json")

    async def prepare() -> None:
        fetcher = Fetcher(folder, Numbers(), lambda _: None, lambda: 0.0, 1.0)
        await fetcher.prepare(ProcessId("j-1", role, 0, 0), {"spec": spec, "bundle": "d" * 64})
        await fetcher.close()

    asyncio.run(prepare())
    assert folder.unpacked == ([("j-1", "d" * 64)] if rule or role == "worker" else [])


def test_a_shard_on_a_host_of_a_cluster_looks_where_the_code_is_unpacked() -> None:
    spec = job_spec(name="j", script="src/t.py", workers=1, shards=1, rule="own_rules:Heavy")
    host = spawn.Host("tcp://c:1", "127.0.0.1", 2, 0, (), "auto", {})
    document = {"spec": spec.model_dump(mode="json"), "workers": 1, "threads": 0, "keys": None, "coordinator": ""}
    order = {**document, "gpu": -1}
    _, environment = spawn.process(host, ProcessId("j-1", "server", 0, 0), order, "/data/jobs/j-1")
    config = ShardConfig(**json.loads(environment["DOWNPOUR_SHARD"]))
    assert (config.rule, config.script_folder) == ("own_rules:Heavy", "/data/jobs/j-1/work/src")
