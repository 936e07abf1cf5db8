"""Which files a bundle may hold: the same rules for whoever packs and whoever unpacks."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from downpour_common.errors import BundleError
from downpour_common.ignore import IGNORE_FILE, IgnoreRules
from downpour_common.sizes import format_bytes

_NAMED = 5
"""How many files, folders or problems a message names."""
_NAME_BYTES = 255
"""What file systems take as one name."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that travels: bytes in all and of one file, files, bytes of a path, names in a path."""

    total_bytes: int = 256 << 20
    file_bytes: int = 128 << 20
    files: int = 10_000
    path_bytes: int = 512
    depth: int = 32


LIMITS = Limits()


@dataclass(frozen=True, slots=True, order=True)
class BundledFile:
    """``path`` from the folder that travels, with ``/``; ``size`` in bytes; whether its owner may execute it."""

    path: str
    size: int
    executable: bool = False


def collect(folder: str, limits: Limits) -> tuple[BundledFile, ...]:
    """The files of ``folder`` that travel, ascending by path. Raises :class:`BundleError` with every problem."""
    if not os.path.isdir(folder):
        raise BundleError(folder, "is no folder")
    walk = _Walk(folder, limits)
    try:
        walk.run()
    except OSError as error:
        raise BundleError(folder, f"{error.filename}: {error.strerror or error}; {_IGNORE}") from error
    problems = walk.problems[:_NAMED]
    if len(walk.problems) > _NAMED:
        problems.append(f"… and {len(walk.problems) - _NAMED} more such files")
    problems += limit_problems(walk.files, limits)
    if problems:
        raise BundleError(folder, *problems)
    return tuple(sorted(walk.files))


_IGNORE = f"add it to {IGNORE_FILE} if the script does without it"


class _Walk:
    """One look through a folder: ``files`` that travel, and ``problems`` with what cannot."""

    def __init__(self, folder: str, limits: Limits) -> None:
        self.files: list[BundledFile] = []
        self.problems: list[str] = []
        self._folder = folder
        self._limits = limits
        self._rules = _rules(folder)
        self._waiting = [""]

    def run(self) -> None:
        """Raises :class:`OSError` for what cannot be read."""
        # Whoever submits from the home directory shall hear of it before millions of files have been looked at.
        while self._waiting and len(self.files) <= 10 * self._limits.files:
            at = self._waiting.pop()
            with os.scandir(os.path.join(self._folder, at)) as entries:
                for entry in entries:
                    path = f"{at}/{entry.name}" if at else entry.name
                    if not self._rules.skips(path, is_folder=os.path.isdir(entry.path)):
                        self._look_at(path, entry)

    def _look_at(self, path: str, entry: os.DirEntry[str]) -> None:
        problem = path_problem(path, self._limits)
        if problem is not None:
            self.problems.append(f"{shown(path)}: {problem}; rename it, or {_IGNORE}")
        elif entry.is_symlink():
            target = shown(os.readlink(entry.path))
            self.problems.append(
                f"{path}: is a symbolic link (to {target}), and links do not travel; "
                f"put a copy in its place, or {_IGNORE}"
            )
        elif entry.is_dir(follow_symlinks=False):
            self._waiting.append(path)
        elif entry.is_file(follow_symlinks=False):
            status = entry.stat(follow_symlinks=False)
            self.files.append(BundledFile(path, status.st_size, bool(status.st_mode & stat.S_IXUSR)))
        else:
            self.problems.append(f"{path}: is no regular file; {_IGNORE}")


def _rules(folder: str) -> IgnoreRules:
    path = os.path.join(folder, IGNORE_FILE)
    try:
        with open(path, encoding="utf-8-sig") as file:
            return IgnoreRules(file)
    except FileNotFoundError:
        return IgnoreRules(())
    except OSError as error:
        raise BundleError(folder, f"{IGNORE_FILE}: {error.strerror or error}") from error
    except ValueError as error:
        raise BundleError(folder, f"{IGNORE_FILE}: {error}") from None


def path_problem(path: str, limits: Limits) -> str | None:
    """Why ``path`` may not be in a bundle; None when it may."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    names = path.split("/")
    if len(encoded) > limits.path_bytes:
        return f"the path has {len(encoded)} bytes, more than {limits.path_bytes}"
    if len(names) > limits.depth:
        return f"{len(names)} names deep, more than {limits.depth}"
    if any(name in ("", ".", "..") for name in names):
        return "the path is not a plain relative one"
    if any(len(name.encode()) > _NAME_BYTES for name in names):
        return f"a name of more than {_NAME_BYTES} bytes"
    if "\\" in path or re.match("[A-Za-z]:", path):
        return "a backslash, or a drive's letter at the beginning, means something else on other systems"
    if any(unicodedata.category(char) == "Cc" for char in path):
        return "the name holds a control character"
    return None


def limit_problems(files: Sequence[BundledFile], limits: Limits) -> list[str]:
    """What exceeds the limits on sizes and counts, and by which files."""
    problems = []
    largest = sorted(files, key=lambda item: (-item.size, item.path))[:_NAMED]
    over = [item for item in largest if item.size > limits.file_bytes]
    if over:
        problems.append(f"larger than {format_bytes(limits.file_bytes)}, the most for one file: {_with_sizes(over)}")
    total = sum(item.size for item in files)
    if total > limits.total_bytes:
        problems.append(
            f"{format_bytes(total)} in all, more than {format_bytes(limits.total_bytes)}; "
            f"the largest: {_with_sizes(largest)}"
        )
    if len(files) > limits.files:
        folders = Counter(os.path.dirname(item.path) or "." for item in files).most_common(_NAMED)
        most = ", ".join(f"{name}/ ({count})" for name, count in folders)
        problems.append(f"at least {len(files)} files, more than {limits.files}; most of them in {most}")
    if problems:
        problems[-1] += f". Add what the script does not need to {IGNORE_FILE}, or raise the cap"
    return problems


def tree_problems(files: Sequence[BundledFile], limits: Limits) -> list[str]:
    """Why ``files`` cannot be what a bundle holds; for lists that others wrote."""
    problems = [f"{shown(item.path)}: {text}" for item in files if (text := path_problem(item.path, limits))]
    paths = [item.path for item in files]
    if any(a >= b for a, b in pairwise(paths)):
        problems.append("a path is there twice, or paths are not in order")
    known = set(paths)
    clashes = (path for path in paths if not known.isdisjoint(parents(path)))
    problems += [f"{shown(path)}: lies in what is a file" for path in clashes]
    return problems[:_NAMED] + limit_problems(files, limits)


def parents(path: str) -> Iterable[str]:
    """``"a/b/c"`` → ``"a"``, ``"a/b"``."""
    return (path[:i] for i, char in enumerate(path) if char == "/")


def _with_sizes(files: Iterable[BundledFile]) -> str:
    return ", ".join(f"{shown(item.path)} ({format_bytes(item.size)})" for item in files)


def shown(path: str) -> str:
    """``path`` such that it cannot disturb a terminal or a log."""
    return path if path.isprintable() else ascii(path)
