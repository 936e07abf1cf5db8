"""A job as its user describes it, validated once, frozen after. All problems are reported together."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from downpour_common.compensation import parse_compensation
from downpour_common.compression import Compression, parse_compression
from downpour_common.errors import ConfigError
from downpour_common.modes import Mode, parse_mode
from downpour_common.modifiers import problems_of
from downpour_common.optimizers import parse_user_rule
from downpour_common.replicas import Schedule, multiple_of_ranks
from downpour_common.sizes import parse_bytes
from downpour_common.targets import parse_target

# ---------------------------------------------------------------- kinds of values


def _matching(pattern: str, rule: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(rule)
        return text

    return AfterValidator(check)


def _bytes_from_text(value: object) -> object:
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _interval(value: object) -> object:
    if value == "auto":
        return value
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError("auto, or seconds, 0 or more")
    return seconds


def _widths(value: object) -> object:
    """One number, or a text such as ``1,2``, as the list that it means."""
    if isinstance(value, str):
        return value.split(",")
    return [value] if isinstance(value, int) else value


def _copies_url(text: str) -> str:
    scheme, found, path = text.partition("://")
    if text and not (found and re.fullmatch("[a-z][a-z0-9+.-]*", scheme)):
        raise ValueError("expected a URL such as s3://bucket/folder or file:///folder")
    if "::" in text or "\0" in text or ".." in path.split("/"):
        raise ValueError("a URL here has no '::' and no '..'")
    return text.rstrip("/") if path.strip("/") else text


def _variable(name: str) -> str:
    if name.startswith("DOWNPOUR_"):
        raise ValueError("names that begin with DOWNPOUR_ are kept for Downpour's own variables")
    return name


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("may not hold a NUL character")
    return text


_NAME = r"[a-z0-9][a-z0-9-]{0,63}"
_NAME_RULE = "1 to 64 of a-z, 0-9 and -, not beginning with -"
JobName = Annotated[str, _matching(_NAME, _NAME_RULE)]
LabelName = Annotated[str, _matching(_NAME, f"a label's name has {_NAME_RULE}")]
LabelValue = Annotated[
    str, _matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "a label's value has 1 to 64 of A-Z, a-z, 0-9, ., _ and -")
]
Interval = Annotated[float | Literal["auto"], BeforeValidator(_interval)]
"""Seconds, or ``auto``."""
CopiesUrl = Annotated[str, AfterValidator(_copies_url)]
EnvName = Annotated[
    str,
    _matching(r"[A-Za-z_][A-Za-z0-9_]*", "a variable's name has A-Z, a-z, _ and, but for the first, 0-9"),
    AfterValidator(_variable),
]
EnvValue = Annotated[str, AfterValidator(_without_nul)]
ByteCount = Annotated[int, BeforeValidator(_bytes_from_text)]
"""Bytes as a number, or as a text such as ``512MiB``."""
Labels = dict[LabelName, LabelValue]
Widths = Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], BeforeValidator(_widths), Field(min_length=1)]
"""Ranks per stage of a pipeline; one number stands for all stages."""


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        if type(value) is bool and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true or false makes no sense here")
        return value


# ---------------------------------------------------------------- a job


LEAST_CHUNK_BYTES = 1024
SENT_CHUNK_BYTES = 2 << 20
"""Where payloads are sent: smaller ones cost more per message, larger ones more per byte."""
SHARED_CHUNK_BYTES = 4 << 20
"""Where only headers are sent: the fewer the better, as long as several chunks fit into a processor's caches."""


