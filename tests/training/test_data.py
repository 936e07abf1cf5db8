"""Samples: each goes to exactly one worker in each pass, whatever the sizes, and nothing hangs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from downpour.session import Session
from downpour_common.errors import PeerRefused
from harness import CONTEXT, run_job


class Numbers(Dataset[torch.Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(torch.tensor([float(i)]) for i in range(self.count))


def seen(session: Session, loader: DataLoader[Any], epochs: int, evaluate: bool = False) -> list[list[int]]:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (prepared,) = session.prepare(model, optimizer, [loader])
    passes = []
    for _ in range(epochs):
        numbers: list[int] = []
        for batch in prepared:
            numbers += [int(n) for n in batch.flatten()]
            if not evaluate:
                optimizer.zero_grad()
                model(batch.view(-1, 1)).sum().backward()
                optimizer.step()
        passes.append(numbers)
    return passes


@pytest.mark.parametrize("mode", ["async", "ssp:1", "sync"])
@pytest.mark.parametrize(("count", "batch", "workers"), [(101, 8, 3), (24, 8, 3), (5, 8, 3), (2, 1, 3), (64, 7, 2)])
def test_census(mode: str, count: int, batch: int, workers: int) -> None:
    def body(session: Session) -> list[list[int]]:
        return seen(session, DataLoader(Numbers(count), batch_size=batch, shuffle=True), 3)

    job = run_job(body, replace(CONTEXT, mode=mode, workers=workers, shards=2))
    results: Any = job.results
    for epoch in range(3):
        taken = sorted(n for slot in range(workers) for n in results[slot][epoch])
        assert taken == list(range(count))
    assert results[0][0] != sorted(results[0][0]) or len(results[0][0]) < 3


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_census_of_an_iterable(mode: str) -> None:
    job = run_job(
        lambda s: seen(s, DataLoader(Stream(50), batch_size=4), 2), replace(CONTEXT, mode=mode, workers=3, shards=1)
    )
    results: Any = job.results
    for epoch in range(2):
        assert sorted(n for slot in range(3) for n in results[slot][epoch]) == list(range(50))


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_samplers_batch_samplers_and_no_batching(mode: str) -> None:
    context = replace(CONTEXT, mode=mode, workers=2)

    def by_batches(session: Session) -> list[list[int]]:
        sampler = BatchSampler(RandomSampler(range(30), generator=torch.Generator()), 4, drop_last=False)
        return seen(session, DataLoader(Numbers(30), batch_sampler=sampler), 2)

    def one_by_one(session: Session) -> list[list[int]]:
        return seen(session, DataLoader(Numbers(9), batch_size=None), 1)

    def weighted(session: Session) -> list[list[int]]:
        sampler = WeightedRandomSampler([1.0] * 10, 20, generator=torch.Generator())
        return seen(session, DataLoader(Numbers(10), sampler=sampler, batch_size=3), 2)

    batches: Any = run_job(by_batches, context).results
    assert sorted(batches[0][1] + batches[1][1]) == list(range(30))
    single: Any = run_job(one_by_one, context).results
    assert sorted(single[0][0] + single[1][0]) == list(range(9))
    drawn: Any = run_job(weighted, context).results
    assert len(drawn[0][0]) + len(drawn[1][0]) == 20


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_loader_processes_change_nothing(mode: str) -> None:
    def body(session: Session) -> list[list[int]]:
        loader = DataLoader(
            Numbers(40),
            batch_size=4,
            shuffle=True,
            num_workers=1,
            persistent_workers=True,
            multiprocessing_context="spawn",
        )
        return seen(session, loader, 2)

    results: Any = run_job(body, replace(CONTEXT, mode=mode, workers=1)).results
    assert [sorted(taken) for taken in results[0]] == [list(range(40))] * 2


def test_drop_last_drops_what_the_large_batch_would() -> None:
    def body(session: Session) -> list[list[int]]:
        return seen(session, DataLoader(Numbers(50), batch_size=8, drop_last=True), 1)

    results: Any = run_job(body, replace(CONTEXT, mode="sync", workers=2)).results
    assert len(results[0][0]) == len(results[1][0]) == 24


def test_two_loaders_one_only_evaluated() -> None:
    """A pass without steps ends without waiting for anybody, and its samples weigh nothing."""

    def body(session: Session) -> tuple[int, int]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train, held_out = session.prepare(
            model, optimizer, [DataLoader(Numbers(16), batch_size=4), DataLoader(Numbers(7), batch_size=2)]
        )
        evaluated = 0
        for _ in range(2):
            for batch in train:
                optimizer.zero_grad()
                model(batch).sum().backward()
                optimizer.step()
            if session.slot == 0:
                with torch.no_grad():
                    evaluated += sum(len(b) for b in held_out)
        assert session._engine is not None
        return evaluated, session._engine.counters.samples

    results: Any = run_job(body, replace(CONTEXT, mode="sync", workers=2)).results
    assert results[0] == (6, 16)  # 2 of the first 4, 1 of the last 3, twice
    assert results[1] == (0, 16)


def test_a_pass_left_early_returns_its_samples() -> None:
    def body(session: Session) -> list[int]:
        model = nn.Linear(1, 1)
        (loader,) = session.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.0), [DataLoader(Numbers(40), batch_size=2)]
        )
        for _ in loader:
            break
        return [int(n) for batch in loader for n in batch.flatten()]

    results: Any = run_job(body, replace(CONTEXT, mode="async", workers=1)).results
    assert sorted(results[0]) == list(range(40))


def test_datasets_that_differ_are_refused() -> None:
    def body(session: Session) -> object:
        return seen(session, DataLoader(Numbers(40 + session.slot), batch_size=2), 1)

    with pytest.raises(PeerRefused, match="every worker must see the same dataset"):
        run_job(body, replace(CONTEXT, mode="async", workers=2))


@pytest.mark.parametrize("evaluating", ["chief toggles", "always eval", "evaluates in between"])
def test_samples_count_with_the_step_that_used_them(evaluating: str) -> None:
    """Whatever the model's mode is when a batch is taken: frozen BatchNorm, an evaluation between two steps."""

    def body(session: Session) -> tuple[int, tuple[int, ...]]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train, held_out = session.prepare(
            model, optimizer, [DataLoader(Numbers(20), batch_size=5), DataLoader(Numbers(6), batch_size=2)]
        )
        if evaluating == "always eval":
            model.eval()
        for number, batch in enumerate(train):
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
            if evaluating == "chief toggles" and session.slot == 0:
                model.train(number % 2 == 0)
            if evaluating == "evaluates in between" and session.slot == 0:
                assert sum(len(b) for b in held_out) == 3  # gradients enabled, as scripts forget to disable them
        assert session._engine is not None
        return session._engine.counters.samples, session._position

    results: Any = run_job(body, replace(CONTEXT, mode="sync", workers=2)).results
    assert results == {0: (10, (1, 0)), 1: (10, (1, 0))}


def test_a_pass_left_early_gives_back_only_what_is_unfinished() -> None:
    def body(session: Session) -> None:
        model = nn.Linear(1, 1)
        (loader,) = session.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.0), [DataLoader(Numbers(40), batch_size=2)]
        )
        for number, _ in enumerate(loader):
            if number == 5:
                break

    ledger = run_job(body, replace(CONTEXT, mode="async", workers=1)).training._data.ledgers[0, 0]
    assert ledger.done == [(0, 10)]
    assert ledger.free == [(10, 40)]
