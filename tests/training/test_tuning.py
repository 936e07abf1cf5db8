"""What ``downpour tune`` does inside a script: another batch size, timed steps, an orderly end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from downpour import tuning
from downpour.tuning import Report, Trial, measured, read_report
from downpour_common.errors import ConfigError

DATA = TensorDataset(torch.arange(20.0).view(20, 1))


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return (torch.ones(1) for _ in range(11))


@pytest.fixture(autouse=True)
def no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(tuning.atexit, "register", lambda function: function)  # type: ignore[attr-defined]


def trial(tmp_path: Path, size: int = 8, **fields: Any) -> Trial:
    return Trial(size, 2, 5, 0.0, str(tmp_path / "report"), **fields)


def train(loader: Any, model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 1) -> list[int]:
    seen: list[int] = []

    def script() -> None:
        for _ in range(3):
            for number, batch in enumerate(loader, 1):
                x = batch[0] if isinstance(batch, list) else batch
                seen.append(len(x))
                model(x).square().mean().backward()
                if number % every == 0:
                    optimizer.step()

    with pytest.raises(SystemExit) as caught:
        script()
    assert caught.value.code == 0
    return seen


def made(dataset: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    model = nn.Linear(1, 1)
    return model, torch.optim.SGD(model.parameters(), lr=1e-6), DataLoader(dataset, batch_size=4, **options)


def found(of: Trial) -> Report:
    report = read_report(of.report)
    assert report is not None
    return report


@pytest.mark.parametrize(("every", "batches"), [(1, 7), (2, 14)])
def test_steps_are_timed_and_the_script_ends(tmp_path: Path, every: int, batches: int) -> None:
    asked = trial(tmp_path)
    model, optimizer, loader = made(DATA, shuffle=True)
    other = DataLoader(DATA, batch_size=3)
    resized, same = measured(asked, model, optimizer, [loader, other])
    assert same is other
    assert len(resized) == 7, "it goes on after the data set's two batches"
    assert train(resized, model, optimizer, every) == [8] * batches
    report = found(asked)
    assert (report.own_batch_size, report.samples, report.steps, report.problem) == (4, 20, 7, "")
    assert report.step_samples == [8 * every] * 5
    assert len(report.step_s) == 5
    assert report.peak_bytes >= report.baseline_bytes > 0
    assert report.capacity_bytes > report.baseline_bytes


def test_iterable_data_and_settings(tmp_path: Path) -> None:
    asked = trial(tmp_path, autocast="bfloat16")
    model, optimizer, loader = made(Endless())
    seen: list[torch.dtype] = []
    [resized] = measured(asked, model, optimizer, [loader])
    model.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype), prepend=True)
    assert train(resized, model, optimizer) == [8] * 7
    assert set(seen) == {torch.bfloat16}
    assert found(asked).samples == 0


def test_a_pass_without_training_ends(tmp_path: Path) -> None:
    model, optimizer, loader = made(DATA)
    [resized] = measured(trial(tmp_path), model, optimizer, [loader])
    assert len(list(resized)) == 2, "no step was taken in it"
    with torch.no_grad():
        assert len(list(resized)) == 2


def test_a_data_set_that_is_too_small_is_said_at_once(tmp_path: Path) -> None:
    asked = trial(tmp_path, 32)
    with pytest.raises(SystemExit):
        measured(asked, *made(DATA)[:2], [made(DATA)[2]])
    assert found(asked).problem == "the data set has 20 samples"


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (False, {"batch_size": 4}, "give downpour.prepare the optimizer"),
        (True, None, "give downpour.prepare the DataLoader"),
        (True, {"batch_size": None}, "give it a batch_size"),
        (True, {"batch_sampler": [[0, 1]]}, "give it a batch_size"),
    ],
)
def test_what_cannot_be_measured_is_said(
    tmp_path: Path, optimizer: bool, options: dict[str, Any] | None, message: str
) -> None:
    asked, model = trial(tmp_path), nn.Linear(1, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer else None
    loaders = [] if options is None else [DataLoader(DATA, **options)]
    with pytest.raises(ConfigError, match=message):
        measured(asked, model, sgd, loaders)
    assert message in found(asked).problem


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (KeyError("label"), "KeyError: 'label'"),
        (ConfigError("no such thing"), "no such thing"),
    ],
)
def test_how_a_script_failed_is_told(
    tmp_path: Path, error: Exception, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "excepthook", lambda *given: told.append(given))
    asked = trial(tmp_path)
    model, optimizer, loader = made(DATA)
    measured(asked, model, optimizer, [loader])
    sys.excepthook(type(error), error, None)
    assert found(asked).problem == problem
    assert len(told) == 1
