"""The README's tables, made of the JSON files of the benchmarks. Pure functions: documents in, Markdown out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from bench_lib.markdown_cells import Document, table, where
from bench_lib.markdown_modes import MODE_TABLES

NOT_MEASURED = "*Not measured yet.*"
_SECTION = re.compile(r"(<!-- bench:([a-z_]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

WORDS = {
    "downpour": "**Downpour, shared memory** (the default on one host)",
    "downpour-auto": "Downpour, shared memory, as many threads as the default takes",
    "downpour-2s": "Downpour, shared memory, 2 shards",
    "downpour-copied": "Downpour, shared memory, weights copied (`in_place=false`; several workers)",
    "downpour-ipc": "Downpour, payloads over ipc (`shared_memory=false`)",
    "downpour-tcp": "**Downpour over TCP** (between hosts, `--security none`)",
    "downpour-tcp-2s": "Downpour over TCP, 2 shards",
    "downpour-curve": "Downpour over TCP with CURVE (between hosts, with keys)",
    "gloo-allreduce": "gloo all-reduce of the same bytes, 2 processes",
    "torch-rpc-ps": "torch.distributed.rpc parameter server, as in PyTorch's tutorial",
    "ray-ps": "Ray parameter server",
    "memcpy": "limit: a memory copy",
    "memcpy-x2": "limit: two memory copies",
    "zmq-ipc": "limit: bare ZeroMQ stream over ipc, one way, 1 MB messages",
    "zmq-tcp": "limit: bare ZeroMQ stream over TCP, one way, 1 MB messages",
    "zmq-tcp-echo": "limit: bare ZeroMQ over TCP, there and back, 1 MB messages",
    "sgd-fused": "limit: the SGD step in one process",
    "adam-fused": "limit: the Adam step in one process",
    "plain": "plain script, one process, all cores",
    "plain-fused": "plain script with `Adam(fused=True)`",
    "two-plain": "two plain scripts that do not communicate",
    "ddp-gloo": "DistributedDataParallel over gloo, 2 processes",
    "downpour-1": "**Downpour, 1 worker**",
    "downpour-async-2": "**Downpour, async, 2 workers**",
    "downpour-ahead-2": "Downpour, async with `fetch_ahead`, 2 workers",
    "downpour-async-2-2s": "Downpour, async, 2 workers, 2 shards",
    "downpour-ssp-2": "Downpour, ssp:2, 2 workers",
    "downpour-sync-2": "**Downpour, sync, 2 workers**",
    "downpour-sync-2-2s": "Downpour, sync, 2 workers, 2 shards",
    "downpour-tcp-async-2": "Downpour over TCP, async, 2 workers",
    "downpour-tcp-sync-2": "Downpour over TCP, sync, 2 workers",
}
"""Contenders in words; others go by their names."""
WORKLOADS = {
    "mlp25m-sgd": "MLP of 25 million parameters, SGD",
    "mlp25m-adam": "MLP of 25 million parameters, Adam",
    "digits-adam": "the digits MLP, Adam",
}
SPLIT_MODELS = {"mlp25m": "MLP of 25 million parameters", "transformer": "transformer of 11 million"}
GROUPS = ("ours", "peer", "limit")


def pushpull(document: Document) -> list[str]:
    """Ours first, then peers, then limits; each in the benchmark's own order."""
    results = sorted(document["results"], key=lambda r: GROUPS.index(r["group"]))
    ratios, reference = document["goodput_ratios"], document["reference"]
    rows = []
    for result in results:
        name = result["name"]
        ratio = ratios[name].get(reference)
        rows.append(
            (
                WORDS.get(name, name),
                f"{1e3 * result['median_s']:.1f} ms",
                f"{result['goodput_gb_per_s']:.1f}",
                "" if ratio is None else f"{ratio:.2f}",
            )
        )
    settings = document["settings"]
    note = f"{settings['payload_bytes'] / 1e6:g} MB each way, medians of {settings['runs']} runs. {where(document)}"
    heads = ("", "median", "GB/s", "of the bare ZeroMQ stream")
    return [*table(heads, rows), "", note, *_left_out(document)]


