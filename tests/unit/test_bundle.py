"""A folder as one file: the same content is the same file, and nothing but what may travel ever comes out."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common import bundle, bundle_files
from downpour_common.bundle import Bundle, BundledFile, Limits, digest_of, pack, unpack
from downpour_common.errors import BundleError
from downpour_common.ignore import IgnoreRules

SMALL = Limits(total_bytes=100, file_bytes=60, files=4, path_bytes=20, depth=3)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a script."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def fill(folder: Path, files: dict[str, bytes]) -> None:
    """Write files, with the folders they need."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def found_in(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if not p.is_dir()}


def refused_by_pack(home: Path, limits: Limits = bundle.LIMITS) -> list[str]:
    """Why ``home`` does not travel; nothing is left behind."""
    before = sorted(home.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        pack(str(home), str(home.parent / "b"), limits)
    assert sorted(home.parent.iterdir()) == before
    assert caught.value.path == str(home)
    return list(caught.value.problems)


# ---------------------------------------------------------------- there and back


def test_a_folder_comes_out_as_it_went_in(home: Path, tmp_path: Path) -> None:
    files = {"train.py": b"import downpour\n", "a/b/c.bin": bytes(range(256)) * 10_000, "empty": b"", "a/é ü.txt": b"x"}
    fill(home, files)
    (home / "train.py").chmod(0o4755)
    (home / "empty folder").mkdir()
    packed = pack(str(home), str(tmp_path / "b"))
    assert packed.digest == digest_of(str(tmp_path / "b")) == hashlib.sha256((tmp_path / "b").read_bytes()).hexdigest()
    assert packed.nbytes == (tmp_path / "b").stat().st_size
    assert packed.files == (
        BundledFile("a/b/c.bin", 2_560_000),
        BundledFile("a/é ü.txt", 1),
        BundledFile("empty", 0),
        BundledFile("train.py", 16, executable=True),
    )
    there = tmp_path / "there"
    assert unpack(str(tmp_path / "b"), str(there), packed.digest) == packed
    assert found_in(there) == files
    modes = {name: (there / name).stat().st_mode & 0o7777 for name in ("train.py", "empty", "a", "a/b", ".")}
    assert modes == {"train.py": 0o755, "empty": 0o644, "a": 0o755, "a/b": 0o755, ".": 0o700}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "home", "there"]


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="/\\"), min_size=1, max_size=6
).filter(lambda name: name not in (".", "..") and name[1:2] != ":")
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=4).map("/".join), st.tuples(st.binary(max_size=40), st.booleans()), max_size=8
)


