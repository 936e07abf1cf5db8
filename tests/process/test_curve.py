"""Attacks on a server with keys, over real sockets: who has no business there gets nothing and changes nothing."""

from __future__ import annotations

import asyncio
import ctypes
import random
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from downpour_common import messages as m
from downpour_common import wire
from downpour_common.keys import ClientKeys, KeyPair, ServerKeys
from downpour_common.transport.zeromq import MAX_FRAME_BYTES, ZmqClient, ZmqServer, new_key_pair

pytestmark = [pytest.mark.process, pytest.mark.timeout(90)]

ANYWHERE = "tcp://127.0.0.1:0"
PATIENCE_S = 30.0
HOUSE, WORKER, ALICE, MALLORY, STRANGER = (new_key_pair() for _ in range(5))
OTHER_HOUSE = new_key_pair()


def allowed() -> dict[str, str]:
    """Whom the server lets in; Mallory is let in too, and means no good."""
    return {WORKER.public: "worker", ALICE.public: "user/alice", MALLORY.public: "user/mallory"}


def note(text: str) -> m.Refused:
    """A small message."""
    return m.Refused(1, "", text)


def until(condition: Callable[[], Any], what: str) -> None:
    """Try again and again until it holds; ``condition`` waits a little by itself, by polling a socket."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"no {what} within {PATIENCE_S:g} s"


class Echo:
    """A server that answers each message with itself, in a thread of its own; ``seen``: (user, text or tag)."""

    def __init__(self, keys: ServerKeys | None, endpoint: str = ANYWHERE) -> None:
        self.server = ZmqServer(endpoint, keys=keys)
        self.address = self.server.address
        self.seen: list[tuple[str, str]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            for peer, user, message in self.server.poll_users(0.02):
                self.seen.append((user, message.reason if isinstance(message, m.Refused) else type(message).__name__))
                self.server.send(peer, message)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.server.close()


@contextmanager
def echo(keys: ServerKeys | None, endpoint: str = ANYWHERE) -> Iterator[Echo]:
    server = Echo(keys, endpoint)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def client(pair: KeyPair | None, server: KeyPair = HOUSE) -> Iterator[ZmqClient]:
    keys = None if pair is None else ClientKeys(pair, {}, server.public)
    made = ZmqClient(keys=keys, watch=True)
    try:
        yield made
    finally:
        made.close()


def ask(asking: ZmqClient, address: str, text: str) -> None:
    """Send once and wait for the answer."""
    asking.send(address, note(text))
    got: list[m.Message] = []

    def answered() -> bool:
        got.extend(message for _, message in asking.poll(0.05))
        return note(text) in got

    until(answered, f"answer to {text!r}")


def ask_again_and_again(asking: ZmqClient, address: str, text: str) -> None:
    """Send until there is an answer, as one must to a server that may turn one down at first."""
    got: list[m.Message] = []

    def answered() -> bool:
        asking.send(address, note(text))
        got.extend(message for _, message in asking.poll(0.05))
        return note(text) in got

    until(answered, f"answer to {text!r}")


def turned_away(asking: ZmqClient, address: str, why: str) -> None:
    """Send, and wait until the client knows that it was in vain, and why."""

    def known() -> bool:
        asking.send(address, note("let me in"))
        assert asking.poll(0.05) == []
        return asking.trouble(address) == why

    until(known, f"{why!r} (it says {asking.trouble(address)!r})")


class Wild:
    """Sockets that do what :class:`ZmqClient` does not."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self.context.set(zmq.MAX_SOCKETS, 4000)
        self._tcp: list[socket.socket] = []
        self._dealers: list[zmq.Socket[bytes]] = []

    def dealer(
        self, address: str, pair: KeyPair | None, name: bytes = b"", connect: bool = True, **options: int
    ) -> zmq.Socket[bytes]:
        sock = self.socket()
        if pair is not None:
            sock.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.encode())
            sock.setsockopt(zmq.CURVE_SECRETKEY, pair.secret.encode())
            sock.setsockopt(zmq.CURVE_SERVERKEY, HOUSE.public.encode())
        if name:
            sock.setsockopt(zmq.ROUTING_ID, name)
        for option, value in options.items():
            sock.setsockopt(getattr(zmq, option), value)
        if connect:
            sock.connect(address)
        return sock

    def socket(self) -> zmq.Socket[bytes]:
        sock = self.context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        self._dealers.append(sock)
        return sock

    def tcp(self, address: str) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port_of(address)), timeout=PATIENCE_S)
        self._tcp.append(sock)
        return sock

    def close(self) -> None:
        for sock in self._tcp:
            sock.close()
        for dealer in self._dealers:
            dealer.close()
        self.context.term()