class Settings(_Description):
    """What ``--set key=value`` sets. Sizes in bytes, times in seconds."""

    chunk_bytes: ByteCount = Field(
        0, ge=0, le=64 << 20, description="largest chunk, the unit of transfer; 0: 4 MiB in shared memory, else 2 MiB"
    )
    window_bytes: ByteCount = Field(16 << 20, ge=1 << 16, description="unacknowledged bytes per worker and shard")
    n_push: int = Field(1, ge=1, description="async: steps between pushes of the accrued gradient")
    n_fetch: int = Field(1, ge=1, description="async: steps between fetches of the weights")
    buffers: Literal["average", "chief", "local"] = Field(
        "average", description="whose BatchNorm statistics count: the workers' mean, worker 0's, each its own"
    )
    transport: Literal["ipc", "tcp"] = Field("ipc", description="ipc: private sockets; tcp: loopback")
    shared_memory: bool = Field(True, description="ipc: gradients and weights in shared memory where possible")
    overlap: Literal["auto", "off"] = Field(
        "auto", description="auto: gradients that are sent leave while backward computes others"
    )
    push_dtype: Literal["same", "bfloat16"] = Field(
        "same", description="bfloat16: fp32 gradients are rounded to it and sent, at half the size; weights stay fp32"
    )
    fetch_ahead: bool = Field(
        False,
        description="async: the answer to a push is fetched while the next step computes, on weights one step older",
    )
    fetch: Literal["whole", "layers"] = Field(
        "whole",
        description="layers: weights come layer by layer before they are used and go after, gradients leave during "
        "backward, so that a model may be larger than a worker's memory",
    )
    memory: ByteCount = Field(
        0,
        ge=0,
        description="fetch=layers: bytes of weights and gradients that a worker holds at most; 0: chosen. A pipeline: "
        "bytes of weights, gradients and activations of a batch that the automatic cut gives a rank at most",
    )
    in_place: bool = Field(True, description="with one worker and shared memory: train on the servers' own weights")
    port: int = Field(0, ge=0, le=65535, description="tcp: the coordinator's port, 0 for a free one")
    timeout_s: float = Field(600.0, gt=0, description="deadline of a push, pull, round or barrier")
    start_timeout_s: float = Field(300.0, gt=0, description="deadline for all processes to have joined")
    checkpoint_s: Interval = Field(
        "auto",
        description="time between checkpoints; 0: only the last one; auto: by what they cost and mtbf_s, 10 to 600",
    )
    mtbf_s: float = Field(
        14400.0, gt=0, description="checkpoint_s=auto: assumed time between failures; those of the job shorten it"
    )
    checkpoint_url: CopiesUrl = Field(
        "", description="where committed checkpoints are copied to as well, any URL that fsspec knows; empty: nowhere"
    )
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept in the run directory")
    on_nan: Literal["fail", "skip", "quarantine", "rollback"] = Field(
        "fail",
        description="a gradient with NaN or Inf: the script fails; it is left out; its worker leaves the job as well; "
        "the job begins again from its last checkpoint",
    )
    autocast: Literal["off", "bfloat16", "float16"] = Field(
        "off",
        description="the model computes in this where torch.autocast finds it safe; weights and gradients stay fp32",
    )
    activation_checkpointing: bool = Field(
        False, description="repeated blocks of the model keep only their input, and compute again for backward"
    )
    compensation: str = Field(
        "off",
        description="asynchronous modes: what is done about staleness: stale-lr, dc:0.04, dc-adaptive:2, gap; see docs",
    )
    warm_start: int = Field(
        0, ge=0, description="asynchronous modes: steps that worker 0 takes alone before the others begin"
    )
    clip: float = Field(
        0.0, ge=0, description="largest norm of a worker's gradient, which is scaled down to it; 0: any"
    )
    inject_staleness: int = Field(
        0, ge=0, le=1024, description="for experiments: steps that each gradient is held back before it is pushed"
    )
    grace_s: float = Field(5.0, ge=0, description="time between SIGTERM and SIGKILL for a script that is stopped")

    @field_validator("compensation")
    @classmethod
    def _known_compensation(cls, text: str) -> str:
        try:
            return str(parse_compensation(text))
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("compensation: ")) from None

    @field_validator("chunk_bytes")
    @classmethod
    def _chunks_are_worth_it(cls, value: int) -> int:
        if 0 < value < LEAST_CHUNK_BYTES:
            raise ValueError(f"0 (chosen) or at least {LEAST_CHUNK_BYTES}")
        return value