def that_travel(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without what would lie in a file, and without what stays at home."""
    rules = IgnoreRules([".downpourignore"])

    def ways(path: str) -> list[str]:
        return [*bundle_files.parents(path), path]

    files_with_files = {parent for path in tree for parent in bundle_files.parents(path)}
    return {
        path: item
        for path, item in tree.items()
        if path not in files_with_files and not any(rules.skips(way, is_folder=True) for way in ways(path))
    }


@given(tree=TREES.map(that_travel))
def test_any_tree_comes_out_as_it_went_in_and_is_always_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, tuple[bytes, bool]]
) -> None:
    base = tmp_path_factory.mktemp("any")
    bundles = []
    for turn, paths in enumerate((list(tree), list(tree)[::-1])):
        home = base / str(turn)
        home.mkdir()
        for path in paths:
            fill(home, {path: tree[path][0]})
            (home / path).chmod(0o700 if tree[path][1] else 0o600 if turn else 0o444)
            os.utime(home / path, (turn, turn))
        bundles.append(pack(str(home), str(base / f"b{turn}")))
    assert bundles[0] == bundles[1]
    assert (base / "b0").read_bytes() == (base / "b1").read_bytes()
    unpack(str(base / "b0"), str(base / "there"), bundles[0].digest)
    assert found_in(base / "there") == {path: data for path, (data, _) in tree.items()}
    assert [item.executable for item in bundles[0].files] == [tree[path][1] for path in sorted(tree)]


def test_the_digest_knows_names_contents_and_the_executable_bit(home: Path, tmp_path: Path) -> None:
    def digest() -> str:
        return pack(str(home), str(tmp_path / "b")).digest

    fill(home, {"a": b"xy", "b": b""})
    digests = [digest()]
    fill(home, {"a": b"x", "b": b"y"})
    digests.append(digest())
    (home / "a").chmod(0o744)
    digests.append(digest())
    (home / "a").rename(home / "c")
    digests.append(digest())
    assert len(set(digests)) == 4


def test_the_form_of_a_bundle_is_kept(home: Path, tmp_path: Path) -> None:
    """Digests stand in journals and caches: another form needs another first line."""
    fill(home, {"train.py": b"pass\n", 'sub/q"é.txt': b"1"})
    (home / "train.py").chmod(0o755)
    pack(str(home), str(tmp_path / "b"))
    header = '[["sub/q\\"é.txt",1,false],["train.py",5,true]]'.encode()
    assert (tmp_path / "b").read_bytes() == b"DPBUND01" + len(header).to_bytes(8, "little") + header + b"1pass\n"


def test_a_bundle_is_its_owners_and_replaces_what_was_there(home: Path, tmp_path: Path) -> None:
    fill(home, {"a": b"1"})
    (tmp_path / "b").write_bytes(b"old")
    packed = pack(str(home), str(tmp_path / "b"))
    assert digest_of(str(tmp_path / "b")) == packed.digest
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600


def test_a_target_in_a_part_that_stays_at_home_changes_nothing(home: Path) -> None:
    fill(home, {"a": b"1", "runs/x": b""})
    assert pack(str(home), str(home / "runs/b")) == pack(str(home), str(home / "runs/b2"))


# ---------------------------------------------------------------- what stays at home


def travellers(home: Path) -> list[str]:
    """What would travel."""
    return [item.path for item in bundle_files.collect(str(home), bundle.LIMITS)]


def test_the_ignore_file_says_what_stays_at_home(home: Path) -> None:
    fill(
        home, dict.fromkeys(["train.py", ".git/HEAD", "data/x.bin", "data/keep.csv", "runs/1", "a/__pycache__/b"], b"")
    )
    assert travellers(home) == ["data/keep.csv", "data/x.bin", "train.py"]
    (home / ".downpourignore").write_bytes(b"\xef\xbb\xbf# big\r\n/data/*\r\n!keep.csv\r\n")
    assert travellers(home) == [".downpourignore", "data/keep.csv", "train.py"]


def test_an_ignore_file_that_cannot_be_read_is_told_with_its_line(home: Path) -> None:
    (home / ".downpourignore").write_text("ok\n[z-a]\n")
    assert refused_by_pack(home) == [".downpourignore: line 2: '[z-a]': z-a is no range"]
    (home / ".downpourignore").write_bytes(b"caf\xe9\n")
    assert "utf-8" in refused_by_pack(home)[0]
    (home / ".downpourignore").unlink()
    (home / ".downpourignore").mkdir()
    assert refused_by_pack(home) == [".downpourignore: Is a directory"]


def test_links_are_refused_and_named_unless_they_stay_at_home(home: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    fill(home, {"train.py": b"", "sub/x": b""})
    (home / "data").symlink_to(tmp_path / "big")
    (home / "sub/loop").symlink_to("loop")
    (home / "gone").symlink_to("nowhere\n")
    found = sorted(refused_by_pack(home))
    assert [line.partition(":")[0] for line in found] == ["data", "gone", "sub/loop"]
    assert f"is a symbolic link (to {tmp_path}/big)" in found[0]
    assert all("put a copy in its place, or add it to .downpourignore" in line for line in found)
    assert "'nowhere\\n'" in found[1]
    (home / ".downpourignore").write_text("data/\nloop\ngone\n")
    assert travellers(home) == [".downpourignore", "sub/x", "train.py"]


def test_a_second_name_of_a_file_travels_as_a_file(home: Path, tmp_path: Path) -> None:
    fill(home, {"a": b"1"})
    os.link(home / "a", home / "b")
    packed = pack(str(home), str(tmp_path / "b"))
    unpack(str(tmp_path / "b"), str(tmp_path / "there"), packed.digest)
    assert found_in(tmp_path / "there") == {"a": b"1", "b": b"1"}
    assert (tmp_path / "there/a").stat().st_nlink == 1


def test_pipes_and_sockets_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(home / "pipe")
    monkeypatch.chdir(home)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        found = sorted(refused_by_pack(home))
    assert [line.partition(";")[0] for line in found] == ["pipe: is no regular file", "socket: is no regular file"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (b"a\\b", "backslash"),
        (b"C:x", "drive"),
        (b"a\nb", "control character"),
        (b"a\x7f", "control character"),
        ("a\x85".encode(), "control character"),
        (b"caf\xe9", "not UTF-8"),
    ],
)
def test_names_that_mean_something_else_elsewhere_are_refused(home: Path, name: bytes, words: str) -> None:
    (home / os.fsdecode(name)).write_bytes(b"")
    (line,) = refused_by_pack(home)
    assert words in line
    assert "rename it, or add it to .downpourignore" in line
    assert line.isprintable()


def test_many_problems_are_told_in_few_lines(home: Path) -> None:
    for n in range(20):
        (home / f"link{n}").symlink_to("x")
    found = refused_by_pack(home)
    assert len(found) == 6
    assert found[-1] == "… and 15 more such files"


def test_no_folder_is_no_bundle(home: Path, tmp_path: Path) -> None:
    assert refused_by_pack(tmp_path / "home" / "none") == ["is no folder"]


# ---------------------------------------------------------------- limits of what travels


def test_what_is_too_much_names_the_largest_and_what_to_do(home: Path) -> None:
    fill(home, {"a.bin": b"x" * 61, "b/c": b"x" * 39})
    (line,) = refused_by_pack(home, SMALL)
    assert line.startswith(
        "larger than 60 B, the most for one file: a.bin (61 B). Add what the script does not need to "
    )
    fill(home, {"a.bin": b"x" * 60, "d": b"xx"})
    (line,) = refused_by_pack(home, SMALL)
    assert line.startswith("101 B in all, more than 100 B; the largest: a.bin (60 B), b/c (39 B), d (2 B). Add ")
    assert line.endswith(".downpourignore, or raise the cap")


def test_too_many_files_name_the_folders_with_most(home: Path) -> None:
    fill(home, dict.fromkeys(["a", "b/1", "b/2", "b/3", "c/1"], b""))
    (line,) = refused_by_pack(home, SMALL)
    assert line.startswith("at least 5 files, more than 4; most of them in b/ (3), ")


def test_the_look_at_a_home_directory_ends(home: Path) -> None:
    for n in range(60):
        fill(home, {f"{n}/x": b""})
    (line,) = refused_by_pack(home, SMALL)
    assert line.startswith("at least 41 files")


def test_paths_are_neither_long_nor_deep(home: Path) -> None:
    fill(home, {"a/b/c/d": b"", "x" * 21: b""})
    assert sorted(line.partition(";")[0] for line in refused_by_pack(home, SMALL)) == [
        "a/b/c/d: 4 names deep, more than 3",
        f"{'x' * 21}: the path has 21 bytes, more than 20",
    ]


def test_as_much_as_the_limits_say_travels(home: Path, tmp_path: Path) -> None:
    fill(home, {"a/b/c": b"", "x" * 20: b"x" * 60, "y": b"x" * 40, "z": b""})
    packed = pack(str(home), str(tmp_path / "b"), SMALL)
    unpack(str(tmp_path / "b"), str(tmp_path / "there"), packed.digest, SMALL)
    assert len(found_in(tmp_path / "there")) == 4


# ---------------------------------------------------------------- changes and failures while packing


def collected(monkeypatch: pytest.MonkeyPatch, home: Path, change: Any) -> None:
    """Have ``change()`` happen after the look at the folder and before its files are read."""
    files = bundle_files.collect(str(home), bundle.LIMITS)

    def collect(folder: str, limits: Limits) -> Sequence[BundledFile]:
        change()
        return files

    monkeypatch.setattr(bundle, "collect", collect)


@pytest.mark.parametrize("data", [b"", b"12", b"1234"])
def test_a_file_that_changes_its_size_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    fill(home, {"log": b"123"})
    collected(monkeypatch, home, lambda: fill(home, {"log": data}))
    assert refused_by_pack(home) == ["log: changed while it was packed; submit again when it is at rest"]


def test_a_file_that_becomes_a_link_is_not_followed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(home, {"x": b"123"})
    fill(tmp_path, {"secret": b"456"})

    def change() -> None:
        (home / "x").unlink()
        (home / "x").symlink_to(tmp_path / "secret")

    collected(monkeypatch, home, change)
    (line,) = refused_by_pack(home)
    assert line.startswith(f"{home}/x: ")


def test_a_file_that_becomes_a_pipe_does_not_wait_for_a_writer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(home, {"x": b"123"})

    def change() -> None:
        (home / "x").unlink()
        os.mkfifo(home / "x")

    collected(monkeypatch, home, change)
    assert refused_by_pack(home)[0].startswith("x: changed while it was packed")


def test_a_file_that_vanishes_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(home, {"x": b"123"})
    collected(monkeypatch, home, (home / "x").unlink)
    assert refused_by_pack(home) == [f"{home}/x: No such file or directory"]


def test_a_target_that_cannot_be_written_is_named(home: Path, tmp_path: Path) -> None:
    fill(home, {"x": b"123"})
    with pytest.raises(BundleError, match="No such file"):
        pack(str(home), str(tmp_path / "none/b"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match="Is a directory"):
        pack(str(home), str(tmp_path / "folder"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "home"]


# ---------------------------------------------------------------- bundles made by others


def crafted(rows: Any, data: bytes = b"", *, header: bytes | None = None, length: int | None = None) -> bytes:
    """A bundle with any header."""
    if header is None:
        header = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    return bundle.MAGIC + (len(header) if length is None else length).to_bytes(8, "little") + header + data


def refused_by_unpack(tmp_path: Path, content: bytes, limits: Limits = bundle.LIMITS) -> str:
    """Why the bundle is not unpacked, though its digest is right; nothing but the bundle is there afterwards."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "b").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        unpack(str(place / "b"), str(place / "there"), hashlib.sha256(content).hexdigest(), limits)
    assert [p.name for p in place.iterdir()] == ["b"]
    assert caught.value.path == str(place / "b")
    assert str(caught.value).replace("\n", "").isprintable()
    return str(caught.value)


def test_what_is_crafted_well_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(content := crafted([["a", 1, False], ["b/c", 2, True]], b"xyz"))
    assert unpack(str(tmp_path / "b"), str(tmp_path / "there"), hashlib.sha256(content).hexdigest()) == Bundle(
        hashlib.sha256(content).hexdigest(), len(content), (BundledFile("a", 1), BundledFile("b/c", 2, True))
    )
    assert found_in(tmp_path / "there") == {"a": b"x", "b/c": b"yz"}


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "a/..",
        "..",
        "/etc/passwd",
        "//x",
        "",
        ".",
        "./x",
        "a/./x",
        "a//x",
        "a/",
        "a\\..\\x",
        "C:/x",
        "c:x",
        "a\0b",
        "a\nb",
        "a\x1bb",
        "a\x7fb",
        "a\x9bb",
        "x" * 256,
        "/".join("x" * 33),
        "é" * 257,
    ],
)
def test_paths_that_lead_elsewhere_are_refused(tmp_path: Path, path: str) -> None:
    header = (
        None if path.isprintable() else json.dumps([[path, 0, False]], ensure_ascii=False).replace(" ", "").encode()
    )
    assert "is not a bundle" not in refused_by_unpack(tmp_path, crafted([[path, 0, False]], header=header))


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a", "a"], "twice"),
        (["b", "a"], "not in order"),
        (["a", "a/b"], "a/b: lies in what is a file"),
        (["a", "a-b", "a/b/c"], "a/b/c: lies in what is a file"),
        (["a/b", "a/b/c/d"], "a/b/c/d: lies in what is a file"),
    ],
)
def test_paths_that_do_not_go_together_are_refused(tmp_path: Path, paths: list[str], words: str) -> None:
    assert words in refused_by_unpack(tmp_path, crafted([[path, 0, False] for path in paths]))


