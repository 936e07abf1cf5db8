"""Key pairs: who may talk to whom, and the files that say so.

::

    coordinator.key  coordinator.pub     the coordinator; every client knows its public key
    server.key       server.pub          shards
    worker.key       worker.pub          training processes
    user.key         user.pub            whoever submits and watches jobs
    user-alice.key   user-alice.pub      one of several of a role

A ``.key`` file holds both halves and stays on the host that uses it; a ``.pub`` file holds the public half alone.
The coordinator needs its own ``.key`` and the ``.pub`` files of those it lets in; everyone else its own ``.key`` and
``coordinator.pub``. The files are TOML; keys are Curve25519 in Z85, 40 characters.

No error raised here and no ``repr`` contains a secret.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from downpour_common.errors import ConfigError

ROLES = ("coordinator", "server", "worker", "user")
KEY_CHARACTERS = 40

_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[a-z0-9-]{1,64}")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A Curve25519 key pair, each half as Z85 text of 40 characters. Raises :class:`ConfigError` for other text."""

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        if not (_Z85.fullmatch(self.public) and _Z85.fullmatch(self.secret)):
            raise ConfigError(f"a key is {KEY_CHARACTERS} characters of Z85")


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a client presents, and which server it talks to and to no other.

    ``servers``: the public key expected at an address; ``other``: at every address not in there.
    """

    pair: KeyPair
    servers: Mapping[str, str]
    other: str

    def server_at(self, address: str) -> str:
        """The public key that the server at ``address`` must prove to have."""
        return self.servers.get(address, self.other)


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A server's own keys, and whom it lets in.

    ``allowed``: a client's public key -> its user name, such as ``worker`` or ``user/alice``. The dict may be changed
    by any thread while the server runs: an added key is accepted from then on, what the holder of a removed one
    sends is dropped from then on.
    """

    pair: KeyPair
    allowed: dict[str, str]


# ---------------------------------------------------------------- writing


def new_keys(folder: Path, pairs: Mapping[str, KeyPair]) -> list[Path]:
    """Write the files of a whole set, one pair for each of :data:`ROLES`; gives their paths.

    The folder is made, with mode 0700, where it is not there. Raises :class:`ConfigError`, leaving everything as it
    was, when one of the files exists or cannot be written.
    """
    assert set(pairs) == set(ROLES)
    return _write_all(folder, [(role, "", pairs[role]) for role in ROLES])


def add_key(folder: Path, role: str, name: str, pair: KeyPair) -> list[Path]:
    """Write the files of one more key of a role, called ``name`` ([a-z0-9-], at most 64); see :func:`new_keys`."""
    if role == "coordinator":
        raise ConfigError("there is one coordinator, and its clients know its one key; take another folder")
    if not name:
        raise ConfigError("a further key needs a name")
    return _write_all(folder, [(role, name, pair)])


def _write_all(folder: Path, keys: list[tuple[str, str, KeyPair]]) -> list[Path]:
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    files: list[tuple[Path, int, str]] = []
    for role, name, pair in keys:
        facts = f'role = "{role}"\nname = "{name}"\npublic = "{pair.public}"\n'
        secret = f'secret = "{pair.secret}"\n'
        files.append((_path(folder, role, name, ".key"), 0o600, f"{facts}{secret}created = {created}\n"))
        files.append((_path(folder, role, name, ".pub"), 0o644, f"{facts}created = {created}\n"))
    if existing := [str(path) for path, _, _ in files if os.path.lexists(path)]:
        raise ConfigError(
            f"{existing[0]} exists and keys are never overwritten; take another folder or name, or remove it first"
        )
    written: list[Path] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, mode, text in files:
            # Made with its mode, not narrowed afterwards: nobody can have opened it in between.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            written.append(path)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    return written


# ---------------------------------------------------------------- reading