def training(document: Document) -> list[str]:
    """A table per workload."""
    lines: list[str] = []
    for name in sorted(document["sections"], key=_workload_rank):
        section = document["sections"][name]
        rows = []
        for result in section["results"]:
            ratios = section["ratios"][result["name"]]
            rows.append(
                (
                    WORDS.get(result["name"], result["name"]),
                    f"{1e3 * result['step_s']:.{2 if result['step_s'] < 0.01 else 0}f} ms",
                    f"{result['samples_per_s']:.0f}",
                    *(f"{ratios[other]:.2f}" if other in ratios else "" for other in ("plain", "ddp-gloo")),
                )
            )
        workload = section["workload"]
        note = (
            f"{workload['batch']} samples per step and worker; medians of {section['rounds']} turns of "
            f"{workload['steps']} steps. {where(section)}"
        )
        heads = (WORKLOADS.get(name, name), "step", "samples/s", "÷ plain", "÷ DDP")
        lines += [*([""] if lines else []), *table(heads, rows), "", note, *_left_out(section)]
    return lines


def busy(document: Document) -> list[str]:
    """Push, and push and pull, idle and beside a busy thread."""
    rows = []
    for way, row in document["results"].items():
        for what, words in (("push", "push"), ("step", "push and pull")):
            rows.append(
                (
                    f"{'shared memory' if way == 'memory' else way.upper()}, {words}",
                    f"{row[f'{what}_gb_per_s']:.1f}",
                    f"{row[f'busy_{what}_gb_per_s']:.1f}",
                    f"{100 * row[f'{what}_kept']:.0f} %",
                    f"{100 * row[f'loops_kept_beside_{what}']:.0f} %",
                )
            )
    settings = document["settings"]
    note = f"{settings['megabytes']} MB, medians of {settings['runs']} turns. {where(document)}"
    heads = ("", "GB/s alone", "GB/s beside the thread", "kept", "the thread keeps")
    return [*table(heads, rows), "", note, *_left_out(document)]


def memory(document: Document) -> list[str]:
    """Peaks and what was promised, in MB."""
    rows = []
    for row in document["results"]:
        way = "shared memory" if row["way"] == "memory" else row["way"].upper()
        rows.append(
            (
                f"{row['optimizer'].upper() if row['optimizer'] == 'sgd' else row['optimizer'].title()}, {way}",
                f"{row['workers']}, {row['mode']}",
                *(f"{row[key] / 1e6:.0f}" for key in ("plain", "worker", "worker_limit", "shard", "shard_limit")),
            )
        )
    note = f"A model of {document['settings']['model_bytes'] / 1e6:.0f} MB; MB at the peak. {where(document)}"
    heads = ("", "workers", "plain script", "worker", "at most", "shard", "at most")
    return [*table(heads, rows), "", note]


def accuracy(document: Document) -> list[str]:
    """Medians over the seeds."""
    names = {"digits_mlp.py": "MLP, Adam", "digits_cnn.py": "CNN, AdamW"}
    modes = list(next(iter(document.values())))
    rows = [
        (names.get(script, script), *(f"{median(by_mode[mode]):.3f}" for mode in modes))
        for script, by_mode in document.items()
    ]
    seeds = max(len(values) for by_mode in document.values() for values in by_mode.values())
    return [*table(("", *modes), rows), "", f"Medians of {seeds} seeds."]