@pytest.mark.parametrize(
    "rows",
    [
        {},
        None,
        3,
        "abc",
        [3],
        [[]],
        ["abc"],
        [["a", 0]],
        [["a", 0, False, 0o4755]],
        [["a", 0, False, "/etc/passwd"]],
        [[1, 0, False]],
        [["a", "0", False]],
        [["a", 0.0, False]],
        [["a", True, False]],
        [["a", -1, False]],
        [["a", None, False]],
        [["a", 0, 1]],
        [["a", 0, None]],
        [["a", 0, "link"]],
        [["a", [], False]],
        [[["a"], 0, False]],
        {"abc": 0},
    ],
)
def test_a_header_that_says_anything_else_is_refused(tmp_path: Path, rows: Any) -> None:
    assert "its header " in refused_by_unpack(tmp_path, crafted(rows))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[",
        b'[["a",0,false]]]',
        b'[["a",0,false],]',
        b'[["a", 0,false]]',
        b'[["a",0,false]] ',
        b'[["\\u0061",0,false]]',
        b'[["a\\/b",0,false]]',
        b'[["\\ud800",0,false]]',
        b'[["\xed\xa0\x80",0,false]]',
        b'[["caf\xe9",0,false]]',
        b'[["a",-0,false]]',
        b'[["a",0e0,false]]',
        b'[["a",NaN,false]]',
        b'[["a",Infinity,false]]',
        b'\xef\xbb\xbf[["a",0,false]]',
        '[["a",0,false]]'.encode("utf-16"),
        b"[" * 100_000,
        b"1" * 10_000,
    ],
)
def test_a_header_in_another_form_is_refused(tmp_path: Path, header: bytes) -> None:
    assert "its header " in refused_by_unpack(tmp_path, crafted(None, header=header))