class JobSpec(_Description):
    """One training run: a script, its arguments, its counts of workers and shards, its mode.

    Paths are as given. In a job that has been submitted ``script`` is relative to ``folder``, and ``folder`` is ``.``.
    """

    name: JobName
    script: str = Field(min_length=1)
    args: tuple[str, ...] = ()
    folder: str = Field("", description="what travels to a cluster; empty: the script's folder")
    workers: int = Field(ge=1, le=4096)
    min_workers: int | None = Field(None, ge=1, le=4096, description="fewest to go on with; none: all of them")
    shards: int = Field(ge=1, le=4096)
    tensor: Widths = Field((1,), description="workers that share each stage's layers; one number, or one per stage")
    pipeline: int = Field(1, ge=1, le=4096, description="stages of the pipeline that a replica of the model is")
    schedule: Schedule = "1f1b"
    microbatches: int = Field(0, ge=0, le=65536, description="parts of a batch; 0: twice the stages, 1 without any")
    interleave: int = Field(2, ge=2, le=64, description="schedule interleaved: stages of each rank")
    mode: str = "async"
    rule: str = Field("", description="update rule of the job's own, module:Class; empty: the optimizer's")
    compress: str = Field("", description="codecs of what travels, push=CODEC,pull=CODEC; empty: none")
    target: str = Field("", description="a logged value to reach: loss=0.1 at most, accuracy=+0.9 at least")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0, le=4096, description="OMP_NUM_THREADS of each process; 0: chosen on its host")
    shard_memory: ByteCount = Field(256 << 20, ge=1, lt=1 << 63, description="bytes that a shard needs, for placement")
    seed: int = Field(0, ge=0, lt=1 << 63)
    restarts: int = Field(0, ge=0, le=1_000_000, description="how often what is lost is started again")
    replication: int = Field(
        1, ge=1, le=2, description="2: each shard has a backup that knows all that is acknowledged"
    )
    trace: bool = Field(False, description="record what each worker does when, for downpour trace and report")
    out: str = Field("", description="run directory; empty, in a cluster: the coordinator's own place for the job")
    resume: str | None = None
    settings: Settings = Settings()
    env: dict[EnvName, EnvValue] = Field({}, description="variables of the job's processes")
    worker_labels: Labels = Field({}, description="what a node must have to run workers")
    server_labels: Labels = Field({}, description="what a node must have to run shards")

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, text: str) -> str:
        try:
            return str(parse_mode(text))
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("mode: ")) from None

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, text: str) -> str:
        try:
            return str(parse_user_rule(text)) if text else text
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("rule: ")) from None

    @field_validator("target")
    @classmethod
    def _known_target(cls, text: str) -> str:
        try:
            return str(parse_target(text)) if text else text
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("target: ")) from None

    @field_validator("compress")
    @classmethod
    def _known_codecs(cls, text: str) -> str:
        try:
            return str(parse_compression(text))
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("compress: ")) from None

    @property
    def compression(self) -> Compression:
        """``compress``, parsed."""
        return parse_compression(self.compress)

    @property
    def parsed_mode(self) -> Mode:
        """``mode``, parsed."""
        return parse_mode(self.mode)

    @property
    def widths(self) -> tuple[int, ...]:
        """Ranks of each stage of a replica, the first stage first."""
        return self.tensor * self.pipeline if len(self.tensor) == 1 else self.tensor

    @property
    def ranks(self) -> int:
        """Workers that are one replica of the model together."""
        return sum(self.widths)

    @property
    def replicas(self) -> int:
        """Replicas of the model, which the servers keep together."""
        return self.workers // self.ranks

    @property
    def fewest_workers(self) -> int:
        """``min_workers``, or all."""
        return self.workers if self.min_workers is None else self.min_workers

    def with_chunks(self, shared: bool) -> JobSpec:
        """With ``chunk_bytes`` chosen where it is left open. ``shared``: gradients and weights will lie in shared
        memory."""
        if self.settings.chunk_bytes:
            return self
        chosen = SHARED_CHUNK_BYTES if shared else SENT_CHUNK_BYTES
        return self.model_copy(update={"settings": self.settings.model_copy(update={"chunk_bytes": chosen})})


TABLES = ("settings", "env", "worker_labels", "server_labels")
"""The fields that are tables of their own in a job file."""