def load_pair(folder: Path, role: str, name: str = "", public_of: Callable[[str], str] | None = None) -> KeyPair:
    """Both halves, from the ``.key`` file. ``public_of``: a secret's public half, to check that they belong together.

    Raises :class:`ConfigError` when the file is missing, unreadable, damaged, of another role or name, or when its
    mode lets group or others read or change it.
    """
    path = _path(folder, role, name, ".key")
    text, facts = _open(path, "")
    if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{path} holds a secret and is open to others (mode {_mode(facts)}): chmod 600 {path}")
    content = _parse(path, text, role, name)
    secret = content.get("secret")
    if not isinstance(secret, str) or not _Z85.fullmatch(secret):
        raise _damaged(path)
    if public_of is not None and public_of(secret) != content["public"]:
        raise ConfigError(f"{path} is damaged: its public key does not belong to its secret one")
    return KeyPair(content["public"], secret)


def load_public(folder: Path, role: str, name: str = "") -> str:
    """The public half, from the ``.pub`` file. Raises :class:`ConfigError` as :func:`authorized` does."""
    hint = "; copy it from the host where the keys were made" if role == "coordinator" else ""
    return _public(folder, role, name, hint)


def authorized(folder: Path) -> dict[str, str]:
    """Whom the folder's ``.pub`` files let in: public key -> ``role`` or ``role/name``; the coordinator's is not asked.

    Raises :class:`ConfigError` when the folder cannot be read, or when one of its ``.pub`` files is damaged, has a
    name that does not fit its content, holds the same key as another, or could have been written by someone else.
    """
    try:
        stems = sorted(path.stem for path in folder.iterdir() if path.suffix == ".pub")
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; make keys with: downpour keys new --dir {folder}") from None
    users: dict[str, str] = {}
    for stem in stems:
        role, _, name = stem.partition("-")
        if role == "coordinator":
            continue
        public = _public(folder, role, name, "")
        if public in users:
            raise ConfigError(f"{folder}: {stem}.pub holds the key of {users[public]}; every key has one owner")
        users[public] = f"{role}/{name}" if name else role
    return users


def _public(folder: Path, role: str, name: str, hint: str) -> str:
    path = _path(folder, role, name, ".pub")
    text, facts = _open(path, hint)
    # Whoever can write a .pub file lets himself in.
    try:
        owners = {0, os.geteuid(), folder.stat().st_uid}
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{path} can be changed by others (mode {_mode(facts)}): chmod go-w {path}")
    if facts.st_uid not in owners:
        raise ConfigError(f"{path} belongs to another user (uid {facts.st_uid}); remove it, or chown it if it is right")
    return _parse(path, text, role, name)["public"]


def _path(folder: Path, role: str, name: str, suffix: str) -> Path:
    if role not in ROLES:
        raise ConfigError(f"{folder}: no role is called {role!r:.80}; there are {', '.join(ROLES)}")
    if name and not _NAME.fullmatch(name):
        raise ConfigError(f"{folder}: {name!r:.80} is no name for a key; use a-z, 0-9 and -, at most 64 characters")
    return folder / f"{role}{'-' if name else ''}{name}{suffix}"


def _open(path: Path, hint: str) -> tuple[str, os.stat_result]:
    """Content and facts of the same file, even if another takes its place meanwhile."""
    try:
        with open(path, encoding="ascii") as file:
            return file.read(4096), os.fstat(file.fileno())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing{hint}; downpour keys new and downpour keys add make keys") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _damaged(path) from None


def _parse(path: Path, text: str, role: str, name: str) -> dict[str, str]:
    """The file's strings. Says nothing of what it found instead: that may be a secret."""
    try:
        content = {key: value for key, value in tomllib.loads(text).items() if isinstance(value, str)}
    except tomllib.TOMLDecodeError:
        raise _damaged(path) from None
    if not {"role", "name", "public"} <= content.keys() or not _Z85.fullmatch(content["public"]):
        raise _damaged(path)
    if (content["role"], content["name"]) != (role, name):
        raise ConfigError(
            f"{path} is the key of another role or name than its file name says; was it copied or renamed?"
        )
    return content


def _damaged(path: Path) -> ConfigError:
    return ConfigError(f"{path} is damaged or no key file of downpour; copy it again, or remove it and make a new one")


def _mode(facts: os.stat_result) -> str:
    return f"{stat.S_IMODE(facts.st_mode):04o}"