@pytest.mark.parametrize(
    ("rows", "data", "words"),
    [
        ([["a", 3, False]], b"xy", "holds 2 bytes of data, and its header claims 3"),
        ([["a", 1, False]], b"xy", "holds 2 bytes of data, and its header claims 1"),
        ([], b"x", "holds 1 bytes of data, and its header claims 0"),
        ([["a", 1, False], ["b", 1 << 62, False]], b"x", "larger than 128 MiB"),
        ([["a", 10**30, False]], b"x", "larger than 128 MiB"),
        ([[f"a{n}", 100 << 20, False] for n in range(3)], b"x", "300 MiB in all, more than 256 MiB"),
    ],
)
def test_sizes_that_are_not_true_are_refused(tmp_path: Path, rows: Any, data: bytes, words: str) -> None:
    assert words in refused_by_unpack(tmp_path, crafted(rows, data))


@pytest.mark.parametrize("length", [0, 1, 14, 16, 17, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    content = crafted([["a", 1, False]], b"x", length=length)
    assert "its header " in refused_by_unpack(tmp_path, content)


@pytest.mark.parametrize("content", [b"", b"DPBUND01", b"DPBUND01" + bytes(7), b"DPBUND02" + bytes(20), b"PK\3\4" * 9])
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "is not a bundle" in refused_by_unpack(tmp_path, content)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["a", 61, False]], "larger than 60 B"),
        ([["a", 60, False], ["b", 41, False]], "101 B in all"),
        ([[str(n), 0, False] for n in range(5)], "at least 5 files, more than 4"),
        ([["x" * 21, 0, False]], "21 bytes, more than 20"),
        ([["a/b/c/d", 0, False]], "4 names deep"),
    ],
)
def test_the_limits_hold_for_who_unpacks_too(tmp_path: Path, rows: Any, words: str) -> None:
    assert words in refused_by_unpack(tmp_path, crafted(rows, bytes(sum(row[1] for row in rows))), SMALL)


