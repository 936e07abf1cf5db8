"""Documents of the coordinator as text for people. Pure functions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from downpour.jobs.status import JobStatus, job_status
from downpour_common.messages import Document
from downpour_common.sizes import format_bytes
from downpour_coordinator.losses import late_in_words
from downpour_deploy.figures import measure_rows


def clean(text: object) -> str:
    """Without control characters: what comes from elsewhere must not steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def columns(rows: Iterable[Sequence[object]], gap: str = "  ") -> list[str]:
    """Rows as lines with aligned columns; nothing is cut, so that it can be searched."""
    table = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def count(number: int, noun: str) -> str:
    """``1 worker``, ``2 workers``"""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """``41 s``, ``12:05``, ``3:00:12``"""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def jobs_table(documents: Sequence[Document]) -> list[str]:
    """``downpour list``"""
    if not documents:
        return ["no jobs; `downpour submit SCRIPT` starts one"]
    rows: list[Sequence[object]] = [("JOB", "STATE", "WORKERS", "SHARDS", "MODE", "STEP", "AGE", "USER", "")]
    for document in documents:
        job = job_status(document)
        rows.append(
            (
                job.id,
                job.state,
                f"{job.workers}/{job.workers_wanted}",
                job.shards,
                job.mode,
                job.clock,
                duration(job.elapsed_s),
                str(document.get("user", "")).removeprefix("user/"),
                _remark(job),
            )
        )
    return columns(rows)


def _remark(job: JobStatus) -> str:
    if job.state == "RUNNING":
        figures = [f"{name} {value:.4g}" for name, value in list(job.metrics.items())[:2] if value is not None]
        return "  ".join(([f"DEGRADED: {job.degraded}"] if job.degraded else []) + figures)
    if job.failure is not None:
        return f"{job.failure.who}: {job.failure.message}"
    return job.message if job.ended else job.line()


def nodes_table(document: Document) -> list[str]:
    """``downpour nodes``"""
    nodes = document.get("nodes") or []
    facts = document.get("coordinator") or {}
    lines = []
    if facts.get("security") == "none":
        lines += ["the coordinator runs WITHOUT KEYS: whoever reaches it can run code on these hosts", ""]
    if not nodes:
        return [*lines, "no nodes; `downpour server start` and `downpour worker start` add hosts"]
    rows: list[Sequence[object]] = [("NODE", "ROLE", "STATE", "HOST", "CORES", "GPUS", "MEMORY", "USED", "SEEN", "")]
    for node in nodes:
        slots, used = int(node.get("slots") or 0), int(node.get("used") or 0)
        memory, memory_used = int(node.get("memory_bytes") or 0), int(node.get("memory_used") or 0)
        amount = f"{format_bytes(memory_used)} of {format_bytes(memory)}" if memory_used else format_bytes(memory)
        rows.append(
            (
                node.get("node", ""),
                node.get("role", ""),
                node.get("state", ""),
                node.get("address") or node.get("host", ""),
                node.get("cores", ""),
                node.get("gpus", ""),
                amount,
                f"{used}/{slots}" if slots else used,
                f"{duration(float(node.get('last_seen_s') or 0))} ago",
                _node_remark(node),
            )
        )
    return lines + columns(rows)


def _node_remark(node: Mapping[str, Any]) -> str:
    per_job: dict[str, list[str]] = {}
    for process in node.get("processes") or []:
        per_job.setdefault(str(process.get("job")), []).append(
            str(process.get("name") or f"{process.get('role')}/{process.get('index')}")
        )
    labels = [f"{key}={value}" for key, value in (node.get("labels") or {}).items()]
    parts = [str(node.get("message") or ""), " ".join(labels)]
    return "; ".join([p for p in parts if p] + [f"{job}: {', '.join(names)}" for job, names in per_job.items()])


def _checkpointing(document: Mapping[str, Any]) -> str:
    """``every 65 s (auto: one costs 0.15 s, a failure every 4:00:00), the last 12 s ago``, and where copies are."""
    interval_s, cost_s, age_s = (document.get(name) for name in ("interval_s", "cost_s", "age_s"))
    text = f"every {interval_s:.3g} s" if interval_s else "only at the end"
    if document.get("auto"):
        price = "not known yet" if cost_s is None else f"{cost_s:.2g} s"
        text += f" (auto: one costs {price}, a failure every {duration(float(document.get('mtbf_s') or 0))})"
    if isinstance(age_s, (int, float)):
        text += f", the last {duration(age_s)} ago"
    if document.get("url"):
        text += f"; copies at {document['url']}, the last {document.get('copied') or 'not yet'}"
    return text


