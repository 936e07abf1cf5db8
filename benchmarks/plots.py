"""Draws the benchmarks' results: one SVG per JSON file, into docs/img/. Needs matplotlib (`pip install -e '.[bench]'`).

`python benchmarks/plots.py`; the same results give the same files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

from bench_lib.markdown import WORDS, WORKLOADS
from bench_lib.markdown_modes import WORKLOADS as MODE_WORKLOADS
from table import RESULTS, ROOT, documents

COLOURS = {"ours": "#1f6fb2", "peer": "#c8553d", "limit": "#9aa3ab"}
SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B"}
KINDS = {"ours": "Downpour", "peer": "others", "limit": "limits"}


def main(arguments: list[str] | None = None) -> int:
    """Draw what there are results of; an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img", help="default: docs/img")
    options = parser.parse_args(arguments)
    try:
        import matplotlib as mpl
    except ImportError:
        print("plots need matplotlib: pip install -e '.[bench]'", file=sys.stderr)
        return 1
    mpl.use("Agg")
    mpl.rcParams.update(
        {"svg.hashsalt": "downpour", "font.size": 9, "axes.spines.right": False, "axes.spines.top": False}
    )
    found = documents(options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    if "pushpull" in found:
        _save(_pushpull(found["pushpull"]), options.out / "pushpull.svg")
    if "training" in found:
        _save(_training(found["training"]), options.out / "training.svg")
    if "modes" in found:
        _save(_modes(found["modes"]), options.out / "modes.svg")
    if "memory" in found.get("model_parallel", {}).get("sections", {}):
        _save(_pipeline_memory(found["model_parallel"]["sections"]["memory"]), options.out / "pipeline_memory.svg")
    return 0


def _pushpull(document: dict[str, Any]) -> Any:
    """Milliseconds of a push and pull, with the range of the runs. Streams one way and single steps are left out."""
    from matplotlib.figure import Figure

    rows = [r for r in document["results"] if r["group"] != "limit" or r["name"] in ("memcpy-x2", "zmq-tcp-echo")]
    rows.sort(key=lambda r: r["median_s"])
    figure = Figure(figsize=(9, 0.9 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    megabytes = document["settings"]["payload_bytes"] / 1e6
    _bars(
        axes, rows, [1e3 * r["median_s"] for r in rows], [(1e3 * r["min_s"], 1e3 * r["max_s"]) for r in rows], "{:.0f}"
    )
    axes.set_title(f"push and pull of {megabytes:g} MB", loc="left", fontsize=9)
    axes.set_xlabel("ms; bar: median, line: all runs")
    axes.invert_yaxis()
    return figure


def _training(document: dict[str, Any]) -> Any:
    """Samples per second, a panel per workload."""
    from matplotlib.figure import Figure

    sections = [document["sections"][name] for name in WORKLOADS if name in document["sections"]]
    heights = [len(section["results"]) for section in sections]
    figure = Figure(figsize=(9, 0.8 * len(sections) + 0.26 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(sections), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, section in zip(panels, sections, strict=True):
        rows = sorted(section["results"], key=lambda r: -r["samples_per_s"])
        batch = section["workload"]["batch"]
        spans = [(r["workers"] * batch / r["max_step_s"], r["workers"] * batch / r["min_step_s"]) for r in rows]
        _bars(axes, rows, [r["samples_per_s"] for r in rows], spans, "{:.0f}")
        axes.set_title(WORKLOADS[section["workload"]["name"]], loc="left", fontsize=9)
        axes.set_xlabel("samples per second; bar: median, line: all turns")
        axes.invert_yaxis()
    return figure


def _modes(document: dict[str, Any]) -> Any:
    """The final loss of each mode relative to one process' median: a dot per seed, a bar at the median."""
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row["workload"] for row in document["results"]))
    ways = [way for way in dict.fromkeys(row["way"] for row in document["results"]) if way != "async n_push=5"]
    figure = Figure(figsize=(9, 0.9 + 0.27 * len(ways)), layout="constrained")
    panels = figure.subplots(1, len(workloads), squeeze=False, sharey=True)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        losses = {
            way: [r["loss"] for r in document["results"] if (r["workload"], r["way"]) == (workload, way)]
            for way in ways
        }
        alone = median(losses["one process"])
        for place, found in enumerate(losses.values()):
            percent = [100 * (loss / alone - 1) for loss in found]
            axes.plot(percent, [place] * len(percent), "o", color=COLOURS["ours"], markersize=4, alpha=0.6)
            axes.plot([median(percent)] * 2, [place - 0.3, place + 0.3], color="#333333")
        axes.axvspan(-2, 2, color=COLOURS["limit"], alpha=0.2)
        axes.set_title(MODE_WORKLOADS[workload], loc="left", fontsize=9)
        axes.set_xlabel("final loss beside one process, %")
        axes.set_yticks(range(len(ways)), ways)
    panels[0].invert_yaxis()
    return figure


def _pipeline_memory(section: dict[str, Any]) -> Any:
    """What a rank keeps for backward by the number of micro-batches, one line per schedule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"activations": "kept for backward, MB", "peak_memory": "the process at its peak, MB"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for (schedule, words), kind in zip(SCHEDULES.items(), ("peer", "ours"), strict=True):
            rows = [row for row in section["rows"] if row["schedule"] == schedule]
            counts, sizes = [row["microbatches"] for row in rows], [max(row[key]) / 1e6 for row in rows]
            axes.plot(counts, sizes, marker="o", color=COLOURS[kind], label=words)
            axes.annotate(f"{sizes[-1]:.3g}", (counts[-1], sizes[-1]), (0, 5), textcoords="offset points", ha="center")
        axes.set_title(f"{title}, of the rank with the most", loc="left", fontsize=9)
        axes.set_xlabel("micro-batches of a step, all of the same size")
        axes.set_xticks(counts)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.12)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _bars(
    axes: Any, rows: list[dict[str, Any]], values: list[float], spans: list[tuple[float, float]], text: str
) -> None:
    from matplotlib.patches import Patch

    places = range(len(rows))
    axes.barh(places, values, color=[COLOURS[row["group"]] for row in rows], height=0.7)
    axes.hlines(places, [low for low, _ in spans], [high for _, high in spans], color="#333333", linewidth=0.8)
    axes.set_yticks(places, [WORDS.get(row["name"], row["name"]).replace("**", "").replace("`", "") for row in rows])
    for place, value, (_, high) in zip(places, values, spans, strict=True):
        axes.annotate(
            text.format(value), (max(value, high), place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.margins(x=0.12)
    kinds = [kind for kind in KINDS if any(row["group"] == kind for row in rows)]
    axes.legend(handles=[Patch(color=COLOURS[kind], label=KINDS[kind]) for kind in kinds], frameon=False, fontsize=8)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    sys.exit(main())
