"""Another mode or other settings while a job runs: what may change, the way there, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from coordinator_kit import World

from downpour_common import exitcodes
from downpour_common.config import job_spec
from downpour_common.errors import ConfigError, ProtocolError
from downpour_coordinator.changes import Changes, changed, differences
from downpour_coordinator.effects import LogRow
from downpour_coordinator.outcome import outcome_of
from downpour_coordinator.phases import Phase
from downpour_coordinator.recorder import EVERY_S
from downpour_coordinator.service import JobService
from downpour_deploy.change.wait import await_change, exit_code

SPEC = job_spec(name="x", script="x.py", workers=2, shards=1, mode="sync", settings={"timeout_s": 9})


def test_a_change_is_checked_against_the_whole_description() -> None:
    after = changed(SPEC, ["mode=ssp:3;1=async", "settings.clip = 2", "window_bytes=1MiB", "target=loss<=0.1"])
    assert (after.mode, after.target, after.settings.clip) == ("ssp:3;1=async", "loss<=0.1", 2.0)
    assert (after.settings.window_bytes, after.settings.timeout_s, after.workers) == (1 << 20, 9.0, 2)
    assert differences(SPEC, after) == {
        "mode": ["sync", "ssp:3;1=async"],
        "target": ["", "loss<=0.1"],
        "clip": [0.0, 2.0],
        "window_bytes": [16 << 20, 1 << 20],
    }
    assert changed(SPEC, ["mode=async", "n_push=4"]).settings.n_push == 4, "they are checked together"


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        ([], ["nothing to set"]),
        (["mode"], ["mode: expected key=value"]),
        (["mode=snyc"], ["did you mean 'sync'"]),
        (["mode=sync,backup=2"], ["would leave nobody in a round"]),
        (["n_push=4"], ["n_push and n_fetch belong to mode async"]),
        (["clip=-1"], ["settings.clip"]),
        (["mod=async", "mtbf=3"], ["mod: no such key; did you mean mode?", "mtbf: no such key; did you mean mtbf_s?"]),
        (["workers=3"], ["downpour scale"]),
        (["name=y", "shards=2", "script=y.py"], ["name: cannot", "shards: cannot", "script: cannot", "--resume"]),
        (["chunk_bytes=4096", "settings.port=80"], ["chunk_bytes: a job keeps this", "port: a job keeps this"]),
    ],
)
def test_what_cannot_be_is_refused_in_words(assignments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        changed(SPEC, assignments)
    assert all(word in str(refused.value) for word in words), refused.value


# ---------------------------------------------------------------- the life of a job


def trains(world: World, clock: int) -> None:
    """Everybody has made steps up to this clock."""
    for slot in range(world.spec.workers):
        world.progress(slot, clock)
    world.tick()


def goes_on_with(world: World, mode: str) -> None:
    """Until it trains in this mode."""
    world.wait(10)
    assert (world.phase, world.life.spec.mode) == (Phase.TRAINING, mode)


def test_a_job_goes_on_from_a_checkpoint_with_another_mode_and_that_is_no_restart() -> None:
    world = World(mode="async").start()
    trains(world, 3)
    assert world.life.change("t", ["mode=sync", "checkpoint_s=7"])["state"] == "waiting"
    epochs = {key: p.epoch for key, p in world.life.processes.items()}
    world.tick()
    assert world.committed == [1]
    assert (world.phase, world.life.state, world.life.reason) == (Phase.LEAVING, "RESTARTING", "CHANGED")
    assert world.life.change("t", ["mode=sync", "checkpoint_s=7"])["state"] == "changing"
    world.wait_for(Phase.TRAINING)
    life = world.life
    assert (life.spec.mode, life.training.facts.mode.synchronous, life.training.facts.clock) == ("sync", True, 5)
    assert life.training.facts.resume == "checkpoints/000001"
    assert all(p.epoch > epochs[key] for key, p in life.processes.items())
    assert life.change("t", [])["state"] == "changing", "nobody has made a step"
    began_s = world.now_s
    trains(world, 6)
    assert life.change("t", [])["state"] == "changed"
    assert life.change("t", [])["number"] == 1
    figures = outcome_of(life, "out", began_s + 8.0)
    assert (figures.steps, figures.train_s) == (1, pytest.approx(8.0, abs=1.0)), "both since it began again"
    assert (life.restarts, life.failure, life.warnings, life.checkpoints.interval_s) == (0, None, [], 7.0)
    for slot in (0, 1):
        world.leave(slot)
    world.wait_for(Phase.OVER)
    assert life.state == "SUCCEEDED"


def test_measures_after_a_change_count_from_there() -> None:
    world = World(mode="async").start()
    world.progress(0, 3, samples=1000)
    world.wait(EVERY_S)
    world.life.change("t", ["mode=sync", "target=loss=0.5"])
    world.tick()
    world.wait_for(Phase.TRAINING)
    world.tick()
    life, began_s = world.life, world.now_s
    assert life.recorder.target.figures() == {"wanted": "loss<=0.5", "value": None, "reached": None}
    world.progress(0, 6, samples=640)
    [row] = [e.row for e in life.tick(began_s + EVERY_S) if isinstance(e, LogRow)]
    assert row["measures"]["throughput"] == 640 / EVERY_S


def test_whatever_the_coordinator_has_forgotten_is_done_once() -> None:
    """It is restarted between any two things that happen."""
    world = World(mode="ssp:2").start()
    trains(world, 3)
    world.life.change("t", ["mode=async"])
    seen = ["waiting"]
    for _ in range(60):
        for happens in (world.tick, world.obey, world.work, world.place, world.speak):
            world.restarted()
            happens()
            state = world.life.change("t", ["mode=async"])["state"]
            seen += [state] if state != seen[-1] else []
        if world.life.spec.mode == "async" and world.phase is Phase.TRAINING:
            trains(world, 9)
    assert seen == ["waiting", "changing", "changed"]
    assert (world.life.spec.mode, world.life.training.facts.mode.name) == ("async", "async")
    assert (world.life.restarts, world.life.warnings, world.phase) == (0, [], Phase.TRAINING)


def test_a_change_that_the_script_does_not_survive_is_taken_back() -> None:
    world = World(mode="async").start()
    trains(world, 3)
    world.life.change("t", ["mode=sync;7=async"])
    world.prepares = False
    world.wait_for(Phase.STARTING)
    world.fails(1, "ModelError: no group 7")
    world.prepares = True
    world.wait_for(Phase.TRAINING)
    found = world.life.change("t", [])
    assert (found["state"], found["mode"]) == ("failed", "async")
    assert "no group 7" in found["error"]
    assert any("the change was taken back" in text for text in world.life.warnings)
    trains(world, 8)
    assert (world.life.failure, world.life.restarts, world.life.reason) == (None, 0, "")
    world.life.change("u", ["mode=sync"])
    goes_on_with(world, "sync")


def test_a_checkpoint_that_fails_is_tried_again_and_the_job_trains_on_meanwhile() -> None:
    world = World(mode="async").start()
    trains(world, 3)
    world.disk_full = "no space left"
    world.life.change("t", ["mode=sync"])
    world.wait(20)
    assert (world.phase, world.life.change("t", [])["state"]) == (Phase.TRAINING, "waiting")
    with pytest.raises(ConfigError, match="another change"):
        world.life.change("u", ["mode=ssp:2"])
    world.disk_full = ""
    goes_on_with(world, "sync")


def test_only_a_running_job_can_be_changed_and_one_that_ends_first_says_so() -> None:
    world = World(mode="async").begin()
    world.disk_full = "no space left"
    with pytest.raises(ConfigError, match="at most 64"):
        world.life.change("t" * 65, ["mode=sync"])
    assert world.life.change("same", ["mode=async"])["state"] == "changed"
    world.life.change("t", ["mode=sync"])
    world.cancel()
    with pytest.raises(ConfigError, match="only a running job"):
        world.life.change("u", ["mode=sync"])
    world.wait_for(Phase.OVER)
    assert world.life.change("t", [])["state"] == "failed"
    assert world.life.state == "CANCELLED"


def test_ctrl_c_during_a_change_ends_the_job_at_its_checkpoint() -> None:
    world = World(mode="async").start()
    trains(world, 3)
    world.life.change("t", ["mode=sync"])
    world.tick()
    assert world.phase is Phase.LEAVING
    world.stop()
    assert world.life.state == "STOPPING"
    world.wait_for(Phase.OVER)
    assert world.life.state == "CANCELLED"
    assert any("--resume" in text for text in world.life.warnings)


def test_changes_survive_as_plain_values() -> None:
    changes = Changes()
    changes.ask("t", SPEC, ["mode=async"])
    changes.leave(4)
    changes.take(SPEC)
    again = Changes.from_document(json.loads(json.dumps(changes.document())))
    assert again.document() == changes.document()
    assert again.take_back("why") == SPEC
    assert again.progress("t", over=False) == ("failed", "why")


def test_the_job_file_says_what_is_in_force(tmp_path: Path) -> None:
    world = World(mode="async").start()
    with open(tmp_path / "metrics.jsonl", "w", encoding="utf-8") as metrics:
        service = JobService(world.life, str(tmp_path), lambda *_: None, metrics)
        world.life.spec = changed(world.life.spec, ["mode=ssp:2", "clip=3"])
        service._describe()
    text = (tmp_path / "job.toml").read_text()
    assert 'mode = "ssp:2"' in text
    assert "clip = 3.0" in text


# ---------------------------------------------------------------- the command's waiting


class Client:
    """Answers as a coordinator would."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.tokens: set[str] = set()
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def pause(self, seconds: float) -> None:
        self.now_s += seconds

    def set(self, job: str, token: str, assignments: tuple[str, ...]) -> dict[str, Any]:
        assert assignments == ("mode=sync",)
        self.tokens.add(token)
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return {"job": job, "state": state, "number": 3, "error": "", "mode": "sync"} if state else {"job": job}


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["waiting", "changing", "changed"], exitcodes.OK),
        (["changing", "failed"], exitcodes.FAILED),
        (["waiting"], exitcodes.NOT_FINISHED),
    ],
)
def test_the_command_asks_with_one_token_until_it_is_done(states: list[str], code: int) -> None:
    client: Any = Client(*states)
    found = await_change(client, "job-1", ("mode=sync",), 5.0)
    assert exit_code(found) == code
    assert len(client.tokens) == 1
    assert client.now_s <= 5.0


def test_nonsense_of_a_coordinator_is_an_error() -> None:
    client: Any = Client("")
    with pytest.raises(ProtocolError, match="malformed"):
        await_change(client, "job-1", ("mode=sync",), 5.0)
