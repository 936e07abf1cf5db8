"""Job files: a job's description as TOML, the same keys that :func:`downpour_common.config.to_toml` writes.

::

    name = "digits"                  # everything here is a field of JobSpec; what is absent can come from flags
    script = "train.py"              # relative to this file's folder, like folder
    workers = 8
    shard_memory = "2GiB"

    [settings]                       # what --set sets
    n_push = 5

    [env]                            # and likewise [worker_labels], [server_labels]
    WANDB_MODE = "offline"
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from downpour_common.config import TABLES, JobSpec, describe
from downpour_common.errors import ConfigError
from downpour_common.sizes import format_bytes

_LIMIT_BYTES = 1 << 20


def load(path: str) -> dict[str, object]:
    """The fields that the file gives, as :func:`downpour_common.config.job_spec` takes them; none is filled in.

    Relative ``script`` and ``folder`` come joined to the file's own folder. ``out`` and ``resume`` are as written: they
    are paths where the job runs. Raises :class:`ConfigError` with every problem that the file has by itself; that
    fields are absent, or do not go together, shows in ``job_spec``.
    """
    fields = _parse(path)
    try:
        JobSpec.model_validate(fields)
    except ValidationError as error:
        problems = describe(error, absent_too=False)
        if problems:
            raise ConfigError(*(f"{path}: {problem}" for problem in problems)) from None
    for name in ("script", "folder"):
        if fields.get(name):
            fields[name] = os.path.join(os.path.dirname(path), fields[name])
    return fields


def _parse(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    if len(data) > _LIMIT_BYTES:
        raise ConfigError(f"{path}: larger than {format_bytes(_LIMIT_BYTES)}; is this a job file?")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8") from None
    try:
        return tomllib.loads(text)
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise ConfigError(_with_line(path, text, str(error))) from None
    except RecursionError:
        raise ConfigError(f"{path}: arrays or tables within one another too often") from None


def _with_line(path: str, text: str, message: str) -> str:
    """``Invalid value (at line 3, column 7)`` → ``job.toml:3:7: Invalid value``."""
    found = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    if found:
        return f"{path}:{found[1]}:{found[2]}: {message[: found.start()]}"
    message, end, _ = message.partition(" (at end of document)")
    return f"{path}:{len(text.splitlines()) or 1}: {message}" if end else f"{path}: {message}"


def merge(file_fields: Mapping[str, object], flag_fields: Mapping[str, object]) -> dict[str, object]:
    """Both as one; flags win over the file.

    A flag that is None was not given. Tables (``settings``, ``env``, ``worker_labels``, ``server_labels``) are merged
    key by key, everything else is taken from one of the two as a whole: arguments of the script are not appended.
    """
    fields = dict(file_fields)
    for name, value in flag_fields.items():
        if value is None:
            continue
        before = fields.get(name)
        both = name in TABLES and isinstance(before, Mapping) and isinstance(value, Mapping)
        fields[name] = {**before, **value} if both else value  # type: ignore[dict-item]
    return fields


def travelling(spec: JobSpec) -> tuple[JobSpec, str]:
    """The job as a cluster gets it, and the folder (an absolute path) whose files go with it.

    In the job ``script`` is relative to that folder and ``folder`` is ``.``, so that its job.toml, put into a copy of
    the folder, describes the same job. Raises :class:`ConfigError` when the script is not in the folder.
    """
    script = os.path.abspath(spec.script)
    folder = os.path.abspath(spec.folder or os.path.dirname(script))
    relative = os.path.relpath(script, folder)
    if relative.split(os.sep)[0] in (os.pardir, os.curdir):
        raise ConfigError(
            f"script: {spec.script} is not in the folder that travels, {folder}; give a folder that holds the script"
        )
    return spec.model_copy(update={"script": relative, "folder": "."}), folder
