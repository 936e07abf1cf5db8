"""The README's tables are what the committed results say; the figures behind tables, plots and profiles."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
MACHINE = {
    "cpu_model": "Abacus",
    "cores": 2,
    "kernel": "6",
    "python": "3.11",
    "torch": "2.13.0",
    "libzmq": "4.3.5",
    "pyzmq": "27",
    "numpy": "2",
    "load_average_1min": 0.1,
}
STAMP = {"date": "2026-11-21T12:00:00+00:00", "machine": MACHINE}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60, check=False)


# ---------------------------------------------------------------- tables


def trained(name: str, group: str, workers: int, step_s: float) -> dict[str, Any]:
    rate = workers * 64 / step_s
    return {
        "name": name,
        "group": group,
        "workers": workers,
        "turns_s": [10 * step_s],
        "step_s": step_s,
        "min_step_s": step_s,
        "max_step_s": 2 * step_s,
        "samples_per_s": rate,
    }


def training() -> dict[str, Any]:
    results = [trained("plain", "limit", 1, 0.1), trained("ddp-gloo", "peer", 2, 0.2), trained("new", "ours", 2, 0.004)]
    rates = {r["name"]: r["samples_per_s"] for r in results}
    section = {
        **STAMP,
        "workload": {"name": "digits-adam", "model": "digits", "batch": 64, "steps": 10},
        "rounds": 5,
        "results": results,
        "ratios": {a: {b: rates[a] / rates[b] for b in rates} for a in rates},
        "aims": [],
        "failed": {"downpour-1": "it fell over"},
    }
    return {"schema": 1, "sections": {"digits-adam": section}}


def test_the_readme_says_what_was_measured() -> None:
    done = run(str(BENCHMARKS / "table.py"), "--check")
    assert done.returncode == 0, done.stderr


def test_every_section_is_known() -> None:
    import table
    from bench_lib.markdown import TABLES, sections

    found = []
    for file in table.FILES:
        text = file.read_text(encoding="utf-8")
        found += sections(text)
        assert text.count("<!-- bench:") == text.count("<!-- /bench -->") == len(sections(text)), file
    assert sorted(found) == sorted(TABLES)


def test_every_picture_of_the_readme_is_there() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures
    assert [name for name in pictures if not (ROOT / name).is_file()] == []


def test_sections_are_filled_and_filled_again() -> None:
    from bench_lib.markdown import NOT_MEASURED, filled

    text = "a\n<!-- bench:training -->\nold\n<!-- /bench -->\nb\n<!-- bench:busy -->\n<!-- /bench -->\nc\n"
    once = filled(text, {"training": training()})
    assert once == filled(once, {"training": training()})
    assert "| new | 4.00 ms | 32000 | 50.00 | 50.00 |" in once
    assert "| plain script, one process, all cores | 100 ms | 640 | 1.00 | 1.00 |" in once
    assert "Without a result: downpour-1." in once
    assert "old" not in once
    assert once.endswith(f"b\n<!-- bench:busy -->\n\n{NOT_MEASURED}\n\n<!-- /bench -->\nc\n")
    with pytest.raises(KeyError):
        filled("<!-- bench:speed -->\n<!-- /bench -->", {})


def test_busy_and_memory() -> None:
    from bench_lib.markdown import busy, memory

    row = {
        "push_gb_per_s": 3.04,
        "busy_push_gb_per_s": 2.0,
        "push_kept": 0.66,
        "step_gb_per_s": 8.0,
        "busy_step_gb_per_s": 6.0,
        "step_kept": 0.75,
        "loops_kept_beside_push": 0.9,
        "loops_kept_beside_step": 0.8,
    }
    document = {
        **STAMP,
        "settings": {"megabytes": 100, "runs": 5},
        "results": {"memory": row, "tcp": row},
        "failed": {},
    }
    assert "| shared memory, push | 3.0 | 2.0 | 66 % | 90 % |" in busy(document)
    assert "| TCP, push and pull | 8.0 | 6.0 | 75 % | 80 % |" in busy(document)
    peak = {"optimizer": "sgd", "way": "tcp", "workers": 2, "mode": "sync", "plain": 4e8, "worker": 6e8, "shard": 5e8}
    peaks = {**STAMP, "settings": {"model_bytes": 1e8}, "results": [{**peak, "worker_limit": 7e8, "shard_limit": 6e8}]}
    assert "| SGD, TCP | 2, sync | 400 | 600 | 700 | 500 | 600 |" in memory(peaks)


def test_plots_are_drawn_and_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "training.json").write_text(json.dumps(training()))
    (tmp_path / "pushpull.json").write_text((BENCHMARKS / "results" / "pushpull.json").read_text())
    pictures = []
    plots = str(BENCHMARKS / "plots.py")
    for out in ("one", "two"):
        done = run("-W", "error", plots, "--results", str(tmp_path), "--out", str(tmp_path / out))
        assert done.returncode == 0, done.stderr
        pictures.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert set(pictures[0]) == {"training.svg", "pushpull.svg"}
    assert pictures[0] == pictures[1]


# ---------------------------------------------------------------- profiles


@pytest.fixture
def step_recorder() -> ModuleType:
    """Loaded by itself: its folder holds a ``sitecustomize``, which is not for this process."""
    path = BENCHMARKS / "profile_hook" / "step_recorder.py"
    spec = importlib.util.spec_from_file_location("step_recorder", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["step_recorder"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_function_that_is_timed_is_there(step_recorder: ModuleType) -> None:
    for seam in step_recorder.SEAMS:
        holder: Any = importlib.import_module(seam.module)
        for part in seam.name.split("."):
            assert hasattr(holder, part), f"{seam}: benchmarks/profile_hook/step_recorder.py must follow"
            holder = getattr(holder, part)
        assert callable(holder)


def test_a_functions_own_time_is_without_that_of_others(
    step_recorder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(step_recorder.time, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(step_recorder.time, "thread_time", lambda: now["cpu"])

    def work(seconds: float) -> float:
        now["wall"] += seconds
        now["cpu"] += seconds / 4
        return seconds

    module = ModuleType("m")
    module.inner = work  # type: ignore[attr-defined]
    module.outer = lambda: work(1) + module.inner(2) + module.inner(4)  # type: ignore[attr-defined]
    recorder = step_recorder.Recorder()
    seams = [step_recorder.Seam("worker", "m", name, name) for name in ("inner", "outer", "gone.away")]
    step_recorder.instrument(module, seams, recorder)
    assert module.outer() == 7  # type: ignore[attr-defined]
    thread = threading.current_thread().name
    assert recorder.events == [
        ("inner", thread, 3.0, 2.0, 0.5),
        ("inner", thread, 7.0, 4.0, 1.0),
        ("outer", thread, 7.0, 1.0, 0.25),
    ]
    assert recorder.missing == ["m.gone.away"]
    with pytest.raises(TypeError):
        module.inner()  # type: ignore[attr-defined]
    assert recorder.events[-1][0] == "inner", "what raises is timed as well"


def test_a_profile_is_of_medians_per_step() -> None:
    from bench_lib.machine import Machine
    from bench_lib.step_profile import MAIN_THREAD, Wanted, summarise

    wanted = Wanted("tiny", "sgd", "async", 1, 1, (), steps=3, warmup=1)
    steps = [0.0, 10.0, 11.0, 13.0, 14.0]
    sent = [
        ("send", MAIN_THREAD, end, own, own / 2) for end, own in ((5.0, 9.0), (10.5, 0.1), (12.0, 0.2), (13.5, 0.4))
    ]
    io = [("poll", "io", 12.0, 0.5, 0.0)]
    applied = [("apply", MAIN_THREAD, end, 0.25, 0.25) for end in (9.0, 10.2, 10.4, 11.5, 12.5, 13.2, 13.4, 15.0)]
    documents = [
        {"side": "shard", "rank": 0, "events": applied, "steps": [], "missing": []},
        {"side": "worker", "rank": 0, "events": sent + io, "steps": steps, "missing": ["x.y"]},
    ]
    profile = summarise(wanted, Machine(**MACHINE), documents)  # type: ignore[arg-type]
    worker, shard = profile.sides
    assert profile.step_s == 1.0
    assert [(p.name, p.wall_s, p.cpu_s, p.calls) for p in worker.phases] == [("send", 0.2, 0.1, 1)]
    assert [(p.name, p.wall_s, p.calls) for p in shard.phases] == [("apply", 0.5, 2)]
    assert profile.missing == ["x.y"]


def test_the_standard_librarys_profile_is_found_beside_ours() -> None:
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import cProfile, profile; print(profile.Profile)"
    done = run("-c", code)
    assert done.stdout == "<class 'profile.Profile'>\n", done.stderr
