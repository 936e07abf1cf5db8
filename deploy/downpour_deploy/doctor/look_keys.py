"""Gathers facts from the folder of keys."""

from __future__ import annotations

import stat
from pathlib import Path

from downpour_common.errors import ConfigError
from downpour_common.keys import ClientKeys, load_pair, load_public
from downpour_common.transport.zeromq import public_of
from downpour_deploy.doctor.facts import KeyFile, KeysFacts


def look(folder: str | None, declined: bool, local: bool, role: str) -> tuple[KeysFacts, ClientKeys | None]:
    """What is there, and the keys to come with as ``role``, None without or when they cannot be used."""
    if folder is None:
        return KeysFacts(None, declined, local), None
    path = Path(folder)
    own = own_file(path, role)
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        files = tuple(_files(path))
    except OSError as error:
        exists = not isinstance(error, FileNotFoundError)
        problem = f"{folder}: {error.strerror}"
        return KeysFacts(folder, declined, local, own, exists, problem=problem), None
    keys, problem = None, ""
    try:
        name = own.removesuffix(".key").removeprefix(role).removeprefix("-")
        keys = ClientKeys(load_pair(path, role, name, public_of), {}, load_public(path, "coordinator"))
    except ConfigError as error:
        problem = error.problems[0]
    return KeysFacts(folder, declined, local, own, True, mode, files, problem), keys


def own_file(folder: Path, role: str) -> str:
    """The name of the key that is presented: ``user.key``, for users else the only ``user-NAME.key``."""
    named = sorted(folder.glob("user-*.key"))
    if role == "user" and len(named) == 1 and not (folder / "user.key").exists():
        return named[0].name
    return f"{role}.key"


def _files(folder: Path) -> list[KeyFile]:
    found = sorted(entry for entry in folder.iterdir() if entry.suffix in (".key", ".pub"))
    return [KeyFile(entry.name, stat.S_IMODE(entry.stat().st_mode)) for entry in found]