def test_a_file_that_is_too_large_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert "more than a bundle may have" in refused_by_unpack(tmp_path, bytes(1000), SMALL)


def test_every_bundle_that_is_cut_or_longer_is_refused(home: Path, tmp_path: Path) -> None:
    fill(home, {"a": b"12", "b": b"3"})
    pack(str(home), str(tmp_path / "b"))
    content = (tmp_path / "b").read_bytes()
    for n, damaged in enumerate([*(content[:stop] for stop in range(len(content))), content + b"x", content * 2]):
        (tmp_path / str(n)).mkdir()
        refused_by_unpack(tmp_path / str(n), damaged)


@given(content=st.binary(max_size=60) | st.binary(max_size=60).map(lambda header: crafted(None, header=header)))
def test_any_bytes_are_a_bundle_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    place = tmp_path_factory.mktemp("any")
    (place / "b").write_bytes(content)
    try:
        unpack(str(place / "b"), str(place / "there"), hashlib.sha256(content).hexdigest())
    except BundleError:
        assert [p.name for p in place.iterdir()] == ["b"]


# ---------------------------------------------------------------- digests and failures while unpacking


@pytest.fixture
def packed(home: Path, tmp_path: Path) -> tuple[Path, Bundle]:
    """A bundle of two files."""
    fill(home, {"a": b"12", "sub/b": b"3"})
    return tmp_path / "b", pack(str(home), str(tmp_path / "b"))


