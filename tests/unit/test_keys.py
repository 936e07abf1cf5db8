"""Key files: who may read and write them, what is refused, and that no secret is ever shown."""

from __future__ import annotations

import json
import os
import stat
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from downpour_common import keys, messages, wire
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.keys import ROLES, ClientKeys, KeyPair, ServerKeys
from downpour_common.transport.zeromq import _zap_reply, new_key_pair, public_of
from downpour_deploy.keys_command import keys_app

PAIRS = {role: new_key_pair() for role in ROLES}
ALICE = new_key_pair()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole set, and one named key."""
    keys.new_keys(tmp_path / "keys", PAIRS)
    keys.add_key(tmp_path / "keys", "user", "alice", ALICE)
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def everything_said(error: BaseException) -> str:
    """The message and all that a traceback would show of it."""
    return str(error) + repr(error) + "".join(traceback.format_exception(error))


# ---------------------------------------------------------------- there and back


def test_a_set_is_read_as_it_was_written(folder: Path) -> None:
    assert {role: keys.load_pair(folder, role, public_of=public_of) for role in ROLES} == PAIRS
    assert keys.load_pair(folder, "user", "alice") == ALICE
    assert {role: keys.load_public(folder, role) for role in ROLES} == {r: p.public for r, p in PAIRS.items()}
    assert keys.load_public(folder, "user", "alice") == ALICE.public


def test_all_but_the_coordinator_are_let_in_under_their_names(folder: Path) -> None:
    expected = {PAIRS[role].public: role for role in ("server", "worker", "user")}
    assert keys.authorized(folder) == {**expected, ALICE.public: "user/alice"}


def test_only_pub_files_let_anyone_in(folder: Path) -> None:
    (folder / "worker.pub").unlink()
    (folder / "notes.txt").write_text("not a key\n")
    assert PAIRS["worker"].public not in keys.authorized(folder)


def test_a_host_needs_its_own_key_and_the_coordinators_public_one(folder: Path, tmp_path: Path) -> None:
    host = tmp_path / "host"
    host.mkdir()
    for name in ("worker.key", "coordinator.pub"):
        (folder / name).rename(host / name)
    assert keys.load_pair(host, "worker") == PAIRS["worker"]
    assert keys.load_public(host, "coordinator") == PAIRS["coordinator"].public


def test_names_may_hold_dashes(folder: Path) -> None:
    pair = new_key_pair()
    keys.add_key(folder, "server", "rack-3-b", pair)
    assert keys.authorized(folder)[pair.public] == "server/rack-3-b"


def test_a_server_is_known_by_address_or_by_the_other_key() -> None:
    client = ClientKeys(ALICE, {"tcp://a:1": "a" * 40}, "b" * 40)
    assert (client.server_at("tcp://a:1"), client.server_at("tcp://c:1")) == ("a" * 40, "b" * 40)


# ---------------------------------------------------------------- modes and owners


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], ids=oct)
def test_secrets_are_for_the_owner_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        keys.new_keys(tmp_path / "deep" / "keys", PAIRS)
    finally:
        os.umask(before)
    assert mode(tmp_path / "deep" / "keys") == 0o700
    assert {mode(path) for path in (tmp_path / "deep" / "keys").glob("*.key")} == {0o600}
    assert keys.authorized(tmp_path / "deep" / "keys"), "nobody but the owner may change what lets people in"


def test_secret_files_are_never_wider_than_their_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mode is given when the file is made, and only ever a new file is written."""
    made: list[tuple[str, int, int]] = []
    real = os.open

    def watched(path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
        made.append((str(path), flags, mode))
        return real(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", watched)
    keys.new_keys(tmp_path / "keys", PAIRS)
    secrets = [(flags, mode) for path, flags, mode in made if path.endswith(".key")]
    assert len(secrets) == len(ROLES)
    assert all(mode == 0o600 and flags & os.O_EXCL and flags & os.O_CREAT for flags, mode in secrets)


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o620, 0o602, 0o644, 0o666, 0o610], ids=oct)
def test_a_secret_that_others_can_reach_is_refused(folder: Path, loose: int) -> None:
    (folder / "worker.key").chmod(loose)
    with pytest.raises(ConfigError, match="chmod 600"):
        keys.load_pair(folder, "worker")


