"""What must hold at a job's end; what must hold on the way is checked where it happens (``processes``, ``ledger``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from downpour_common.errors import CheckpointError
from downpour_common.layout import plan
from downpour_common.tensorfile import TensorFile
from downpour_coordinator import checkpoints
from simulator.ledger import Violation, applied, check_once
from simulator.scenario import CHUNK_BYTES

if TYPE_CHECKING:
    from simulator.scenario import Scenario
    from simulator.world import Outcome, World

OUT = "/run"


def check_end(world: World) -> None:
    """Raises :class:`Violation`."""
    life, scenario = world.carrier.life, world.scenario
    if life.state != "SUCCEEDED":
        if life.failure is not None and life.failure.reason == "RESULT_NOT_WRITTEN" and _excused(world):
            return
        raise Violation(f"the job ended as {life.state}: {life.failure}")
    if scenario.synchronous:
        _check_rounds(world)
    else:
        _check_ledger(world)
        _check_census(world)


def check_durable(world: World) -> None:
    """After a power failure: the checkpoint that was committed last is there, whole."""
    number = world.carrier.life._newest
    if not number or any(fault.kind in ("flip", "full") for fault in world.happened):
        return
    try:
        checkpoints.load(checkpoints.folder_of(OUT, number))
    except CheckpointError as error:
        raise Violation(f"checkpoint {number} was committed, and has not survived a power failure: {error}") from None


def _excused(world: World) -> bool:
    """Whether the last checkpoint could not be written: with a full disk, or as a shard died when all was over."""
    return any(f.kind == "full" or f.target.startswith("server") for f in world.happened)


def _weights(world: World) -> dict[str, torch.Tensor]:
    """Of the exported model, by tensor."""
    try:
        with TensorFile(f"{OUT}/model.safetensors") as file:
            return {
                name: torch.frombuffer(bytearray(file[name]), dtype=torch.float64)
                for name in file
                if name.startswith("parts")
            }
    except CheckpointError as error:
        raise Violation(f"the job has succeeded, and its model cannot be read: {error}") from None


def _check_ledger(world: World) -> None:
    """Nothing is there twice; what was acknowledged is there, but for what shards have lost and counted."""
    ledger, scenario = world.ledger, world.scenario
    model = world.carrier.life.training.model
    assert model is not None
    layout = plan(model, scenario.shards, CHUNK_BYTES)
    weights = _weights(world)
    # By shard: contributions to its chunks that are missing, those that must have been counted and all that may be.
    least, most = Counter[int](), Counter[int]()
    for chunk in layout.by_kind["trainable"]:
        [(tensor, *_)] = layout.pieces_of(chunk)
        check_once(weights[tensor.name], tensor.name)
        found = applied(weights[tensor.name])
        unknown = found - set(range(len(ledger.pushed)))
        if unknown:
            raise Violation(f"{tensor.name} holds contributions that nobody made: {sorted(unknown)}")
        missing = [p for n, p in enumerate(ledger.pushed) if p.run == ledger.run and n not in found]
        most[chunk.shard] += len({(p.who, p.push) for p in missing})
        told = {(p.who, p.push) for p in missing if p.acknowledged and p.who in ledger.ended_well}
        least[chunk.shard] += len(told)
    lost = world.carrier.life.training.lost()
    for shard in range(scenario.shards):
        counted = lost[shard].contributions if shard in lost else 0
        if not least[shard] <= counted <= most[shard]:
            raise Violation(
                f"server/{shard} has counted {counted} lost contributions; missing are {least[shard]} that were "
                f"acknowledged to workers that ended well, and {most[shard]} in all"
            )
        acknowledged = _acknowledged_missing(world, shard)
        if acknowledged and not _recovered(world, shard):
            raise Violation(f"server/{shard} lacks acknowledged contributions, and never had to recover")


def _acknowledged_missing(world: World, shard: int) -> bool:
    ledger, scenario = world.ledger, world.scenario
    model = world.carrier.life.training.model
    assert model is not None
    layout, weights = plan(model, scenario.shards, CHUNK_BYTES), _weights(world)
    for chunk in layout.by_kind["trainable"]:
        if chunk.shard == shard:
            [(tensor, *_)] = layout.pieces_of(chunk)
            found = applied(weights[tensor.name])
            for number, pushed in enumerate(ledger.pushed):
                if pushed.run == ledger.run and pushed.acknowledged and number not in found:
                    return True
    return False


def _recovered(world: World, shard: int) -> bool:
    """Whether there was more than one process of it since the whole job began last."""
    return sum(s.index == shard and s.run_number == world.ledger.run for s in world.shards) > 1


def _check_census(world: World) -> None:
    """Leases: every sample of a pass is trained; by nobody twice where nothing has happened."""
    scenario, ledger = world.scenario, world.ledger
    for key, held in world.carrier.life.training._data.ledgers.items():
        if any(held.leased.values()):
            raise Violation(f"all workers have gone, and of pass {key} there are leases still: {held.leased}")
    for epoch in range(scenario.passes):
        for sample in range(scenario.samples):
            times = ledger.trained.get((epoch, sample), 0)
            if times == 0 and not world.happened:
                raise Violation(f"nobody has trained sample {sample} of pass {epoch}")
            if times > 1 and not world.happened:
                raise Violation(f"sample {sample} of pass {epoch} was trained {times} times")


def _check_rounds(world: World) -> None:
    """sync: each sample of a pass is in exactly one step of one slot, however often that was computed."""
    scenario = world.scenario
    counted = Counter((step.epoch, sample) for step in world.ledger.steps.values() for sample in step.samples)
    expected = {(epoch, sample): 1 for epoch in range(scenario.passes) for sample in range(scenario.samples)}
    if counted != expected:
        wrong = sorted(k for k in {*counted, *expected} if counted.get(k) != expected.get(k))
        raise Violation(f"samples not trained once, by pass and sample: {[(k, counted.get(k, 0)) for k in wrong]}")


def result_of(world: World) -> dict[str, bytes]:
    """Weights and the rule's state of every trainable chunk, from the last checkpoint."""
    try:
        found, _ = checkpoints.newest(OUT)
    except CheckpointError:
        return {}
    result: dict[str, bytes] = {}
    for entry in found.manifest["files"]:
        trainable = {i for i, row in entry["chunks"].items() if "step" in str(row)} or set(entry["chunks"])
        with TensorFile(f"{found.folder}/{entry['file']}") as file:
            for name in file:
                if name.partition(".")[0] in trainable:
                    result[name] = bytes(file[name])
    return result


def compare(scenario: Scenario, outcome: Outcome, calm: Callable[[Scenario], Outcome]) -> str:
    """sync: what differs from the run in which nothing goes wrong; "" where nothing does."""
    expected = calm(scenario)
    if expected.violation:
        return f"without any fault: {expected.violation}"
    if outcome.steps != expected.steps:
        wrong = [k for k in {*outcome.steps, *expected.steps} if outcome.steps.get(k) != expected.steps.get(k)]
        return f"steps differ from those of the calm run, by slot and clock: {sorted(wrong)[:5]}"
    names = {*outcome.result, *expected.result}
    wrong_names = sorted(n for n in names if outcome.result.get(n) != expected.result.get(n))
    return f"not bit-identical to the calm run: {wrong_names}" if wrong_names else ""
