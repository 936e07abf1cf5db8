"""A job as its user describes it, validated once, frozen after. All problems are reported together."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from downpour_common.errors import ConfigError
from downpour_common.modes import Mode, parse_mode

JobName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]


class Settings(BaseModel):
    """What ``--set key=value`` sets. Sizes in bytes, times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    chunk_bytes: int = Field(1 << 20, ge=1024, le=64 << 20, description="largest chunk, the unit of transfer")
    window_bytes: int = Field(16 << 20, ge=1 << 16, description="unacknowledged bytes per worker and shard")
    n_push: int = Field(1, ge=1, description="async: steps between pushes of the accrued gradient")
    n_fetch: int = Field(1, ge=1, description="async: steps between fetches of the weights")
    buffers: Literal["average", "chief", "local"] = Field(
        "average", description="whose BatchNorm statistics count: the workers' mean, worker 0's, each its own"
    )
    transport: Literal["ipc", "tcp"] = Field("ipc", description="ipc: private sockets; tcp: loopback")
    shared_memory: bool = Field(True, description="ipc: gradients and weights in shared memory where possible")
    port: int = Field(0, ge=0, le=65535, description="tcp: the coordinator's port, 0 for a free one")
    timeout_s: float = Field(600.0, gt=0, description="deadline of a push, pull, round or barrier")
    start_timeout_s: float = Field(300.0, gt=0, description="deadline for all processes to have joined")
    checkpoint_s: float = Field(60.0, ge=0, description="time between checkpoints; 0: only the last one")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept in the run directory")
    grace_s: float = Field(5.0, ge=0, description="time between SIGTERM and SIGKILL for a script that is stopped")


class JobSpec(BaseModel):
    """One training run: a script, its arguments, its counts of workers and shards, its mode."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: JobName
    script: str
    args: tuple[str, ...] = ()
    workers: int = Field(ge=1, le=4096)
    shards: int = Field(ge=1, le=4096)
    mode: str = "async"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(ge=1, description="OMP_NUM_THREADS of each process")
    seed: int = Field(0, ge=0, lt=1 << 63)
    out: str
    resume: str | None = None
    settings: Settings = Settings()

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, text: str) -> str:
        try:
            return str(parse_mode(text))
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("mode: ")) from None

    @property
    def parsed_mode(self) -> Mode:
        """``mode``, parsed."""
        return parse_mode(self.mode)


def job_spec(**fields: Any) -> JobSpec:
    """Make a :class:`JobSpec`; raises :class:`ConfigError` with every problem, each with its path."""
    try:
        spec = JobSpec(**fields)
    except ValidationError as error:
        raise ConfigError(*_problems(error)) from None
    settings, problems = spec.settings, []
    if spec.parsed_mode.name != "async" and (settings.n_push, settings.n_fetch) != (1, 1):
        problems.append(f"settings: n_push and n_fetch belong to mode async; mode {spec.mode} exchanges every step")
    if settings.port and settings.transport != "tcp":
        problems.append("settings.port: only for transport=tcp; add --set transport=tcp")
    if problems:
        raise ConfigError(*problems)
    return spec


def parse_settings(assignments: Iterable[str]) -> dict[str, str]:
    """``["n_push=5", …]`` → dict of strings; raises :class:`ConfigError` for what is not ``key=value`` or unknown."""
    values: dict[str, str] = {}
    problems = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append(f"--set {text}: expected key=value")
        elif key not in Settings.model_fields:
            near = difflib.get_close_matches(key, Settings.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(Settings.model_fields)}"
            problems.append(f"--set {key}: no such setting{hint}")
        else:
            values[key] = value
    if problems:
        raise ConfigError(*problems)
    return values


def _problems(error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{path}: {message} (found {item['input']!r})")
    return lines


def to_toml(spec: JobSpec) -> str:
    """The resolved job as TOML. Bytes of arguments that are not UTF-8 become U+FFFD."""
    top = spec.model_dump(exclude={"settings"}, exclude_none=True)
    return _table(top) + "\n[settings]\n" + _table(spec.settings.model_dump())


def _table(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_value(value: Any) -> str:
    """JSON's numbers, booleans, arrays and (but for DEL) strings are TOML's as well."""
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
