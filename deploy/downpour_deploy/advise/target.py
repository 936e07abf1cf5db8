"""What a user means by RUN: a folder, or a job of a cluster; and its facts."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from downpour.jobs.client import ClusterClient
from downpour.jobs.download import read
from downpour.jobs.status import job_status
from downpour_common.config import job_spec
from downpour_common.errors import ConfigError
from downpour_common.spans import FILE as SPANS
from downpour_coordinator.summary import SUMMARY
from downpour_deploy import running
from downpour_deploy.advise.facts import Facts, facts_of, measured_last, read_rows
from downpour_deploy.jobs.named import cluster_of
from downpour_deploy.resolve import shares_memory
from downpour_deploy.trace.measure import measure
from downpour_deploy.trace.read import parse

METRICS, DESCRIPTION = "metrics.jsonl", "job.toml"


def found(
    name: str, join: str | None, keys: str | None, security: str | None, timeout_s: float
) -> tuple[Facts, dict[str, Any]]:
    """The facts of ``name``, and the document that they are from. Raises :class:`ConfigError` where there is nothing to
    go by, and what clients raise."""
    if os.path.isdir(name):
        return _of_folder(name)
    if os.path.lexists(name):
        raise ConfigError(f"{name}: is a file; give the run directory that {METRICS} lies in")
    with cluster_of(name, join, keys, security, timeout_s) as client:
        return _of_job(client, name)


def _of_folder(folder: str) -> tuple[Facts, dict[str, Any]]:
    try:
        with open(os.path.join(folder, DESCRIPTION), "rb") as toml:
            described = tomllib.load(toml)
    except FileNotFoundError:
        raise ConfigError(f"{folder}: has no {DESCRIPTION}; give the directory of a run") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{folder}/{DESCRIPTION}: {error}") from None
    lines = _lines(os.path.join(folder, METRICS))
    rows = read_rows(lines)
    goes_on = running.read(folder) is not None
    document = measured_last(rows) if goes_on else _summary(folder) or measured_last(rows)
    if not document:
        raise ConfigError(_nothing(folder))
    shares = _shares(_lines(os.path.join(folder, SPANS)), folder)
    spec = job_spec(**described)
    state = "RUNNING" if goes_on else ""
    return facts_of(spec, document, rows, shares, state, sent=not shares_memory(spec)), document


def _of_job(client: ClusterClient, name: str) -> tuple[Facts, dict[str, Any]]:
    described = client.describe(name)
    status = job_status(described)
    sizes = dict(client.files(status.id))

    def lines(path: str) -> Iterable[bytes]:
        return b"".join(read(client, status.id, path, sizes[path])).splitlines() if path in sizes else ()

    rows = read_rows(lines(METRICS))
    result = described.get("result") or described.get("so_far")
    document = {**measured_last(rows), **_known(described), **(_known(result) if isinstance(result, dict) else {})}
    if not document.get("throughput"):
        raise ConfigError(_nothing(f"job {status.id}"))
    document["job"], document["state"] = status.id, status.state
    spec = job_spec(**described["spec"])
    hosts = {process.get("node") for process in described.get("processes") or []}
    sent = len(hosts) > 1 or not shares_memory(spec)
    return facts_of(spec, document, rows, _shares(lines(SPANS), status.id), sent=sent), document


def _known(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if value is not None}


def _nothing(place: str) -> str:
    return f"{place}: nothing was measured there yet; the first figures come 10 s after the first step, or at the end"


def _summary(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, SUMMARY), encoding="utf-8") as file:
            document = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readlines()
    except FileNotFoundError:
        return []


def _shares(lines: Iterable[str | bytes], place: str) -> dict[str, float] | None:
    """Of a traced job: shares of time by span, on average over its workers."""
    try:
        ranks = measure(parse(lines, place)).ranks
    except ConfigError:
        return None  # not traced, or nothing in it
    totals: dict[str, float] = {}
    for rank in ranks:
        for name, share in rank.shares.items():
            totals[name] = totals.get(name, 0.0) + share / len(ranks)
    return totals