def recovery(document: Document) -> list[str]:
    """After each kill; then what it costs to be ready for one."""
    models = {"mlp25m": "100 MB of weights, Adam", "digits": "the digits MLP, Adam"}
    killed = {"worker": "a worker", "shard": "a shard", "leader": "a shard's leader, `--replication 2`"}
    rows = []
    for row in document["recoveries"].values():
        steps = row.get("steps_ratio")
        rows.append(
            (
                f"{killed[row['victim']]}, `{row['mode']}`, {models.get(row['model'], row['model'])}",
                f"{row['gap_s']:.2f} s",
                f"{row['max_gap_s']:.2f} s",
                f"{row['trains_s']:.1f} s" if "trains_s" in row else "",
                f"{row['steps_before_s']['p99'] * 1e3:.1f} → {row['steps_during_s']['p99'] * 1e3:.1f} ms"
                if steps
                else "",
                f"{row['lost_pushes'] / row['kills']:.0f}",
            )
        )
    heads = (
        "killed",
        "longest gap",
        "in the worst case",
        "replacement trains after",
        "others' steps, p99",
        "pushes lost",
    )
    what = {"replication": "`--replication 2`", "restarts": "`--restarts 5`"}
    costs = [
        (
            f"{what[row['what']]}, `{row['mode']}`, {models.get(row['model'], row['model'])}",
            *(f"{row[key] * 1e3:.{2 if row[key] < 0.01 else 0}f} ms" for key in ("without_s", "with_s")),
            f"{row['ratio']:.2f}",
        )
        for row in document["costs"].values()
    ]
    lines = [*table(heads, rows), "", *table(("what being ready costs", "a step without", "with", "ratio"), costs)]
    note = f"Two workers, one shard; SIGKILL; medians over the kills, pushes per kill. {where(document)}"
    return [*lines, "", note, *_left_out(document)]


def model_parallel(document: Document) -> list[str]:
    """A table for each section that was measured."""
    shown = {
        "utilisation": _utilisation,
        "memory": _activations,
        "parts": _parts,
        "steps": _split_steps,
        "weights": _differences,
    }
    lines: list[str] = []
    for name, rows_of in shown.items():
        if name in document["sections"]:
            section = document["sections"][name]
            lines += [*([""] if lines else []), *rows_of(section), "", where(section)]
    return lines


def _utilisation(section: Document) -> list[str]:
    by_schedule: dict[str, dict[int, Any]] = {}
    for row in section["rows"]:
        by_schedule.setdefault(row["schedule"], {})[row["microbatches"]] = row
    counts = list(next(iter(by_schedule.values())))
    rows = [
        (
            f"`{schedule}`",
            *(f"{100 * row['utilisation']:.1f} % of {100 * row['theory']:.1f} %" for row in by_count.values()),
        )
        for schedule, by_count in by_schedule.items()
    ]
    return table(("utilisation, measured of at best", *(f"m = {count}" for count in counts)), rows)


def _activations(section: Document) -> list[str]:
    counts = sorted({row["microbatches"] for row in section["rows"]})
    rows = []
    for key, what in (("activations", "kept for backward"), ("peak_memory", "the process at its peak")):
        for schedule in dict.fromkeys(row["schedule"] for row in section["rows"]):
            sizes = {r["microbatches"]: max(r[key]) for r in section["rows"] if r["schedule"] == schedule}
            rows.append((f"{what}, `{schedule}`", *(f"{sizes[count] / 1e6:.1f}" for count in counts)))
    return table(("MB, of the rank with the most", *(f"m = {count}" for count in counts)), rows)


def _parts(section: Document) -> list[str]:
    rows = [
        (
            f"{SPLIT_MODELS[row['model']]}, {row['way']}",
            *(f"{', '.join(_mb(rank[key]) for rank in row['ranks'])}" for key in ("weights", "moved")),
            *(f"{100 * row[f'{key}_share']:.1f} %" for key in ("weights", "moved")),
        )
        for row in section["rows"]
    ]
    heads = ("per rank", "holds, MB", "pushes and pulls, MB", "holds at most, of unsplit", "moves at most, of unsplit")
    return table(heads, rows)