def job_spec(**fields: Any) -> JobSpec:
    """Make a :class:`JobSpec`; raises :class:`ConfigError` with every problem, each with its path."""
    try:
        spec = JobSpec(**fields)
    except ValidationError as error:
        raise ConfigError(*describe(error)) from None
    settings, problems = spec.settings, []
    problems += _of_layers(spec)
    problems += problems_of(spec)
    if spec.rule and (spec.parsed_mode.local or spec.parsed_mode.name == "lbfgs"):
        problems.append(f"rule: in mode {spec.mode} the servers run the mode's own; the script's optimizer may be any")
    if settings.fetch_ahead and (spec.mode, settings.n_push, settings.n_fetch) != ("async", 1, 1):
        problems.append("settings: fetch_ahead belongs to mode async with n_push=1 and n_fetch=1")
    if spec.mode != "async" and (settings.n_push, settings.n_fetch) != (1, 1):
        when = "when it says itself" if spec.parsed_mode.local else "every step"
        problems.append(f"settings: n_push and n_fetch belong to mode async; mode {spec.mode} exchanges {when}")
    if settings.port and settings.transport != "tcp":
        problems.append("settings.port: only for transport=tcp; add --set transport=tcp")
    if spec.fewest_workers > spec.workers:
        problems.append(f"min_workers: at most workers, which is {spec.workers} (found {spec.min_workers})")
    problems += _of_replicas(spec)
    problems += _of_codecs(spec)
    problems += _of_rounds(spec)
    problems += _of_local_steps(spec)
    problems += _of_lbfgs(spec)
    if problems:
        raise ConfigError(*problems)
    return spec


def _of_layers(spec: JobSpec) -> list[str]:
    """What is wrong with fetching layer by layer."""
    settings = spec.settings
    if settings.fetch == "whole":
        alone = settings.memory and spec.pipeline == 1
        return ["settings.memory: belongs to fetch=layers, or to a pipeline; add --set fetch=layers"] if alone else []
    apart = {
        "n_push and n_fetch": (settings.n_push, settings.n_fetch) != (1, 1),
        "fetch_ahead": settings.fetch_ahead,
        "autocast": settings.autocast != "off",
        "tensor and pipeline": spec.ranks > 1,
    }
    return [f"settings.fetch: layers goes without {what}; leave one out" for what, given in apart.items() if given]


def _of_rounds(spec: JobSpec) -> list[str]:
    """What is wrong with rounds that do without the slowest."""
    problems = []
    for mode in (spec.parsed_mode, *dict(spec.parsed_mode.groups).values()):
        if mode.backup and mode.backup >= spec.replicas:
            problems.append(
                f"mode: of {spec.replicas} replica(s), {mode} would leave nobody in a round; "
                f"backup must be below the number of replicas"
            )
    return problems


def _of_local_steps(spec: JobSpec) -> list[str]:
    """What is wrong with local steps between exchanges of weights."""
    mode, settings = spec.parsed_mode, spec.settings
    if not mode.local:
        return []
    problems = []
    if settings.fetch == "layers":
        problems.append(f"settings.fetch: layers keeps no weights between steps, which mode {mode} trains on")
    if mode.name == "easgd" and spec.ranks > 1:
        problems.append(f"mode: {mode} is for replicas of one worker each; with --tensor and --pipeline use average")
    if mode.name == "diloco" and mode.option("fragments") > mode.every:
        problems.append(f"mode: fragments are exchanged at different steps, so at most {mode.every} (found {mode})")
    return problems


def _of_codecs(spec: JobSpec) -> list[str]:
    """What is wrong with codecs of what travels."""
    compression, settings = spec.compression, spec.settings
    if not compression:
        return []
    problems = []
    if compression.push is not None and settings.push_dtype != "same":
        problems.append(
            f"compress: push={compression.push} and push_dtype={settings.push_dtype} both say how gradients travel; "
            "leave one out"
        )
    if settings.fetch == "layers":
        problems.append("compress: goes without fetch=layers, which keeps nothing between steps; leave one out")
    return problems


def _of_lbfgs(spec: JobSpec) -> list[str]:
    """What is wrong with L-BFGS over all data."""
    if spec.parsed_mode.name != "lbfgs":
        return []
    settings = spec.settings
    apart = {
        "tensor and pipeline": spec.ranks > 1,
        "replication, because the vectors of L-BFGS have no backup": spec.replication > 1,
        "compress": bool(spec.compress),
        "push_dtype": settings.push_dtype != "same",
        "fetch=layers": settings.fetch == "layers",
        "autocast, whose rounding hides what a line search looks for": settings.autocast != "off",
    }
    return [f"mode: lbfgs goes without {what}; leave one out" for what, given in apart.items() if given]


