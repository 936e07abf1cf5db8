"""Keys of a folder for either side of a measurement.

Hosts of a cluster have a key of their own and the coordinator's ``.pub``, which is enough where one of the two is the
coordinator's host. Otherwise each also needs the ``.pub`` of the other, which is no secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from downpour_common.errors import ConfigError
from downpour_common.keys import KeyPair, ServerKeys, authorized, load_pair, load_public
from downpour_common.transport.zeromq import public_of

LISTENS = ("server", "coordinator", "worker", "user")
"""Whose key the listening side presents: the first of these roles that the folder has one of."""
ASKS = ("worker", "server", "user", "coordinator")
"""The same for the asking side."""


@dataclass(frozen=True, slots=True)
class Own:
    """The key that is presented; ``file``: its name, for messages."""

    pair: KeyPair
    file: str


def own(folder: Path, roles: Sequence[str]) -> Own:
    """The first key there is. Raises :class:`ConfigError`."""
    for role in roles:
        named = sorted(path.stem.removeprefix(f"{role}-") for path in folder.glob(f"{role}-*.key"))
        plain = (folder / f"{role}.key").exists()
        if plain or len(named) == 1:
            name = "" if plain else named[0]
            return Own(load_pair(folder, role, name, public_of), f"{role}{'-' if name else ''}{name}.key")
    raise ConfigError(f"--keys {folder}: no .key file of a role there; `downpour keys new` makes them")


def known(folder: Path) -> dict[str, str]:
    """Everybody whose ``.pub`` is there: public key → user, in the order in which they are likely to listen."""
    users = authorized(folder)
    if (folder / "coordinator.pub").exists():
        users[load_public(folder, "coordinator")] = "coordinator"
    rank = {role: number for number, role in enumerate(LISTENS)}
    return dict(sorted(users.items(), key=lambda item: (rank[item[1].partition("/")[0]], item[1])))


def server_keys(folder: Path) -> tuple[ServerKeys, Own]:
    """The listening side's: it lets in whom the folder has a ``.pub`` of. Raises :class:`ConfigError`."""
    mine, users = own(folder, LISTENS), known(folder)
    if not set(users) - {mine.pair.public}:
        raise ConfigError(f"--keys {folder}: nobody could come in; copy the .pub of the other host's key there")
    return ServerKeys(mine.pair, users), mine