def _split_steps(section: Document) -> list[str]:
    rows = [
        (f"{SPLIT_MODELS[row['model']]}, {row['way']}", f"{1e3 * row['step_s']:.0f} ms", f"{row['ratio']:.2f}")
        for row in section["rows"]
    ]
    reading = (
        "An unsplit worker has all cores for its matrices; ranks share them, and must talk besides. So this is what "
        "splitting costs where it is not needed, not what it brings on devices of their own."
    )
    return [*table(("one replica, the same batch", "step", "÷ unsplit"), rows), "", reading]


def _differences(section: Document) -> list[str]:
    ways = list(dict.fromkeys((row["split"], row["replicas"]) for row in section["rows"]))
    found: dict[str, dict[tuple[str, int], float]] = {}
    for row in section["rows"]:
        found.setdefault(row["model"], {})[row["split"], row["replicas"]] = row["largest_difference"]
    rows = [
        (
            f"{split.replace(' x ', ' × ')}, {replicas} replica{'' if replicas == 1 else 's'}",
            *(f"{by_way[split, replicas]:.1e}" for by_way in found.values()),
        )
        for split, replicas in ways
    ]
    return table(("largest difference of any weight after 20 steps", *found), rows)


def layerwise(document: Document) -> list[str]:
    """A model of three times the budget beside one that is here as a whole."""
    names = {"whole, memory": "all of it", "layers": "`fetch=layers`", "layers, least": "`fetch=layers`, the least"}
    whole = {(r["workers"], r["batch"]): r for r in document["results"] if r["way"] == "whole, memory"}
    rows = []
    for row in document["results"]:
        if row["way"] in names:
            ratio = row["step_s"] / whole[row["workers"], row["batch"]]["step_s"]
            sizes = [_mb(row[key]) if row[key] else "" for key in ("budget", "held", "peak", "moved")]
            words = f"{names[row['way']]}, {row['workers']} × {row['batch']} samples"
            rows.append((words, *sizes, f"{1e3 * row['step_s']:.0f} ms", f"{ratio:.2f}"))
    heads = ("", "budget", "held at most", "the process' peak", "moved per step", "step", "÷ all of it")
    note = f"MB. A model of {_mb(document['settings']['model_bytes'])} MB of weights, SGD, `sync`. {where(document)}"
    return [*table(heads, rows), "", note]


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "pushpull": pushpull,
    "training": training,
    "busy": busy,
    "memory": memory,
    "accuracy": accuracy,
    "recovery": recovery,
    "model_parallel": model_parallel,
    "layerwise": layerwise,
    **MODE_TABLES,
}
"""By the name of the JSON file and of the section in the README or in docs/."""
PICTURES = {"pushpull": "Times to push and pull", "training": "Samples per second"}
"""What ``plots.py`` draws, in words."""


def filled(text: str, documents: Mapping[str, Document]) -> str:
    """``text`` with every ``<!-- bench:NAME -->`` … ``<!-- /bench -->`` holding NAME's table.

    Raises :class:`KeyError` for a section whose name is not known.
    """

    def section(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        make = TABLES[name]
        lines = make(documents[name]) if name in documents else [NOT_MEASURED]
        if name in documents and name in PICTURES:
            lines += ["", f"![{PICTURES[name]}](docs/img/{name}.svg)"]
        return opening + "\n" + "\n".join(lines) + "\n\n" + closing

    return _SECTION.sub(section, text)


def sections(text: str) -> list[str]:
    """Names of the sections in ``text``."""
    return [match[2] for match in _SECTION.finditer(text)]


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def _left_out(document: Document) -> list[str]:
    """Nothing is passed over in silence."""
    names = [*document.get("failed", {}), *document.get("skipped", {})]
    return ["", f"Without a result: {', '.join(sorted(names))}."] if names else []


def _workload_rank(name: str) -> tuple[int, str]:
    known = list(WORKLOADS)
    return (known.index(name) if name in known else len(known)), name