def _of_replicas(spec: JobSpec) -> list[str]:
    """What is wrong with replicas that are groups of workers."""
    problems = []
    if len(spec.tensor) not in (1, spec.pipeline):
        problems.append(
            f"tensor: one number, or one for each of the {spec.pipeline} stage(s) of the pipeline (found "
            f"{len(spec.tensor)}); --pipeline {len(spec.tensor)} makes as many stages"
        )
    elif spec.ranks > 1:
        problems += [
            f"{name}: a replica has {spec.ranks} workers, so give a multiple of {spec.ranks}, such as "
            f"{multiple_of_ranks(count, spec.ranks)} (found {count})"
            for name, count in (("workers", spec.workers), ("min_workers", spec.fewest_workers))
            if count % spec.ranks and not (name == "min_workers" and spec.min_workers is None)
        ]
        if spec.settings.fetch_ahead:
            problems.append("settings: fetch_ahead belongs to replicas of one worker each, without tensor and pipeline")
    if spec.pipeline == 1 and spec.schedule != "1f1b":
        problems.append(f"schedule: {spec.schedule} needs a pipeline of 2 stages or more; add --pipeline 2")
    if spec.schedule != "interleaved" and spec.interleave != 2:
        problems.append(f"interleave: belongs to schedule interleaved (found {spec.schedule})")
    return problems


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


def parse_env(assignments: Iterable[str]) -> dict[str, str]:
    """``["NAME=value", …]`` of ``--env`` → dict; raises :class:`ConfigError`. The names are checked with the job."""
    return _pairs("--env", assignments)


def parse_labels(option: str, assignments: Iterable[str]) -> dict[str, str]:
    """``["gpu=a100", …]`` of ``option`` → labels; raises :class:`ConfigError` that names the option."""
    values = _pairs(option, assignments)
    try:
        return _LABELS.validate_python(values)
    except ValidationError as error:
        raise ConfigError(*(f"{option} {line}" for line in describe(error))) from None


_LABELS = TypeAdapter(Labels)


def _pairs(option: str, assignments: Iterable[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    problems = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            problems.append(f"{option} {text}: expected name=value")
        elif values.setdefault(key, value) != value:
            problems.append(f"{option} {key}: given twice, with different values")
    if problems:
        raise ConfigError(*problems)
    return values


def describe(error: ValidationError, absent_too: bool = True) -> list[str]:
    """Every problem in words, each with its path; those of fields that are absent only with ``absent_too``."""
    return [_in_words(item) for item in error.errors() if absent_too or item["type"] != "missing"]


def _in_words(item: ErrorDetails) -> str:
    path = [str(part) for part in item["loc"] if part != "[key]"]
    where = ".".join(path)
    match item["type"]:
        case "missing":
            return f"{where}: is missing"
        case "extra_forbidden":
            return f"{where}: {_unknown(path)}"
        case "string_type":
            return f"{where}: expected a text, in quotes (found {item['input']!r})"
        case "dict_type" | "model_type":
            return f"{where}: expected a table, [{where}] (found {item['input']!r})"
    what = item["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if "found " in what else f"{where}: {what} (found {item['input']!r})"


def _unknown(path: list[str]) -> str:
    """What to write instead of a key that nobody knows."""
    here, there = set(JobSpec.model_fields), set(Settings.model_fields)
    key, elsewhere = path[-1], "it belongs below [settings]"
    if path[0] == "settings" and len(path) > 1:
        here, there, elsewhere = there, here, "it belongs above the tables, before the first [...]"
    if key in there and key not in here:
        return f"no such key here; {elsewhere}"
    near = difflib.get_close_matches(key, sorted(here), n=1)
    return f"no such key; did you mean {near[0]}?" if near else f"no such key; known: {', '.join(sorted(here))}"


def to_toml(spec: JobSpec) -> str:
    """The job as a job file, without empty tables. Bytes of arguments that are not UTF-8 become U+FFFD."""
    values = spec.model_dump(exclude_none=True)
    tables = [(name, values.pop(name)) for name in TABLES]
    return _table(values) + "".join(f"\n[{name}]\n{_table(table)}" for name, table in tables if table)


def _table(values: Mapping[str, Any]) -> str:
    return "".join(f"{_toml_key(key)} = {_toml_value(value)}\n" for key, value in values.items())


def _toml_key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """JSON's numbers, booleans, arrays and (but for DEL) strings are TOML's as well."""
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
