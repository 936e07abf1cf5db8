"""Where the coordinator is and with which keys to come: from arguments, else from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from downpour_common.addresses import is_local, parse_address
from downpour_common.errors import ConfigError

if TYPE_CHECKING:
    from downpour_common.keys import ClientKeys

COORDINATOR_VARIABLE = "DOWNPOUR_COORDINATOR"
KEYS_VARIABLE = "DOWNPOUR_KEYS"


@dataclass(frozen=True, slots=True)
class Access:
    """``address``: ``tcp://HOST:PORT`` or ``ipc://PATH``. ``keys_dir``: folder with the user's keys, None without."""

    address: str
    keys_dir: str | None

    def key_file(self) -> str:
        """The file of the key that is presented, for messages."""
        return "" if self.keys_dir is None else str(_key_file(Path(self.keys_dir)))

    def keys(self) -> ClientKeys | None:
        """The keys themselves; raises :class:`ConfigError` when they cannot be read."""
        if self.keys_dir is None:
            return None
        from downpour_common.keys import ClientKeys, load_pair, load_public

        folder = Path(self.keys_dir)
        name = _key_file(folder).stem.removeprefix("user").removeprefix("-")
        return ClientKeys(load_pair(folder, "user", name), {}, load_public(folder, "coordinator"))


def access(
    join: str | None = None,
    keys: str | os.PathLike[str] | None = None,
    security: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Access:
    """Arguments beat the environment. ``security="none"``: no keys, to any address.

    Raises :class:`ConfigError` with every problem: no address, a bad one, no keys for another host.
    """
    text = join or environment.get(COORDINATOR_VARIABLE) or ""
    source = "--join" if join else COORDINATOR_VARIABLE
    problems = []
    if security not in (None, "", "curve", "none"):
        problems.append(f"--security {security}: expected curve or none")
    folder = None if security == "none" else str(keys or environment.get(KEYS_VARIABLE) or "") or None
    address = ""
    if not text:
        problems.append("which cluster? give --join HOST:PORT, or set DOWNPOUR_COORDINATOR")
    else:
        try:
            address = parse_address(text)
        except ConfigError as error:
            problems += [f"{source} {problem}" for problem in error.problems]
    if folder is not None and not os.path.isdir(folder):
        problems.append(f"{'--keys' if keys else KEYS_VARIABLE} {folder}: no such folder")
    if folder is None and security == "curve":
        problems.append("--security curve: needs keys; give --keys FOLDER, or set DOWNPOUR_KEYS")
    elif address and folder is None and security != "none" and not is_local(address):
        problems.append(
            f"{source} {text}: another host is joined with keys only; give --keys FOLDER (user.key and "
            "coordinator.pub of `downpour keys new`), or set DOWNPOUR_KEYS. On a network where everybody may run code "
            "on your cluster: --security none"
        )
    if problems:
        raise ConfigError(*problems)
    return Access(address, folder)


def _key_file(folder: Path) -> Path:
    """``user.key``; else the only ``user-NAME.key``; else ``user.key``, for the message that it is not there."""
    plain = folder / "user.key"
    named = sorted(folder.glob("user-*.key"))
    return named[0] if not plain.exists() and len(named) == 1 else plain