@pytest.mark.parametrize("wrong", ["", "0" * 64, "upper"])
def test_nothing_is_looked_at_before_the_digest_is_right(
    packed: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    path, made = packed
    monkeypatch.setattr(bundle, "_read_header", None)
    before = sorted(path.parent.iterdir())
    with pytest.raises(BundleError, match="has the SHA-256"):
        unpack(str(path), f"{path}.there", made.digest.upper() if wrong == "upper" else wrong)
    assert sorted(path.parent.iterdir()) == before


def test_every_flipped_bit_is_seen(packed: tuple[Path, Bundle]) -> None:
    path, made = packed
    content = path.read_bytes()
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        with pytest.raises(BundleError, match="has the SHA-256"):
            unpack(str(path), f"{path}.there", made.digest)


def changed_meanwhile(monkeypatch: pytest.MonkeyPatch, path: Path, change: Any) -> None:
    """Have ``change(file)`` happen after the bundle was checked and before its data are read once more."""
    read_header = bundle._read_header

    def later(*args: Any) -> Any:
        files = read_header(*args)
        with open(path, "r+b") as file:
            change(file)
        return files

    monkeypatch.setattr(bundle, "_read_header", later)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda file: (file.seek(-1, os.SEEK_END), file.write(b"x")), id="other bytes"),
        pytest.param(lambda file: file.truncate(2 << 20), id="cut"),
    ],
)
def test_a_bundle_that_changes_after_the_check_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    fill(home, {"big": bytes(3 << 20)})
    made = pack(str(home), str(tmp_path / "b"))
    changed_meanwhile(monkeypatch, tmp_path / "b", change)
    with pytest.raises(BundleError, match="changed while it was unpacked"):
        unpack(str(tmp_path / "b"), str(tmp_path / "there"), made.digest)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "home"]


def test_what_is_added_after_the_check_is_not_read(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(home, {"big": bytes(3 << 20)})
    made = pack(str(home), str(tmp_path / "b"))
    changed_meanwhile(monkeypatch, tmp_path / "b", lambda file: (file.seek(0, os.SEEK_END), file.write(b"x")))
    unpack(str(tmp_path / "b"), str(tmp_path / "there"), made.digest)
    assert found_in(tmp_path / "there") == {"big": bytes(3 << 20)}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_already_is_left_alone(packed: tuple[Path, Bundle], kind: str) -> None:
    path, made = packed
    there = path.with_name("there")
    {"folder": there.mkdir, "file": there.touch, "link": lambda: there.symlink_to("home")}[kind]()
    before = sorted(path.parent.iterdir())
    with pytest.raises(BundleError, match="exists already") as caught:
        unpack(str(path), str(there), made.digest)
    assert caught.value.path == str(there)
    assert sorted(path.parent.iterdir()) == before
    assert sorted(p.name for p in (path.parent / "home").iterdir()) == ["a", "sub"]


def test_a_disk_that_is_full_leaves_nothing(packed: tuple[Path, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    path, made = packed
    calls = []

    def full(fd: int, mode: int) -> None:
        calls.append(mode)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    before = sorted(path.parent.iterdir())
    with pytest.raises(BundleError, match=r"there: No space left on device"):
        unpack(str(path), str(path.with_name("there")), made.digest)
    assert sorted(path.parent.iterdir()) == before


def test_a_bundle_that_is_not_there_is_an_error_of_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="b: No such file"):
        unpack(str(tmp_path / "b"), str(tmp_path / "there"), "0" * 64)
    (tmp_path / "b").write_bytes(content := crafted([]))
    with pytest.raises(BundleError, match="No such file"):
        unpack(str(tmp_path / "b"), str(tmp_path / "no/there"), hashlib.sha256(content).hexdigest())
    assert not (tmp_path / "no").exists()


def test_the_umask_does_not_matter(packed: tuple[Path, Bundle]) -> None:
    path, made = packed
    before = os.umask(0)
    try:
        unpack(str(path), f"{path}.open", made.digest)
    finally:
        os.umask(before)
    modes = {str(p.relative_to(f"{path}.open")): p.stat().st_mode & 0o7777 for p in Path(f"{path}.open").rglob("*")}
    assert modes == {"a": 0o644, "sub": 0o755, "sub/b": 0o644}
