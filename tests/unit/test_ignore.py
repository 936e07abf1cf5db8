"""Patterns of .downpourignore. The table was compared with ``git check-ignore``, but for what is said to differ."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common.ignore import IgnoreRules


def skips(lines: list[str], path: str, *, defaults: bool = False) -> bool:
    """Whether ``path``, a folder when it ends with a slash, stays at home; its parents are asked about first."""
    rules = IgnoreRules(lines) if defaults else IgnoreRules(lines, ())
    names = path.removesuffix("/").split("/")
    return any(
        rules.skips("/".join(names[:n]), is_folder=n < len(names) or path.endswith("/"))
        for n in range(1, len(names) + 1)
    )


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("*.ckpt", ["a.ckpt", "a/b.ckpt", ".ckpt", "a.ckpt/x"], ["a.ckpt2", "ckpt"]),
        ("data", ["data", "a/data", "data/x"], ["data2", "a/mydata"]),
        ("data/", ["data/", "data/x", "a/data/x"], ["data", "a/data"]),
        ("/data", ["data", "data/x"], ["a/data"]),
        ("a/b", ["a/b", "a/b/c"], ["x/a/b", "a/bc"]),
        ("/a/b/", ["a/b/", "a/b/c"], ["a/b", "x/a/b/"]),
        ("a/*", ["a/b", "a/b/c"], ["a", "a/", "x/a/b"]),
        ("a/*.bin", ["a/x.bin"], ["a/b/x.bin"]),
        ("?.py", ["a.py", "x/é.py"], ["ab.py", ".py"]),
        ("a?b", ["axb"], ["a/b", "ab"]),
        ("**/x", ["x", "a/x", "a/b/x"], ["ax"]),
        ("a/**/x", ["a/x", "a/b/x", "a/b/c/x"], ["ax", "x/a/x"]),
        ("a/**/**/x", ["a/x", "a/b/x"], ["ax"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "a/", "b/a/c"]),
        ("**", ["a", "a/b"], []),
        ("a**b", ["ab", "axyb", "c/axb"], ["a/b"]),
        ("[ab].py", ["a.py", "x/b.py"], ["c.py", "ab.py"]),
        ("[a-c]1", ["b1"], ["d1"]),
        ("[!a-c]1", ["d1"], ["b1", "1", "a/1"]),
        ("[^a]1", ["b1"], ["a1"]),
        ("x[!a]y", ["xby"], ["x/y"]),
        ("x[.-9]y", ["x1y", "x.y"], ["x/y"]),
        ("[]a]1", ["]1", "a1"], ["b1"]),
        ("[a-]1", ["a1", "-1"], ["b1"]),
        (r"[\]a]1", ["]1", "a1"], ["\\1"]),
        ("[&|~[]1", ["&1", "|1", "~1", "[1"], ["a1"]),
        (r"\#a", ["#a"], ["a", r"\#a"]),
        (r"\!a", ["!a"], ["a"]),
        (r"\*", ["*"], ["a"]),
        ("a b", ["a b"], ["a"]),
        ("a  ", ["a"], ["a  "]),
        (r"a\ ", ["a "], ["a"]),
        ("a.b+c(d)$", ["a.b+c(d)$"], ["aXb+c(d)$"]),
        ("# a", [], ["# a", "a"]),
        ("/", [], ["a", "a/"]),
        ("", [], ["a"]),
        ("!", [], ["a"]),
        ("A", ["A"], ["a"]),
        ("new*", ["new\nline"], ["a\nnew"]),
    ],
)
def test_patterns_mean_what_they_mean_in_gitignore(pattern: str, inside: list[str], outside: list[str]) -> None:
    assert [path for path in inside if not skips([pattern], path)] == []
    assert [path for path in outside if skips([pattern], path)] == []


def test_the_last_line_that_matches_decides() -> None:
    lines = ["*.bin", "!keep.bin", "/a/keep.bin"]
    assert [skips(lines, path) for path in ("x.bin", "keep.bin", "a/keep.bin", "b/keep.bin")] == [
        True,
        False,
        True,
        False,
    ]


def test_what_lies_in_a_folder_that_stays_at_home_stays_too() -> None:
    assert skips(["data/", "!data/small.csv"], "data/small.csv")
    assert not skips(["data/*", "!data/small.csv"], "data/small.csv")


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD",
        ".git",
        "sub/.git",
        "a/__pycache__/x.txt",
        "a/b.pyc",
        ".venv/bin/python",
        "venv/x",
        "web/node_modules/x",
        "runs/1/model.safetensors",
        ".mypy_cache/x",
        ".ruff_cache/x",
        ".pytest_cache/x",
        "pkg.egg-info/PKG-INFO",
        "a/.DS_Store",
        ".#train.py",
        "keys/user-alice.key",
    ],
)
def test_what_never_belongs_to_a_script_stays_at_home(path: str) -> None:
    assert skips([], path, defaults=True)


@pytest.mark.parametrize(
    "path", ["train.py", ".gitignore", ".downpourignore", "runs", "runs.py", "src/env/x", "user.pub"]
)
def test_other_things_travel(path: str) -> None:
    assert not skips([], path, defaults=True)


def test_the_defaults_can_be_taken_back() -> None:
    assert not skips(["!/runs"], "runs/a", defaults=True)
    assert skips(["!/runs"], "sub/runs/a", defaults=True)


def test_lines_end_as_they_may() -> None:
    assert skips(["a\r\n", "b\n"], "a")
    assert skips(["a\r\n", "b\n"], "b")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a[b", "[ without its ]"),
        ("[", "[ without its ]"),
        ("[]", "[ without its ]"),
        ("[!]", "[ without its ]"),
        ("[z-a]", "z-a is no range"),
        ("[[:alpha:]]", "write [a-zA-Z]"),
        ("a\\", "nothing after the backslash"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^line 3: ") as caught:
        IgnoreRules(["# first", "", line])
    assert words in str(caught.value)


@given(st.lists(st.text("ab*?[]!-^\\/# .", max_size=8), max_size=3), st.text("ab/-", min_size=1, max_size=6))
def test_any_line_is_a_pattern_or_told(lines: list[str], path: str) -> None:
    try:
        rules = IgnoreRules(lines)
    except ValueError:
        return
    if not any(line.startswith("!") for line in lines):
        assert rules.skips(path, is_folder=True) >= rules.skips(path, is_folder=False)
