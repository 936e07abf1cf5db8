"""Portions, commands and vectors together, without a network: whatever is lost or repeated, the sums are right."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from unit_kit import JOB, model, tensor

from downpour_common import messages as m
from downpour_common.config import job_spec
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.layout import plan
from downpour_common.modes import parse_mode
from downpour_common.vectors import TRIAL, WEIGHTS, Commands, packed, together, unpacked
from downpour_coordinator.minimiser import Minimiser
from downpour_coordinator.portions import Portions, cut
from downpour_server.stats import ShardStats
from downpour_server.store import StoredChunk
from downpour_server.vectors import Vectors, take_portion

SHARDS, WORKERS, SAMPLES, UNIT = 3, 3, 30, 4
LAYOUT = plan(model(tensor("a", 7, dtype="float64"), tensor("b", 3, 2, dtype="float64")), SHARDS, 24)
SIZE = 13
RNG = np.random.default_rng(5)
A, B = RNG.normal(size=(SAMPLES, SIZE)), RNG.normal(size=SAMPLES)
OPTIONS = {
    "samples": SAMPLES,
    "unit": UNIT,
    "max_iterations": 500,
    "tolerance_grad": 1e-9,
    "tolerance_change": 0.0,
    "noise": 1e-15,
}


class Server:
    """The process of one shard."""

    def __init__(self, index: int, weights: dict[int, torch.Tensor] | None = None) -> None:
        self.index = index
        self.chunks = {c.index: StoredChunk(c, "SGD", {"lr": 1.0}) for c in LAYOUT.of_shard(index)}
        for number, stored in self.chunks.items():
            stored.weights.copy_(torch.zeros(stored.chunk.numel) if weights is None else weights[number])
        self.vectors = Vectors(tuple(self.chunks.values()))

    def reached(self) -> dict[int, torch.Tensor]:
        """What a snapshot holds."""
        return {i: (s.weights if s.reached is None else s.reached).clone() for i, s in self.chunks.items()}


@dataclass
class World:
    """Everything, and a seed that decides what happens next. ``faults``: how likely anything goes wrong."""

    seed: int
    faults: float
    mode: str = "lbfgs,portions=2"
    minimiser: Minimiser = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.minimiser = Minimiser(parse_mode(self.mode), SHARDS)
        self.servers = [Server(i) for i in range(SHARDS)]
        self.to_shards: list[tuple[int, m.VectorOps]] = []
        self.to_coordinator: list[tuple[int, m.VectorsDone]] = []
        self.asking: dict[int, m.TakePortion] = {}
        self.at_work: dict[int, m.Portion] = {}
        self.over: set[tuple[int, int, int]] = set()
        self.results: dict[int, m.Minimised] = {}
        self.numbers = 0
        for slot in range(WORKERS):
            self.ask(slot)

    def chance(self, share: float = 1.0) -> bool:
        return self.random.random() < self.faults * share

    def ask(self, slot: int, *finished: int | float) -> None:
        self.numbers += 1
        options, told = (OPTIONS, (-1, 0, 0.0, 0)) if not finished else ({}, finished)
        self.asking[slot] = m.TakePortion(self.numbers, JOB, slot, 0, 1, options, *told)  # type: ignore[arg-type]

    def run(self) -> None:
        for number in range(40_000):
            if len(self.results) == WORKERS:
                return
            if number == 8_000:
                self.faults = 0.0  # so that it comes to an end
            self.turn()
            self.deliver()
        pytest.fail("it does not end")

    def turn(self) -> None:
        what, slot, shard = self.random.randrange(5), self.random.randrange(WORKERS), self.random.randrange(SHARDS)
        if what == 0 and slot in self.asking and not self.chance():
            self.minimiser.asked(slot, b"", self.asking[slot], WORKERS)
        elif what == 1 and slot in self.at_work:
            self.compute(slot, self.at_work[slot])
        elif what == 2 and self.to_shards:
            self.execute(*self.to_shards.pop(self.random.randrange(min(2, len(self.to_shards)))))
        elif what == 3 and self.to_coordinator:
            self.minimiser.done(*self.to_coordinator.pop(0))
        elif what == 4 and self.random.random() < 0.3:
            self.minimiser.heard(shard)
        if self.chance(0.02):
            self.at_work.pop(slot, None)
            self.minimiser.release(slot)
            if slot not in self.results:
                self.ask(slot)
        if self.chance(0.0005):
            self.servers[shard] = Server(shard, self.servers[shard].reached())
        if self.chance(0.0005):
            document = json.loads(json.dumps(self.minimiser.document()))
            self.minimiser = Minimiser(parse_mode(self.mode), SHARDS)
            self.minimiser.restore(document)

    def deliver(self) -> None:
        found = self.minimiser
        for slot, _, answer in found.answers:
            if slot not in self.asking or self.asking[slot].request != answer.request:  # type: ignore[attr-defined]
                continue
            if isinstance(answer, m.Minimised):
                self.results[slot] = answer
                del self.asking[slot]
            elif isinstance(answer, m.Portion):
                self.at_work[slot] = answer
                del self.asking[slot]
            else:
                pytest.fail(str(answer))
        for slot, notice in found.notices:
            assert isinstance(notice, m.PortionOver)
            held = self.at_work.get(slot)
            if held is not None and (held.evaluation, held.portion) == (notice.evaluation, notice.portion):
                del self.at_work[slot]
                self.ask(slot)
        for shard in found.commands:
            assert found.command is not None
            self.to_shards += [(shard, found.command)] * (0 if self.chance() else 2 if self.chance() else 1)
        found.said()

    def execute(self, shard: int, command: m.VectorOps) -> None:
        done = self.servers[shard].vectors.execute(command)
        if done is not None and not self.chance():
            self.to_coordinator += [(shard, m.VectorsDone(JOB, shard, 0, *done))] * (2 if self.chance() else 1)

    def weights(self) -> np.ndarray:
        parts = {i: stored.weights for server in self.servers for i, stored in server.chunks.items()}
        return torch.cat([parts[i] for i in sorted(parts)]).numpy().copy()

    def compute(self, slot: int, portion: m.Portion) -> None:
        a, b = A[portion.start : portion.stop], B[portion.start : portion.stop]
        error = a @ self.weights() - b
        gradient, at = torch.tensor(a.T @ error), 0
        count = portion.stop - portion.start
        for chunk in sorted(LAYOUT.chunks, key=lambda c: c.index):
            payload = gradient[at : at + chunk.numel].numpy().tobytes()
            at += chunk.numel
            head = (0, JOB, 0, slot, 0, 0, 0, chunk.index, count, (), b"", portion.evaluation, portion.portion)
            server = self.servers[chunk.shard]
            for _ in range(2 if self.chance() else 1):
                stored = server.chunks[chunk.index]
                answer = take_portion(server.vectors, stored, m.PushPortion(*head, payload), ShardStats())
                assert isinstance(answer, m.Ack)
            if self.chance(0.05):  # killed between two chunks
                self.minimiser.release(slot)
                del self.at_work[slot]
                self.ask(slot)
                return
        del self.at_work[slot]
        self.ask(slot, portion.evaluation, portion.portion, float(error @ error) / 2, count)


@pytest.mark.parametrize("faults", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_is_found_whatever_is_lost_repeated_or_killed(seed: int, faults: float) -> None:
    world = World(seed, faults)
    world.run()
    (result, *others) = [answer.result for answer in world.results.values()]
    assert all(other == result for other in others)
    assert result["reason"] == "gradient"
    np.testing.assert_allclose(world.weights(), np.linalg.lstsq(A, B, rcond=None)[0], atol=1e-7)
    if not faults:
        assert world.minimiser.document()["attempt"] == 1


def test_without_backups_everybody_has_a_portion_of_its_own() -> None:
    world = World(3, 0.0, "lbfgs,portions=2,backup=0")
    world.run()
    assert world.results[0].result["backups"] == 0
    assert all(server.vectors.dropped == 0 for server in world.servers)


# ---------------------------------------------------------------- portions


@pytest.mark.parametrize(
    ("samples", "unit", "count", "expected"),
    [
        (10, 4, 8, [(0, 4), (4, 8), (8, 10)]),
        (16, 4, 2, [(0, 8), (8, 16)]),
        (3, 64, 4, [(0, 3)]),
        (20, 4, 3, [(0, 4), (4, 12), (12, 20)]),
    ],
)
def test_data_are_cut_in_whole_batches(samples: int, unit: int, count: int, expected: list[tuple[int, int]]) -> None:
    assert cut(samples, unit, count) == expected


def test_who_waits_gets_what_is_awaited_longest() -> None:
    portions = Portions(1, [(0, 1), (1, 2), (2, 3)])
    assert [portions.take(slot) for slot in (0, 1, 2)] == [0, 1, 2]
    assert portions.finished(1, 0.5) == [1]
    assert portions.take(1) == 0
    assert portions.take(3) == 2  # each has two now
    assert portions.take(4) == -1
    portions.release(0)
    portions.release(2)
    assert portions.take(4) == 0
    assert portions.finished(2, 0.25) == [3]
    assert portions.finished(2, 9.0) == ()
    assert not portions.complete
    assert portions.finished(0, 1.0) == [1, 4]
    assert portions.complete
    assert (portions.total, portions.given) == (1.75, 3)


def test_a_loss_that_is_not_finite_ends_the_evaluation() -> None:
    portions = Portions(1, [(0, 1), (1, 2)])
    portions.take(0)
    portions.finished(0, float("nan"))
    assert portions.complete
    assert not np.isfinite(portions.total)


# ---------------------------------------------------------------- vectors


def command(number: int, commands: Commands, attempt: int = 1) -> m.VectorOps:
    return m.VectorOps(attempt, number, tuple(commands.ops), packed(commands.scalars))


def test_a_command_is_carried_out_once_and_answered_as_often_as_it_comes() -> None:
    server = Server(0, {c.index: torch.ones(c.numel) for c in LAYOUT.of_shard(0)})
    size = sum(c.numel for c in LAYOUT.of_shard(0))
    execute = server.vectors.execute
    assert execute(command(2, Commands().begin())) == (1, 2, True, b"")  # what came before is not known
    begin = command(1, Commands().begin().evaluate(7))
    assert execute(begin) == execute(begin) == (1, 1, False, b"")
    double = command(2, Commands().axpy(WEIGHTS, WEIGHTS, [1.0]).dot(WEIGHTS, WEIGHTS).maxabs(WEIGHTS))
    first = execute(double)
    assert first is not None
    assert unpacked(first[3]) == [4.0 * size, 2.0]
    assert execute(double) == first
    assert execute(begin) is None
    assert execute(command(4, Commands())) == (1, 4, True, b"")
    anew = command(1, Commands().begin().dot(WEIGHTS, WEIGHTS), attempt=2)
    assert execute(anew) == (2, 1, False, packed([1.0 * size]))  # back at the point
    assert execute(double) is None


def test_a_portion_counts_once_and_only_in_its_evaluation() -> None:
    server = Server(0)
    index, stored = next(iter(server.chunks.items()))
    server.vectors.execute(command(1, Commands().begin().evaluate(7)))
    ones = torch.ones(stored.chunk.numel, dtype=torch.float64)
    added = [server.vectors.add(index, *which, ones) for which in [(7, 0), (7, 0), (6, 1), (8, 1), (7, 1)]]
    assert added == [True, False, False, False, True]
    assert server.vectors._held[TRIAL][index].tolist() == [2.0] * stored.chunk.numel
    assert (server.vectors.portions, server.vectors.dropped) == (2, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        m.VectorOps(1, 1, (0, 0, 0), b""),
        m.VectorOps(1, 1, (99, 0, 0, 0), b""),
        m.VectorOps(1, 1, (4, 0, 0, 0), b""),
        m.VectorOps(1, 1, (6, 0, 40, 40), b""),
        m.VectorOps(1, 1, (4, 0, 0, 0), b"123"),
    ],
)
def test_commands_that_make_no_sense_are_refused(wrong: m.VectorOps) -> None:
    with pytest.raises(ProtocolError):
        Server(0).vectors.execute(wrong)


def test_results_are_put_together_in_the_order_of_the_shards() -> None:
    ops = Commands().dot(WEIGHTS, 8, 2).maxabs(TRIAL).ops
    assert together(ops, [[1.0, 2.0, 3.0], [10.0, 20.0, 2.0]]) == [11.0, 22.0, 3.0]
    with pytest.raises(ProtocolError):
        together(ops, [[1.0], [10.0, 20.0, 2.0]])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"replication": 2}, "lbfgs goes without replication"),
        ({"tensor": 2, "workers": 2}, "lbfgs goes without tensor and pipeline"),
        ({"settings": {"fetch": "layers"}}, "lbfgs goes without fetch=layers"),
        ({"settings": {"push_dtype": "bfloat16"}}, "lbfgs goes without push_dtype"),
        ({"settings": {"autocast": "bfloat16"}}, "lbfgs goes without autocast"),
        ({"settings": {"n_push": 2}}, "n_push and n_fetch belong to mode async"),
        ({"mode": "lbfgs,backup=2"}, "lbfgs's backup is a whole number, 0 to 1"),
        ({"mode": "lbfgs,history=0"}, "lbfgs's history is a whole number, 1 to 1000"),
    ],
)
def test_what_the_mode_does_not_go_with_is_refused_in_words(fields: dict[str, Any], words: str) -> None:
    start: dict[str, Any] = {"name": "a", "script": "a.py", "workers": 1, "shards": 1, "mode": "lbfgs"}
    with pytest.raises(ConfigError, match=words):
        job_spec(**{**start, **fields})
    assert job_spec(**start).parsed_mode.option("portions") == 4
