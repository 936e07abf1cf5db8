"""What of a script's folder stays at home: the patterns of ``.downpourignore``.

One pattern per line, as in ``.gitignore``:

=============  ==================================================================================
``# text``     a comment; blank lines are skipped, and spaces at the end (unless written ``\\ ``)
``*.ckpt``     no slash but at the end: the name of a file or folder at any depth
``/data``      a slash at the beginning or within: the path from the folder that travels
``data/``      a slash at the end: only folders. Unlike git's, also a link that leads to one
``*`` ``?``    any characters, one character; never a slash
``[a-z]``      one of these, ``[!a-z]`` or ``[^a-z]`` none of them; ``[[:alpha:]]`` is refused
``**``         between slashes: any number of folders; ``data/**`` is everything below data
``!keep.bin``  takes back what an earlier line left out. The last line that matches decides
``\\``          makes the next character an ordinary one: ``\\#``, ``\\!``, ``\\*``
=============  ==================================================================================

What lies in a folder that stays at home stays there too; no ``!`` brings it back. The lines of ``DEFAULTS`` come before
the file's own, so ``!/runs`` has runs travel. Only the file at the top is read, none in the folders below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

IGNORE_FILE = ".downpourignore"

DEFAULTS = (
    ".git",
    "__pycache__",
    "*.pyc",
    ".venv",
    "venv",
    "node_modules",
    "runs/",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    "*.egg-info",
    ".DS_Store",
    ".#*",  # Emacs' locks: links to nowhere, there while a file is being edited
    "*.key",  # secret halves of keys, as `downpour keys new` writes them, stay on their host
)
"""What does not belong to a job's code: it would make the same code look different, be large, or be secret."""


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    takes_back: bool
    only_folders: bool


class IgnoreRules:
    """Patterns, read once. Raises :class:`ValueError` for one that cannot be read; the message says which line."""

    def __init__(self, lines: Iterable[str], defaults: Iterable[str] = DEFAULTS) -> None:
        self._rules = [rule for line in defaults if (rule := _rule(line))]
        for number, line in enumerate(lines, 1):
            try:
                rule = _rule(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {line.strip()!r}: {error}") from None
            if rule is not None:
                self._rules.append(rule)

    def skips(self, path: str, is_folder: bool) -> bool:
        """Whether ``path`` (relative, with ``/``) stays at home. Its parents have been asked about before."""
        for rule in reversed(self._rules):
            if (is_folder or not rule.only_folders) and rule.pattern.fullmatch(path):
                return not rule.takes_back
        return False


def _rule(line: str) -> _Rule | None:
    text = re.sub(r"(?<!\\) +$", "", line.rstrip("\r\n"))
    if not text or text.startswith("#"):
        return None
    takes_back = text.startswith("!")
    text = text.removeprefix("!")
    only_folders = text.endswith("/")
    text = text.removesuffix("/")
    anywhere = "/" not in text
    text = text.removeprefix("/")
    if not text:
        return None
    names = text.split("/")
    expression = "(?:.+/)?" if anywhere else ""
    for i, name in enumerate(names):
        last = i == len(names) - 1
        if name == "**" and names[i + 1 : i + 2] == ["**"]:
            continue
        if name == "**":
            expression += ".+" if last else "(?:.+/)?"
        else:
            expression += _glob(name) + ("" if last else "/")
    return _Rule(re.compile(expression, re.DOTALL), takes_back, only_folders)


def _glob(name: str) -> str:
    """One name between slashes as a regular expression."""
    out, i = "", 0
    while i < len(name):
        char = name[i]
        i += 1
        if char == "*":
            out += "" if out.endswith("[^/]*") else "[^/]*"
        elif char == "?":
            out += "[^/]"
        elif char == "[":
            part, i = _one_of(name, i)
            out += part
        elif char == "\\":
            if i == len(name):
                raise ValueError("nothing after the backslash")
            out += re.escape(name[i])
            i += 1
        else:
            out += re.escape(char)
    return out


def _one_of(name: str, i: int) -> tuple[str, int]:
    """The class that begins at ``i``, after its bracket, as a regular expression; and where it ends."""
    negated = name[i : i + 1] in ("!", "^")
    i += negated
    items: list[str] = []
    while i < len(name) and (name[i] != "]" or not items):
        if name.startswith("[:", i):
            raise ValueError("classes such as [:alpha:] are not known; write [a-zA-Z]")
        low, i = _member(name, i)
        high = low
        if name[i : i + 1] == "-" and name[i + 1 : i + 2] not in ("", "]"):
            high, i = _member(name, i + 1)
        if low > high:
            raise ValueError(f"{low}-{high} is no range")
        items.append(f"{re.escape(low)}-{re.escape(high)}")
    if i >= len(name):
        raise ValueError("[ without its ]; write \\[ for the character")
    return f"(?!/)[{'^' if negated else ''}{''.join(items)}]", i + 1


def _member(name: str, i: int) -> tuple[str, int]:
    if name[i] == "\\" and i + 1 < len(name):
        return name[i + 1], i + 2
    return name[i], i + 1