def job_details(status: JobStatus) -> list[str]:
    """``downpour status``"""
    document = status.document
    workers = document.get("workers") or {}
    fewest = workers.get("min")
    rows: list[Sequence[object]] = [("job", f"{status.id}  {status.state}")]
    if status.ended:
        if status.message:
            rows.append(("", status.message))
    else:
        rows.append(("now", status.line()))
    least = f", at least {fewest}" if fewest is not None and fewest != status.workers_wanted else ""
    ranks = document.get("ranks") or 1
    replicas = f", in {count(status.workers_wanted // ranks, 'replica')} of {ranks}" if ranks > 1 else ""
    rows.append(("workers", f"{status.workers} of {status.workers_wanted}{least}{replicas}"))
    backups = ", each with a backup" if document.get("replication") == 2 else ""
    rows.append(("shards", f"{status.shards}{backups}"))
    rows.append(("mode", status.mode))
    if document.get("restarts_limit") or status.restarts:
        rows.append(("restarts", f"{status.restarts} of {document.get('restarts_limit', 0)}"))
    if document.get("lost_pushes"):
        rows.append(("lost", f"{document['lost_pushes']:,} of the pushes, with shards that died"))
    rows += _late(document)
    rows.append(("user", str(document.get("user", "")).removeprefix("user/")))
    for name in ("submitted", "started", "ended"):
        moment = document.get(f"{name}_s")
        if isinstance(moment, (int, float)):
            rows.append((name, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))))
    rows.append(("time", duration(status.elapsed_s)))
    rows += [(name, "-" if value is None else f"{value:.5g}") for name, value in status.metrics.items()]
    rows += measure_rows(document, by_worker=True)
    if document.get("checkpoints"):
        rows.append(("checkpoints", ", ".join(map(str, document["checkpoints"]))))
    if document.get("checkpointing") and not status.ended:
        rows.append(("", _checkpointing(document["checkpointing"])))
    rows += [("warning", text) for text in status.warnings]
    if status.degraded:
        rows.append(("DEGRADED", status.degraded))
    lines = columns(rows)
    processes = document.get("processes") or []
    if processes:
        table: list[Sequence[object]] = [("PROCESS", "NODE", "STATE", "PID", "EXIT", "STARTED AGAIN")]
        for process in sorted(processes, key=lambda p: (str(p.get("role")), int(p.get("index") or 0))):
            table.append(
                (
                    process.get("name") or f"{process.get('role')}/{process.get('index')}",
                    process.get("node") or "-",
                    ", ".join(str(process[name]) for name in ("state", "part") if process.get(name)),
                    process.get("pid") or "-",
                    "-" if process.get("exit_code") is None else process["exit_code"],
                    process.get("epoch") or "-",
                )
            )
        lines += ["", *columns(table)]
    return lines


def failure_lines(status: JobStatus) -> list[str]:
    """Who failed first, where, with what; the first line is the verdict, the others are details."""
    failure = status.failure
    if failure is None:
        return [f"job {clean(status.id)} failed: {clean(status.message or 'no reason given')}"]
    where = f" on {clean(failure.host)}" if failure.host else ""
    code = "" if failure.exit_code is None else f" (exit code {failure.exit_code})"
    return [f"{failure.who}{where} failed: {clean(failure.message)}{code}", *map(clean, failure.details.splitlines())]


def closing_lines(status: JobStatus) -> list[str]:
    """The report on a job that has ended."""
    result = status.document.get("result")
    result = result if isinstance(result, dict) else {}
    rows: list[Sequence[object]] = [("job", f"{status.id}  {status.state}")]
    if status.message and not status.failure:
        rows.append(("", status.message))
    metrics = job_status({"metrics": result.get("metrics")}).metrics or status.metrics
    rows += [(k.replace("_", " "), "-" if v is None else f"{v:.5g} (last logged)") for k, v in metrics.items()]
    if result.get("steps"):
        rows.append(("steps", f"{result['steps']:,} per worker at most, {result.get('samples', 0):,} samples"))
        rate = f"{result.get('samples_per_s', 0):,.0f} samples/s over {result.get('train_s', 0):.1f} s"
        rows.append(("throughput", f"{rate}, {result.get('wait_share', 0):.0%} of it waiting"))
    rows += measure_rows(result)
    if status.restarts:
        rows.append(("restarts", status.restarts))
    if result.get("lost_pushes"):
        rows.append(("lost", f"{result['lost_pushes']:,} of the pushes, with shards that died"))
    rows += _late(result)
    rows.append(("time", duration(status.elapsed_s)))
    if status.model:
        rows.append(("weights", f"downpour get {status.id} -o FOLDER"))
    return columns(rows)


def _late(document: Document) -> list[Sequence[object]]:
    late = document.get("late")
    return [("late", late_in_words(late))] if isinstance(late, dict) and late else []


def dry_run_lines(local: Document) -> list[str]:
    """What would be sent."""
    bundle = local["bundle"]
    files = bundle["files"]
    lines = [f"folder  {clean(local['folder'])}: {count(len(files), 'file')}, {format_bytes(bundle['bytes'])}"]
    lines += [f"  {line}" for line in columns([(format_bytes(size), path) for path, size in files])] if files else []
    return lines


def placement_lines(answer: Document) -> list[str]:
    """Where the processes would run."""
    lines = [clean(answer.get("message") or ("fits now" if answer.get("fits") else "would wait"))]
    per_node: dict[str, list[str]] = {}
    for process in answer.get("placement") or []:
        per_node.setdefault(str(process.get("node")), []).append(f"{process.get('role')}/{process.get('index')}")
    rows = [(node, ", ".join(names)) for node, names in per_node.items()]
    return lines + ([f"  {line}" for line in columns(rows)] if rows else [])