@pytest.mark.parametrize("loose", [0o664, 0o646, 0o666], ids=oct)
def test_a_public_key_that_others_can_change_is_refused(folder: Path, loose: int) -> None:
    (folder / "user-alice.pub").chmod(loose)
    for read in (lambda: keys.load_public(folder, "user", "alice"), lambda: keys.authorized(folder)):
        with pytest.raises(ConfigError, match="chmod go-w"):
            read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_public_key_that_a_stranger_put_there_is_refused(folder: Path) -> None:
    os.chown(folder / "user-alice.pub", 12345, -1)
    with pytest.raises(ConfigError, match="another user"):
        keys.authorized(folder)


# ---------------------------------------------------------------- writing


def test_existing_keys_are_never_overwritten(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"coordinator\.key exists"):
        keys.new_keys(folder, {role: new_key_pair() for role in ROLES})
    with pytest.raises(ConfigError, match=r"user-alice\.key exists"):
        keys.add_key(folder, "user", "alice", new_key_pair())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["worker.key", "user.pub"])
def test_one_file_in_the_way_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ConfigError, match=name):
        keys.new_keys(tmp_path, PAIRS)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        keys.new_keys(tmp_path / "keys", PAIRS)
    assert list((tmp_path / "keys").iterdir()) == []


@pytest.mark.parametrize("name", ["", "Alice", "a/b", "..", "../x", "a b", "a" * 65, "é", "a\n", ".", "a.key"])
def test_names_that_could_leave_the_folder_or_confuse_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        keys.add_key(tmp_path / "keys", "user", name, ALICE)
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("role", ["coordinator", "admin", "", "../worker"])
def test_only_known_roles_get_further_keys(tmp_path: Path, role: str) -> None:
    with pytest.raises(ConfigError):
        keys.add_key(tmp_path, role, "x", ALICE)


# ---------------------------------------------------------------- damaged files