@pytest.fixture
def wild() -> Iterator[Wild]:
    made = Wild()
    yield made
    made.close()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def read_to_the_end(raw: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    data = b""
    try:
        while more := raw.recv(4096):
            data += more
    except ConnectionResetError:
        pass
    return data


def exactly(raw: socket.socket, count: int) -> bytes:
    """The next ``count`` bytes."""
    data = b""
    while len(data) < count:
        more = raw.recv(count - len(data))
        assert more, f"closed after {len(data)} of {count} bytes"
        data += more
    return data


def await_event(monitor: zmq.Socket[bytes], *wanted: int) -> None:
    """Wait until libzmq reports one of these."""

    def happened() -> bool:
        return bool(monitor.poll(50)) and struct.unpack("=HI", monitor.recv_multipart()[0])[0] in wanted

    until(happened, f"event {wanted}")


def frames_of(message: m.Message) -> list[Any]:
    return list(wire.encode(message))


@pytest.fixture
def house() -> Iterator[Echo]:
    """A server with keys. Whatever a test did to it, it serves those who may come in, and nobody else was heard."""
    with echo(ServerKeys(HOUSE, allowed())) as server:
        yield server
        with client(ALICE) as alice:
            ask(alice, server.address, "still there?")
        assert ("", "let me in") not in server.seen
        assert {user for user, _ in server.seen} <= {"worker", "user/alice", "user/mallory"}
        assert server.seen[-1] == ("user/alice", "still there?")


# ---------------------------------------------------------------- those who may


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_every_message_comes_with_the_user_of_its_connection(tmp_path: Path, transport: str) -> None:
    endpoint = ANYWHERE if transport == "tcp" else f"ipc://{tmp_path}/socket"
    with echo(ServerKeys(HOUSE, allowed()), endpoint) as server, client(WORKER) as worker, client(ALICE) as alice:
        for text in ("a", "b"):
            ask(worker, server.address, text)
            ask(alice, server.address, text)
        assert server.seen == [("worker", "a"), ("user/alice", "a"), ("worker", "b"), ("user/alice", "b")]
        assert (worker.trouble(server.address), alice.trouble(server.address)) == ("", "")


def test_large_payloads_arrive_whole_and_with_their_user(house: Echo) -> None:
    payload = random.Random(1).randbytes(3 << 20)
    with client(WORKER) as worker:
        worker.send(house.address, m.Weights(1, 2, 3, payload))
        got: list[m.Message] = []
        until(lambda: got.extend(message for _, message in worker.poll(0.05)) or got, "answer")
        (answer,) = got
        assert isinstance(answer, m.Weights)
        assert bytes(answer.payload) == payload
    assert ("worker", "Weights") in house.seen


def test_without_keys_nobody_has_a_name() -> None:
    with echo(None) as server, client(None) as anyone:
        ask(anyone, server.address, "a")
        assert server.seen == [("", "a")]


def test_a_client_with_servers_of_different_keys_knows_them_apart() -> None:
    with echo(ServerKeys(HOUSE, allowed())) as one, echo(ServerKeys(OTHER_HOUSE, allowed())) as two:
        asking = ZmqClient(keys=ClientKeys(WORKER, {two.address: OTHER_HOUSE.public}, HOUSE.public))
        try:
            ask(asking, one.address, "one")
            ask(asking, two.address, "two")
        finally:
            asking.close()
        assert (one.seen, two.seen) == ([("worker", "one")], [("worker", "two")])


# ---------------------------------------------------------------- those who may not


def test_a_client_without_keys_is_refused(house: Echo) -> None:
    with client(None) as stranger:
        turned_away(stranger, house.address, "refused")


def test_a_client_with_an_unknown_key_is_refused(house: Echo) -> None:
    with client(STRANGER) as stranger:
        turned_away(stranger, house.address, "refused")


def test_a_client_that_claims_the_servers_own_key_is_refused(house: Echo) -> None:
    """The server's key lets nobody in unless the list says so."""
    with client(HOUSE) as stranger:
        turned_away(stranger, house.address, "refused")


def test_a_public_key_without_its_secret_opens_nothing(house: Echo) -> None:
    with client(KeyPair(ALICE.public, STRANGER.secret)) as stranger:
        turned_away(stranger, house.address, "wrong-server-key")


def test_a_client_does_not_talk_to_a_server_with_another_key() -> None:
    with echo(ServerKeys(OTHER_HOUSE, allowed())) as server, client(WORKER) as worker:
        turned_away(worker, server.address, "wrong-server-key")
        assert server.seen == []


def test_a_client_with_keys_does_not_talk_to_a_server_without() -> None:
    with echo(None) as server, client(WORKER) as worker:
        turned_away(worker, server.address, "wrong-server-key")
        assert server.seen == []


def test_a_password_is_no_key(house: Echo, wild: Wild) -> None:
    sock = wild.socket()
    sock.setsockopt(zmq.PLAIN_USERNAME, b"user/alice")
    sock.setsockopt(zmq.PLAIN_PASSWORD, WORKER.public.encode())
    monitor = sock.get_monitor_socket()
    sock.connect(house.address)
    sock.send(frames_of(note("let me in"))[0])
    await_event(monitor, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    sock.disable_monitor()
    monitor.close()


def test_nobody_listening_is_told_from_being_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # held without listening, so that nobody else gets it
        with client(WORKER) as worker:
            turned_away(worker, f"tcp://127.0.0.1:{free.getsockname()[1]}", "unreachable")


# ---------------------------------------------------------------- coming back


def test_a_message_waits_for_a_server_that_is_late(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/socket"
    with client(WORKER) as worker:
        worker.send(endpoint, note("early"))
        until(lambda: worker.poll(0.01) or worker.trouble(endpoint) == "unreachable", "finding that nobody is there")
        with echo(ServerKeys(HOUSE, allowed()), endpoint):
            until(lambda: worker.poll(0.05) == [(endpoint, note("early"))], "answer")
            assert worker.trouble(endpoint) == ""


def test_clients_find_a_server_that_was_restarted(wild: Wild) -> None:
    with client(WORKER) as worker:
        with echo(ServerKeys(HOUSE, allowed())) as first:
            ask(worker, first.address, "before")
        with echo(ServerKeys(HOUSE, allowed()), first.address) as second:
            ask_again_and_again(worker, second.address, "after")
            assert set(second.seen) == {("worker", "after")}


def test_a_server_restarted_with_another_key_is_noticed() -> None:
    with client(WORKER) as worker:
        with echo(ServerKeys(HOUSE, allowed())) as first:
            ask(worker, first.address, "before")
        with echo(ServerKeys(OTHER_HOUSE, allowed()), first.address) as second:
            turned_away(worker, second.address, "wrong-server-key")
            assert second.seen == []


@pytest.mark.parametrize("watch", [True, False])
def test_a_key_that_is_authorised_late_gets_in_late(watch: bool) -> None:
    keys = ServerKeys(HOUSE, allowed())
    with echo(keys) as server, client(STRANGER) as sentinel:
        asking = ZmqClient(keys=ClientKeys(STRANGER, {}, HOUSE.public), watch=watch)
        try:
            asking.send(server.address, note("in vain"))
            turned_away(sentinel, server.address, "refused")
            if watch:
                turned_away(asking, server.address, "refused")
            assert server.seen == []
            keys.allowed[STRANGER.public] = "user/new"
            ask_again_and_again(asking, server.address, "at last")
            assert set(server.seen) == {("user/new", "at last")}
        finally:
            asking.close()


# ---------------------------------------------------------------- withdrawn keys


@pytest.mark.parametrize("method", ["poll", "poll_users"])
def test_a_withdrawn_key_is_cut_off_on_open_connections_too(method: str) -> None:
    keys = ServerKeys(HOUSE, allowed())
    server = ZmqServer(ANYWHERE, keys=keys)
    seen: list[str] = []

    def look() -> None:
        seen.extend(arrived[-1].reason for arrived in getattr(server, method)(0.02))

    with client(ALICE) as alice, client(WORKER) as worker:
        try:
            alice.send(server.address, note("a1"))
            worker.send(server.address, note("w1"))
            until(lambda: look() or len(seen) == 2, "both")
            alice.send(server.address, note("a2"))  # on its way, or here already: not handed out yet
            del keys.allowed[ALICE.public]
            alice.send(server.address, note("a3"))
            until(lambda: look() or server.refused == 2, "two refused messages")
            worker.send(server.address, note("w2"))
            until(lambda: look() or "w2" in seen, "the other client")
            with client(ALICE) as again:
                turned_away_by(server, again)
            assert sorted(seen) == ["a1", "w1", "w2"]
            keys.allowed[ALICE.public] = "user/alice"
            alice.send(server.address, note("a4"))
            until(lambda: look() or "a4" in seen, "the key that is back")
            assert server.malformed == 0
        finally:
            server.close()


def turned_away_by(server: ZmqServer, asking: ZmqClient) -> None:
    """Like :func:`turned_away`, with a server that nobody else polls."""

    def known() -> bool:
        asking.send(server.address, note("let me in"))
        assert server.poll(0) == []
        asking.poll(0.02)
        return asking.trouble(server.address) == "refused"

    until(known, "refusal")


def test_two_keys_of_one_user_are_withdrawn_one_by_one() -> None:
    keys = ServerKeys(HOUSE, {ALICE.public: "worker", WORKER.public: "worker"})
    with echo(keys) as server, client(ALICE) as lost, client(WORKER) as kept:
        ask(lost, server.address, "lost")
        ask(kept, server.address, "kept")
        del keys.allowed[ALICE.public]
        lost.send(server.address, note("again"))
        until(lambda: lost.poll(0.02) or server.server.refused == 1, "refused message")
        ask(kept, server.address, "kept again")
        assert server.seen == [("worker", "lost"), ("worker", "kept"), ("worker", "kept again")]


# ---------------------------------------------------------------- stolen routing ids


def test_a_stolen_routing_id_gets_no_answers_and_no_name(house: Echo, wild: Wild) -> None:
    victim = wild.dealer(house.address, ALICE, b"victim")

    def mine(number: int) -> None:
        victim.send_multipart(frames_of(note(f"mine {number}")))
        assert victim.poll(PATIENCE_S * 1000)
        assert wire.decode(victim.recv_multipart()) == note(f"mine {number}")

    mine(0)
    thief = wild.dealer(house.address, MALLORY, b"victim", connect=False)
    monitor = thief.get_monitor_socket()
    thief.connect(house.address)
    await_event(monitor, zmq.EVENT_HANDSHAKE_SUCCEEDED)
    thief.disable_monitor()
    monitor.close()
    for number in range(1, 50):
        thief.send_multipart(frames_of(note(f"stolen {number}")))
        mine(number)
    assert not thief.poll(200)
    assert house.seen == [("user/alice", f"mine {number}") for number in range(50)]

    # Once the victim has gone its routing id is free, and whoever takes it still speaks under his own name.
    victim.close()

    def heard() -> bool:
        heir = wild.dealer(house.address, MALLORY, b"victim")
        heir.send_multipart(frames_of(note("stolen at last")))
        try:
            return bool(heir.poll(200))  # none while the server has not noticed yet that the victim has gone
        finally:
            heir.close()

    until(heard, "answer to the heir")
    assert house.seen[-1] == ("user/mallory", "stolen at last")
    assert house.seen[:50] == [("user/alice", f"mine {number}") for number in range(50)]


def test_routing_ids_that_the_server_gives_out_cannot_be_guessed(wild: Wild) -> None:
    """libzmq aborts the process when a client has taken the id it gives out next, and counts from a known number."""
    given = set()
    for _ in range(2):
        ctypes.CDLL(None).srand(1)  # as in a fresh process
        server = ZmqServer(ANYWHERE)
        try:
            wild.dealer(server.address, None).send_multipart(frames_of(note("a")))
            given |= {peer for peer, _ in server.poll(PATIENCE_S)}
        finally:
            server.close()
    assert len(given) == 2
    assert bytes.fromhex("006b8b4567") not in given


# ---------------------------------------------------------------- replay


class Recorder:
    """A TCP proxy that keeps what clients send. One thread; bytes are handed on as they come."""

    def __init__(self, address: str) -> None:
        self._target = ("127.0.0.1", port_of(address))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.recorded: list[bytes] = []
        self.alter: Callable[[bytes], bytes] | None = None
        """What is done to the next bytes from a client, once."""
        self.closed_by_server = threading.Event()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        others: dict[socket.socket, socket.socket] = {}
        servers: set[socket.socket] = set()
        while True:
            ready, _, _ = select.select([self._stopped, self._listener, *others], [], [])
            if self._stopped in ready:
                break
            for sock in ready:
                if sock is self._listener:
                    near, _ = sock.accept()
                    far = socket.create_connection(self._target)
                    servers.add(far)
                    others |= {near: far, far: near}
                elif sock in others:
                    self._hand_on(sock, sock in servers, others)
        for sock in [*others, self._listener, self._stopped]:
            sock.close()

    def _hand_on(self, sock: socket.socket, from_server: bool, others: dict[socket.socket, socket.socket]) -> None:
        try:
            data = sock.recv(1 << 20)
            if data and not from_server:
                self.recorded.append(data)
                if self.alter is not None:
                    data, self.alter = self.alter(data), None
            others[sock].sendall(data)
        except OSError:
            data = b""
        if not data:
            if from_server:
                self.closed_by_server.set()
            other = others.pop(sock)
            del others[other]
            sock.close()
            other.close()

    def close(self) -> None:
        self._stop.send(b"x")
        self._thread.join()
        self._stop.close()


@pytest.fixture
def recorder(house: Echo) -> Iterator[Recorder]:
    made = Recorder(house.address)
    yield made
    made.close()


def test_a_recorded_conversation_played_again_changes_nothing(house: Echo, recorder: Recorder, wild: Wild) -> None:
    with client(ALICE) as alice:
        ask(alice, recorder.address, "pay mallory")
    recording = b"".join(recorder.recorded)
    assert b"pay mallory" not in recording
    assert recording[66:72] == b"\x05HELLO"
    raw = wild.tcp(house.address)
    # Step by step as the client did: libzmq hangs up on whoever does not wait for its part.
    raw.sendall(recording[:64])
    exactly(raw, 64)
    raw.sendall(recording[64:266])
    assert b"\x07WELCOME" in exactly(raw, 170)
    raw.sendall(recording[266:])
    assert b"READY" not in read_to_the_end(raw)
    assert house.seen == [("user/alice", "pay mallory")]


def test_a_message_played_again_into_its_own_connection_changes_nothing(house: Echo, recorder: Recorder) -> None:
    with client(ALICE) as alice:
        ask(alice, recorder.address, "begin")
        recorder.alter = lambda data: data + data
        alice.send(recorder.address, note("pay mallory"))
        assert recorder.closed_by_server.wait(PATIENCE_S), "the server hangs up on a number it has seen"
        ask_again_and_again(alice, recorder.address, "end")
    assert house.seen.count(("user/alice", "pay mallory")) <= 1


def test_a_flipped_bit_ends_the_connection_and_nothing_else(house: Echo, recorder: Recorder) -> None:
    with client(ALICE) as alice:
        ask(alice, recorder.address, "begin")
        recorder.alter = lambda data: data[:-1] + bytes([data[-1] ^ 1])
        alice.send(recorder.address, note("tampered"))
        assert recorder.closed_by_server.wait(PATIENCE_S)
        ask_again_and_again(alice, recorder.address, "end")
    assert ("user/alice", "tampered") not in house.seen
    assert house.server.malformed == 0, "it never came so far"


# ---------------------------------------------------------------- frames and bytes that mean harm

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING = SIGNATURE + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
NULL_GREETING = SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
HELLO = b"\x05HELLO\x01\x00"
NOISE = random.Random(5).randbytes(4096)

HOSTILE: dict[str, bytes] = {
    "noise": NOISE,
    "a web browser": b"GET / HTTP/1.1\r\nHost: downpour\r\n\r\n",
    "another mechanism": NULL_GREETING + b"\x04" + bytes([len(READY)]) + READY,
    "no mechanism": SIGNATURE + b"\x03\x01" + bytes(52),
    "version 1 of the protocol": b"\x01\x00" + b"\x05\x00hallo",
    "a message before the handshake": GREETING + b"\x00\x05hello",
    "a command of 2**62 bytes": GREETING + b"\x06" + (1 << 62).to_bytes(8, "big") + NOISE,
    "a command of all ones": GREETING + b"\x06" + b"\xff" * 8 + NOISE,
    "a command just above the limit": GREETING + b"\x06" + (MAX_FRAME_BYTES + 1).to_bytes(8, "big") + NOISE,
    "an empty command": GREETING + b"\x04\x00",
    "a HELLO of noise": GREETING + b"\x04\xc8" + HELLO + NOISE[: 200 - len(HELLO)],
    "a HELLO cut short": GREETING + b"\x04" + bytes([len(HELLO)]) + HELLO,
    "an INITIATE first": GREETING + b"\x06" + (257).to_bytes(8, "big") + b"\x08INITIATE" + NOISE[:248],
    "a READY first": GREETING + b"\x04" + bytes([len(READY)]) + READY,
}
SILENT: dict[str, bytes] = {
    "nothing": b"",
    "half a greeting": GREETING[:30],
    "one byte": b"\xff",
    "a greeting": GREETING,
    "half a HELLO": GREETING + b"\x04\xc8" + HELLO + NOISE[:50],
    "the begin of a large command": GREETING + b"\x06" + (60 << 20).to_bytes(8, "big") + NOISE,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_the_server_hangs_up_on_whoever_does_not_keep_to_the_protocol(house: Echo, wild: Wild, what: str) -> None:
    raw = wild.tcp(house.address)
    data = HOSTILE[what]
    if data.startswith(GREETING):  # wait for the server's, so that what follows is looked at as a handshake
        raw.sendall(GREETING)
        exactly(raw, 64)
        data = data.removeprefix(GREETING)
    raw.sendall(data)
    said = read_to_the_end(raw)
    assert HOUSE.secret.encode() not in said
    assert b"WELCOME" not in said
    assert house.seen == []


def test_those_who_fall_silent_disturb_nobody_and_are_put_out(house: Echo, wild: Wild) -> None:
    silent = []
    for data in list(SILENT.values()) * 5:
        silent.append(wild.tcp(house.address))
        silent[-1].sendall(data)
    with client(WORKER) as worker:
        for number in range(20):
            ask(worker, house.address, str(number))
    for raw in silent:
        read_to_the_end(raw)  # comes back once the server's limit for handshakes has passed


def test_frames_above_the_limit_close_the_connection_that_sent_them(house: Echo, wild: Wild) -> None:
    large = wild.dealer(house.address, MALLORY)
    monitor = large.get_monitor_socket()
    with client(WORKER) as worker:
        ask(worker, house.address, "before")
        large.send_multipart([*frames_of(m.Weights(1, 2, 3, b""))[:1], bytes(MAX_FRAME_BYTES + 1)])
        await_event(monitor, zmq.EVENT_DISCONNECTED)
        ask(worker, house.address, "after")
    large.disable_monitor()
    monitor.close()
    assert house.seen == [("worker", "before"), ("worker", "after")]


def test_malformed_messages_are_counted_and_hide_nothing(wild: Wild) -> None:
    """An empty list means that nothing waits, whatever was dropped: an event loop hears of it only once."""
    server = ZmqServer(ANYWHERE, keys=ServerKeys(HOUSE, allowed()))
    try:
        mallory = wild.dealer(server.address, MALLORY)
        for _ in range(500):
            mallory.send_multipart([b"nonsense"])
        mallory.send_multipart(frames_of(note("sound")))
        seen: list[str] = []

        def look() -> bool:
            # All 501 are there once the last is; then one look must find it, however many come before.
            found = server.poll_users(0.05)
            seen.extend(user for _, user, _ in found)
            return bool(found)

        until(look, "the sound message")
        assert (seen, server.malformed, server.refused) == (["user/mallory"], 500, 0)
    finally:
        server.close()


def test_an_event_loop_sees_every_message(wild: Wild) -> None:
    """The descriptor tells of a change only; the pump that follows takes all there is."""

    async def listen(server: ZmqServer, wanted: int) -> list[str]:
        seen: list[str] = []
        complete = asyncio.Event()

        def pump() -> None:
            while arrived := server.poll_users(0):
                for peer, user, message in arrived:
                    seen.append(user)
                    server.send(peer, message)
            if len(seen) >= wanted:
                complete.set()

        loop = asyncio.get_running_loop()
        loop.add_reader(server.fileno(), pump)
        pump()
        await asyncio.wait_for(complete.wait(), PATIENCE_S)
        loop.remove_reader(server.fileno())
        return seen

    server = ZmqServer(ANYWHERE, keys=ServerKeys(HOUSE, allowed()))
    try:
        for number in range(600):
            sender = wild.dealer(server.address, (WORKER, ALICE, MALLORY)[number % 3])
            sender.send_multipart(frames_of(note(str(number))))
            if number % 3 == 0:
                sender.send_multipart([b"nonsense"])
        seen = asyncio.run(listen(server, 600))
    finally:
        server.close()
    assert {user: seen.count(user) for user in seen} == {"worker": 200, "user/alice": 200, "user/mallory": 200}


# ---------------------------------------------------------------- crowds


def test_a_thousand_clients_at_once_are_all_served(wild: Wild, capsys: pytest.CaptureFixture[str]) -> None:
    crowd = 1000
    descriptors = 4 * crowd  # a socket's own, its connection's two ends, and room
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < descriptors:
        if hard < descriptors:
            pytest.skip(f"needs {descriptors} file descriptors, may have {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, hard))
    pairs = [new_key_pair() for _ in range(crowd)]
    keys = ServerKeys(HOUSE, {pair.public: f"user/{number}" for number, pair in enumerate(pairs)})
    with echo(keys) as server:
        poller = zmq.Poller()
        started_s = time.perf_counter()
        for number, pair in enumerate(pairs):
            sock = wild.dealer(server.address, pair)
            sock.send_multipart(frames_of(note(str(number))))
            poller.register(sock, zmq.POLLIN)
        answers = []
        while len(answers) < crowd:
            ready = poller.poll(PATIENCE_S * 1000)
            assert ready, f"{len(answers)} of {crowd} were served"
            for sock, _ in ready:
                answers.append(wire.decode(sock.recv_multipart()))
                poller.unregister(sock)
        took_s = time.perf_counter() - started_s
        assert sorted(server.seen) == sorted((f"user/{number}", str(number)) for number in range(crowd))
    with capsys.disabled():
        print(f" [{crowd} clients with CURVE: {took_s:.2f} s]", end="")


def test_idle_clients_and_one_that_never_reads_hold_nobody_up(house: Echo, wild: Wild) -> None:
    idle = [wild.dealer(house.address, ALICE) for _ in range(200)]
    for sock in idle:
        sock.send_multipart(frames_of(note("here")))
    for sock in idle:
        assert sock.poll(PATIENCE_S * 1000)
    greedy = wild.dealer(house.address, MALLORY, RCVHWM=1, RCVBUF=4096)
    payload = bytes(256 << 10)
    with client(WORKER) as worker:
        for number in range(300):
            greedy.send_multipart(frames_of(m.Weights(1, 2, 3, payload)))
            if number % 3 == 0:
                ask(worker, house.address, str(number))
        until(lambda: not time.sleep(0.01) and len(house.seen) == 600, "all requests of the greedy one")
        ask(worker, house.address, "end")
    assert house.seen.count(("user/mallory", "Weights")) == 300
