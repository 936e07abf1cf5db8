"""Tables of what the modes, compensations and codecs made of a training. Pure functions: documents in, Markdown out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from bench_lib.markdown_cells import Document, table, where

WORKLOADS = {
    "digits": "digits CNN",
    "chars": "character transformer",
    "mlp": "digits MLP, Adam",
    "mlp-sgd": "digits MLP, SGD",
    "cnn": "digits CNN, Adam",
    "cnn-sgd": "digits CNN, SGD",
}


def modes(document: Document) -> list[str]:
    """Final loss and accuracy beside one process, and what moved, for each workload."""
    lines: list[str] = []
    for workload, here in _grouped(document["results"], "workload").items():
        by_way = _grouped(here, "way")
        alone = _middle(by_way["one process"], "loss")
        moved = _middle(by_way["sync"], "moved") if "sync" in by_way else 0.0
        rows = []
        for way, runs in by_way.items():
            loss, mine = _middle(runs, "loss"), _middle(runs, "moved")
            rows.append(
                (
                    way if way == "one process" else f"`{way}`",
                    f"{loss:.3f}",
                    "" if way == "one process" else f"{100 * (loss / alone - 1):+.1f} %",
                    " ".join(f"{run['loss']:.3f}" for run in runs),
                    f"{_middle(runs, 'accuracy'):.3f}",
                    f"1/{moved / mine:.1f}" if moved and mine else "",
                )
            )
        heads = (WORKLOADS[workload], "loss", "of one process", "each seed", "accuracy", "bytes, of `sync`'s")
        lines += [*([""] if lines else []), *table(heads, rows)]
    passes = ", ".join(f"{count} of the {WORKLOADS[name]}" for name, count in document["passes"].items())
    return [*lines, "", f"Passes: {passes}; batches of {document['batch']} per worker. {where(document)}"]


def staleness(document: Document) -> list[str]:
    """The final loss of each way, fresh and late."""
    rows = [
        (
            f"{row['case']}, {row['workers']} worker{'' if row['workers'] == 1 else 's'}",
            "plain, nothing late" if row["way"] == "fresh" else f"`compensation={row['way']}`",
            f"{row['staleness']:.0f}",
            f"{row['median']:.3f}",
            "yes" if row["median"] <= document["target"] else "no",
        )
        for row in document["rows"]
    ]
    heads = ("problem", "way", "staleness", "loss", f"reaches {document['target']:g}")
    return [*table(heads, rows), "", f"Medians of 3 seeds. {where(document)}"]


def sandblaster(document: Document) -> list[str]:
    """How near torch's optimum, with how many evaluations, and what passed through the coordinator."""
    rows = [
        (
            row["problem"],
            "`torch.optim.LBFGS`, one process" if not row["workers"] else _crew(row),
            f"{100 * row['excess']:.4f} %",
            str(row["iterations"]),
            str(row["evaluations"]),
            f"{row['step_bytes']:.0f}" if row["workers"] else "",
            f"{1e3 * row['evaluation_s']:.0f} ms",
        )
        for row in document["results"]
    ]
    heads = (
        "problem",
        "",
        "loss above torch's",
        "iterations",
        "evaluations",
        "bytes per step and shard",
        "an evaluation",
    )
    return [*table(heads, rows), "", f"`python benchmarks/sandblaster.py`. {where(document)}"]


def codecs(document: Document) -> list[str]:
    """Bytes and final loss of each codec beside none."""
    lines: list[str] = []
    for workload, here in _grouped(document["results"], "workload").items():
        by_way = _grouped(here, "way")
        plain = by_way["none"]
        rows = []
        for way, runs in by_way.items():
            loss = _middle(runs, "test_loss")
            rows.append(
                (
                    way if way == "none" else f"`{way}`",
                    *(f"{_middle(runs, key) / _middle(plain, key):.3f}" for key in ("pushed", "pulled")),
                    f"{loss:.4f}",
                    f"{100 * (loss / _middle(plain, 'test_loss') - 1):+.1f} %",
                    f"{_middle(runs, 'accuracy'):.4f}",
                )
            )
        heads = (
            f"{WORKLOADS[workload]}, {len(plain)} seed(s)",
            "pushed, of all",
            "pulled, of all",
            "test loss",
            "of none",
            "accuracy",
        )
        lines += [*([""] if lines else []), *table(heads, rows)]
    return [*lines, "", where(document)]


def _crew(row: Mapping[str, Any]) -> str:
    workers = f"{row['workers']} worker{'' if row['workers'] == 1 else 's'}"
    late = ", one late" if row["late"] else ""
    return workers + late + ("" if row["backups"] else ", `backup=0`")


def _grouped(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _middle(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(median(row[key] for row in rows))


MODE_TABLES: dict[str, Callable[[Document], list[str]]] = {
    "modes": modes,
    "staleness": staleness,
    "sandblaster": sandblaster,
    "codecs": codecs,
}