DAMAGE: dict[str, Callable[[str], bytes]] = {
    "empty": lambda text: b"",
    "cut short": lambda text: text[: len(text) // 2].encode(),
    "last line alone": lambda text: text.splitlines()[-1].encode(),
    "not text": lambda text: b"\xff\xfe" + text.encode(),
    "zero bytes": lambda text: text.replace("=", "\0", 1).encode(),
    "key too short": lambda text: text.replace(PAIRS["worker"].public, "abc").encode(),
    "key with a space": lambda text: text.replace(PAIRS["worker"].public, " " + PAIRS["worker"].public[1:]).encode(),
    "key a number": lambda text: text.replace(f'"{PAIRS["worker"].public}"', "5").encode(),
    "no role": lambda text: text.replace('role = "worker"\n', "").encode(),
    "twice the same": lambda text: (text + text).encode(),
    "a private ssh key": lambda text: b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name_without_their_content(folder: Path, damage: str) -> None:
    for suffix in (".key", ".pub"):
        path = folder / f"worker{suffix}"
        path.write_bytes(DAMAGE[damage](path.read_text()))
    secret = PAIRS["worker"].secret
    for read in (
        lambda: keys.load_pair(folder, "worker"),
        lambda: keys.load_public(folder, "worker"),
        lambda: keys.authorized(folder),
    ):
        with pytest.raises(ConfigError, match=r"worker\.(key|pub) is damaged") as caught:
            read()
        said = everything_said(caught.value)
        assert not any(secret[at : at + 12] in said for at in range(len(secret) - 12))


def test_a_secret_in_the_wrong_place_is_refused_without_being_shown(folder: Path) -> None:
    secret = PAIRS["worker"].secret
    text = (folder / "worker.key").read_text()
    for broken in (
        text.replace(secret, secret[:-1]),
        text.replace(secret, secret + '"'),
        text.replace("secret =", "s ="),
    ):
        (folder / "worker.key").write_text(broken)
        with pytest.raises(ConfigError, match=r"worker\.key is damaged") as caught:
            keys.load_pair(folder, "worker")
        assert secret[:12] not in everything_said(caught.value)


def test_halves_that_do_not_belong_together_are_refused(folder: Path) -> None:
    path = folder / "worker.key"
    path.write_text(path.read_text().replace(PAIRS["worker"].public, PAIRS["user"].public))
    with pytest.raises(ConfigError, match="does not belong"):
        keys.load_pair(folder, "worker", public_of=public_of)


def test_a_key_of_another_role_or_name_is_refused(folder: Path) -> None:
    for suffix in (".key", ".pub"):
        (folder / f"user{suffix}").replace(folder / f"worker{suffix}")
    for read in (
        lambda: keys.load_pair(folder, "worker"),
        lambda: keys.load_public(folder, "worker"),
        lambda: keys.authorized(folder),
    ):
        with pytest.raises(ConfigError, match="another role or name"):
            read()


def test_one_key_cannot_have_two_owners(folder: Path) -> None:
    keys.add_key(folder, "user", "mallory", ALICE)
    with pytest.raises(ConfigError, match="every key has one owner"):
        keys.authorized(folder)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"user-bob\.key is missing"):
        keys.load_pair(folder, "user", "bob")
    (folder / "coordinator.pub").unlink()
    with pytest.raises(ConfigError, match=r"coordinator\.pub is missing; copy it"):
        keys.load_public(folder, "coordinator")
    with pytest.raises(ConfigError, match="downpour keys new"):
        keys.authorized(tmp_path / "nowhere")


def test_a_folder_in_the_place_of_a_file_is_no_crash(folder: Path) -> None:
    (folder / "worker.key").unlink()
    (folder / "worker.key").mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        keys.load_pair(folder, "worker")


# ---------------------------------------------------------------- secrets are not shown


def test_no_repr_shows_a_secret() -> None:
    shown = [ALICE, ClientKeys(ALICE, {}, "b" * 40), ServerKeys(ALICE, {ALICE.public: "user/alice"})]
    assert all(ALICE.secret not in f"{value!r} {value}" and ALICE.public in repr(value) for value in shown)


@pytest.mark.parametrize("which", ["public", "secret"])
@pytest.mark.parametrize("wrong", ["", "short", "x" * 39, "x" * 41, "x" * 39 + "\n", "x" * 39 + "é", "~" * 40])
def test_a_pair_of_other_text_is_refused_without_being_shown(which: str, wrong: str) -> None:
    given_ = {"public": ALICE.public, "secret": ALICE.secret, which: wrong}
    with pytest.raises(ConfigError) as caught:
        KeyPair(**given_)
    assert ALICE.secret not in str(caught.value)
    assert not wrong or wrong not in str(caught.value)


# ---------------------------------------------------------------- the doorman's answer

KEY = b"0123456789abcdef0123456789abcdef"
SOUND = [b"1.0", b"7", b"downpour", b"127.0.0.1", b"id", b"CURVE", KEY]


def _z85(key: bytes) -> str:
    from zmq.utils import z85

    return z85.encode(key).decode("ascii")


def test_a_known_key_is_let_in_as_itself() -> None:
    allowed = {_z85(KEY): "worker"}
    assert _zap_reply(SOUND, allowed) == [b"1.0", b"7", b"200", b"OK", _z85(KEY).encode(), b""]


@pytest.mark.parametrize(
    "request_",
    [
        [b"1.1", *SOUND[1:]],
        [*SOUND[:2], b"", *SOUND[3:]],
        [*SOUND[:2], b"global", *SOUND[3:]],
        [*SOUND[:5], b"NULL"],
        [*SOUND[:5], b"PLAIN", b"user", b"password"],
        [*SOUND[:5], b"GSSAPI", KEY],
        [*SOUND[:6], KEY[:31]],
        [*SOUND[:6], KEY + b"\0"],
        [*SOUND[:6], b"f" * 32],
        [*SOUND, b""],
        SOUND[:6],
        [b"1.0"],
        [],
    ],
    ids=lambda request: repr(request)[:60],
)
def test_whatever_is_not_exactly_right_is_turned_away(request_: list[bytes]) -> None:
    number = request_[1] if len(request_) > 1 else b""
    reply = _zap_reply(request_, {_z85(KEY): "worker", "": "nobody"})
    assert reply == [b"1.0", number, b"400", b"not authorized", b"", b""]


# ---------------------------------------------------------------- the command


def test_new_add_and_list_work_together(tmp_path: Path) -> None:
    folder, runner = str(tmp_path / "keys"), CliRunner()
    made = runner.invoke(keys_app, ["new", "--dir", folder])
    assert made.exit_code == 0, made.output
    assert "scp" in made.stdout
    again = runner.invoke(keys_app, ["new", "--dir", folder])
    assert (again.exit_code, again.stdout) == (2, "")
    assert "coordinator.key exists" in again.stderr
    added = runner.invoke(keys_app, ["add", "user", "--name", "alice", "--dir", folder, "--json"])
    assert [row["copy_to"] for row in json.loads(added.stdout)["files"]] == [["user"], ["coordinator"]]
    listed = runner.invoke(keys_app, ["list", "--dir", folder, "--json"])
    rows = json.loads(listed.stdout)["keys"]
    assert [row["user"] for row in rows] == ["coordinator", "server", "user", "user/alice", "worker"]
    secrets = [keys.load_pair(Path(folder), role).secret for role in ROLES]
    said = made.output + again.output + added.output + listed.output
    assert not any(secret in said for secret in secrets)


def test_new_says_in_json_which_file_goes_where(tmp_path: Path) -> None:
    made = CliRunner().invoke(keys_app, ["new", "--dir", str(tmp_path / "keys"), "--json"])
    files = json.loads(made.stdout)["files"]
    assert {Path(row["path"]).name for row in files} == {path.name for path in (tmp_path / "keys").iterdir()}
    coordinator = next(row for row in files if row["path"].endswith("coordinator.key"))
    assert coordinator["copy_to"] == ["coordinator"]
    assert all(row["secret"] == row["path"].endswith(".key") for row in files)


@pytest.mark.parametrize(
    "arguments",
    [["add", "admin", "--name", "x"], ["add", "coordinator", "--name", "x"], ["add", "user", "--name", "X"], ["list"]],
)
def test_usage_errors_end_with_2_and_say_why(tmp_path: Path, arguments: list[str]) -> None:
    ended = CliRunner().invoke(keys_app, [*arguments, "--dir", str(tmp_path / "nowhere")])
    assert ended.exit_code == 2
    assert ended.stderr.startswith("downpour: ")
    assert ended.stdout == ""


# ---------------------------------------------------------------- frames from authorised strangers

SAMPLE: dict[Any, Any] = {int: 1, float: 0.5, str: "j", bytes: b"b", bool: True, messages.Document: {"a": [1]}}


def _sample(hint: Any) -> Any:
    return SAMPLE.get(hint, (1, 2) if hint == tuple[int, ...] else ("x",) if hint == tuple[str, ...] else b"abcd")


VALID = [
    wire.encode(cls(**{f.name: _sample(get_type_hints(cls)[f.name]) for f in fields(cls)}))
    for cls in vars(messages).values()
    if isinstance(cls, type) and issubclass(cls, messages.Message) and "TAG" in vars(cls)
]


def _decoded(frames: list[wire.Frame]) -> None:
    try:
        assert isinstance(wire.decode(frames), messages.Message)
    except ProtocolError:
        pass


def test_the_samples_are_valid() -> None:
    assert len(VALID) > 20
    for frames in VALID:
        wire.decode(frames)


@given(st.data(), st.sampled_from(VALID), st.sampled_from(VALID))
def test_mutated_valid_frames_raise_nothing_but_protocol_errors(
    data: st.DataObject, first: list[wire.Frame], second: list[wire.Frame]
) -> None:
    """Whole frames exchanged, repeated, dropped, cut and glued; test_wire.py damages single headers."""
    pool = [bytes(frame) for frame in (*first, *second)]
    frames: list[wire.Frame] = []
    for _ in range(data.draw(st.integers(0, 4))):
        head, tail = data.draw(st.sampled_from(pool)), data.draw(st.sampled_from(pool))
        cut = data.draw(st.integers(0, len(head)))
        frame = bytearray(head[:cut] + tail[data.draw(st.integers(0, len(tail))) :])
        if frame and data.draw(st.booleans()):
            frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        frames.append(data.draw(st.sampled_from([bytes, bytearray, memoryview]))(bytes(frame)))
    _decoded(frames)


@given(st.sampled_from(VALID), st.integers(0, 40), st.sampled_from([0x91, 0x81, 0xDC, 0xDD, 0xDE, 0xDF, 0xC6, 0xDB]))
def test_claims_of_size_and_depth_raise_nothing_but_protocol_errors(
    frames: list[wire.Frame], at: int, kind: int
) -> None:
    header = bytes(frames[0])
    for claim in (bytes([kind]) * 2000, bytes([kind, 0xFF, 0xFF, 0xFF, 0xFF])):
        _decoded([header[:at] + claim + header[at:], *frames[1:]])


@given(st.lists(st.binary(max_size=200), max_size=3), st.integers(0, 127))
def test_arbitrary_fields_under_any_tag_raise_nothing_but_protocol_errors(fields_: list[bytes], tag: int) -> None:
    _decoded([msgpack.packb([tag, *fields_])])
    _decoded([bytes([0x90 + len(fields_) + 1, tag]) + b"".join(fields_), b"payload"])
