"""Those calls into libzmq that never wait, made with Python's lock kept.

pyzmq gives the lock away around every call. Where another thread of the process computes in Python, getting it back
takes a switch interval (5 ms) each time, several times per message, whatever the message's size. The calls here take
a few microseconds, so nobody else misses the lock; only :meth:`Library.wait` gives it away.

pyzmq also has a thread that wakes up, and wants the lock, for each message sent without a copy. Here libzmq itself
notes in a flag that it has finished with the memory, see :data:`_NOTE`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from typing import Any

from downpour_common.errors import ConfigError
from downpour_common.wire import Frame

LENT_BYTES = 16 << 10
"""Frames that arrive are used where libzmq has put them from this size on; below, a copy is cheaper."""
_FLAGS = 1024
"""Flags made at a time."""
_SWEEP = 32
"""Finished sends that may lie behind an unfinished one before they are looked for."""

_NOTE = "pthread_mutexattr_getrobust"
"""What libzmq calls with a message's memory and a flag's address when it has finished with the memory.

It has to be a C function of two pointers that needs nothing of Python and writes something known through the second
one. This one reads four bytes of the message and writes, whatever they are, 0 or 1, in glibc and in musl.
"""
_PENDING = -1
_DONTWAIT, _SNDMORE, _POLLIN = 1, 2, 1

_free_flags: list[ctypes.c_int] = []


class _Message(ctypes.Structure):
    """``zmq_msg_t``."""

    _fields_ = [("_", ctypes.c_uint64 * 8)]


class _PollItem(ctypes.Structure):
    """``zmq_pollitem_t``."""

    _fields_ = [
        ("socket", ctypes.c_void_p),
        ("fd", ctypes.c_int),
        ("events", ctypes.c_short),
        ("revents", ctypes.c_short),
    ]


class Lent:
    """A send from the caller's own memory, which must stay as it is until :attr:`done`."""

    __slots__ = ("_flag", "_owner")

    def __init__(self, flag: ctypes.c_int, owner: object) -> None:
        self._flag: ctypes.c_int | None = flag
        self._owner = owner

    @property
    def done(self) -> bool:
        """Whether libzmq no longer reads the memory; once it does not, the memory is let go."""
        flag = self._flag
        if flag is None:
            return True
        if flag.value == _PENDING:
            return False
        _free_flags.append(flag)
        self._flag = self._owner = None
        return True


class Lends:
    """The sends of one context that may not have finished; keeps their memory until :meth:`clear` after its end."""

    def __init__(self) -> None:
        self._open: deque[Lent] = deque()
        self._sweep_at = _SWEEP

    def add(self, lent: Lent) -> None:
        """Keep it until it is done."""
        self._open.append(lent)

    def release(self) -> None:
        """Let go of what has finished; behind a peer that does not read, only now and then."""
        while self._open and self._open[0].done:
            self._open.popleft()
        if len(self._open) >= self._sweep_at:
            self._open = deque(lent for lent in self._open if not lent.done)
            self._sweep_at = 2 * len(self._open) + _SWEEP

    def clear(self) -> None:
        """Nothing is under way any more."""
        self._open.clear()


class Waiting:
    """What :meth:`Library.wait` waits for: sockets, and perhaps a descriptor, which comes last."""

    def __init__(self, handles: list[int], descriptor: int | None = None) -> None:
        items = [_PollItem(handle, 0, _POLLIN, 0) for handle in handles]
        if descriptor is not None:
            items.append(_PollItem(None, descriptor, _POLLIN, 0))
        self.count = len(items)
        self.items = (_PollItem * max(1, len(items)))(*items)


class _Arrived:
    """Owns a message of libzmq's."""

    __slots__ = ("_close", "message")

    def __init__(self, message: _Message, close: Any) -> None:
        self.message = message
        self._close = close

    def __del__(self) -> None:
        self._close(ctypes.byref(self.message))


class Library:
    """libzmq, by the path of something that is linked to it. Raises :class:`ConfigError` when it is not."""

    def __init__(self, path: str) -> None:
        kept, given = ctypes.PyDLL(path, use_errno=True), ctypes.CDLL(path, use_errno=True)
        if not hasattr(kept, "zmq_msg_init_data"):
            raise ConfigError("this pyzmq does not let its libzmq be seen; install one of its wheels from PyPI")
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        message = ctypes.POINTER(_Message)
        self.send = _declare(kept, "zmq_send", number, pointer, pointer, size, number)
        self.init = _declare(kept, "zmq_msg_init", number, message)
        self.init_data = _declare(kept, "zmq_msg_init_data", number, message, pointer, size, pointer, pointer)
        self.msg_send = _declare(kept, "zmq_msg_send", number, message, pointer, number)
        self.msg_recv = _declare(kept, "zmq_msg_recv", number, message, pointer, number)
        self.data = _declare(kept, "zmq_msg_data", pointer, message)
        self.more = _declare(kept, "zmq_msg_more", number, message)
        self.gets = _declare(kept, "zmq_msg_gets", ctypes.c_char_p, message, ctypes.c_char_p)
        self.close = _declare(kept, "zmq_msg_close", number, message)
        self._poll = _declare(given, "zmq_poll", number, ctypes.POINTER(_PollItem), number, ctypes.c_long)
        self.note = _find_note()

    def wait(self, waiting: Waiting, timeout_ms: int) -> list[int]:
        """Places in ``waiting`` where something may have arrived; waits at most so long for the first."""
        found = self._poll(waiting.items, waiting.count, timeout_ms)
        if found < 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                return []
            raise OSError(number, os.strerror(number))
        return [i for i in range(waiting.count) if waiting.items[i].revents] if found else []


class Line:
    """One open socket, by its handle; for one thread at a time."""

    def __init__(self, library: Library, handle: int, lends: Lends) -> None:
        self.handle = handle
        self._library = library
        self._lends = lends
        self._spare = self._new_message()

    def send(self, frames: list[Frame], lend_from: int) -> Lent | None:
        """Queue ``frames`` as one message; the last one, if of ``lend_from`` bytes or more, from its own memory.

        Returns that send, or None when everything has been copied. Raises :class:`OSError` with libzmq's number
        (:class:`BlockingIOError` when the queue is full or nobody is there to queue for).
        """
        *heads, last = frames
        for head in heads:
            self._copy(head, _SNDMORE | _DONTWAIT)
        if memoryview(last).nbytes < lend_from or self._library.note is None:
            self._copy(last, _DONTWAIT)
            return None
        return self._lend(last)

    def receive(self, heads: int) -> tuple[list[Frame], str] | None:
        """The next message's frames, and the user that the server's list has for its connection; None: none waits.

        The first ``heads`` frames are ``bytes``; those after them belong to the caller, who may write to them.
        """
        library, frames = self._library, list[Frame]()
        while True:
            reference = ctypes.byref(self._spare)
            size = library.msg_recv(reference, self.handle, _DONTWAIT)
            if size < 0:
                if (number := ctypes.get_errno()) == errno.EINTR:
                    continue
                if number == errno.EAGAIN:
                    return None
                raise OSError(number, os.strerror(number))
            more = library.more(reference)
            user = None if more else library.gets(reference, b"User-Id")
            address = library.data(reference)
            if len(frames) < heads:
                frames.append(ctypes.string_at(address, size))
            elif size < LENT_BYTES:
                frames.append(bytearray(ctypes.string_at(address, size)))
            else:
                arrived, self._spare = _Arrived(self._spare, library.close), self._new_message()
                frames.append(_view(address, size, arrived))
            if not more:
                return frames, "" if user is None else user.decode("ascii", "replace")

    def close(self) -> None:
        """Before the socket is closed; what has been received stays."""
        self._library.close(ctypes.byref(self._spare))

    def _copy(self, frame: Frame, flags: int) -> None:
        content = frame if type(frame) is bytes else bytes(frame)
        while self._library.send(self.handle, content, len(content), flags) < 0:
            if (number := ctypes.get_errno()) != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def _lend(self, frame: Frame) -> Lent | None:
        view = memoryview(frame)
        if type(frame) is bytes:
            owner: Any = frame
            start: Any = frame
        elif view.readonly:  # its address cannot be had
            self._copy(frame, _DONTWAIT)
            return None
        else:
            owner = ctypes.c_char.from_buffer(view)
            start = ctypes.addressof(owner)
        library, message, flag = self._library, _Message(), _take_flag()
        reference = ctypes.byref(message)
        lent = Lent(flag, owner)
        self._lends.add(lent)  # before libzmq has it: a signal's handler may raise right after a call
        if library.init_data(reference, start, view.nbytes, library.note, ctypes.addressof(flag)) < 0:
            flag.value = 0
            raise MemoryError("libzmq cannot make a message")
        while library.msg_send(reference, self.handle, _DONTWAIT) < 0:
            if (number := ctypes.get_errno()) != errno.EINTR:
                library.close(reference)
                assert lent.done
                raise OSError(number, os.strerror(number))
        return lent

    def _new_message(self) -> _Message:
        message = _Message()
        self._library.init(ctypes.byref(message))
        return message


def _take_flag() -> ctypes.c_int:
    """One that nobody else has. Their memory is never freed, because libzmq may write to it at any time."""
    try:
        flag = _free_flags.pop()
    except IndexError:
        block = (ctypes.c_int * _FLAGS)()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(block))
        _free_flags.extend(ctypes.c_int.from_buffer(block, i * ctypes.sizeof(ctypes.c_int)) for i in range(1, _FLAGS))
        flag = ctypes.c_int.from_buffer(block)
    flag.value = _PENDING
    return flag


def _view(address: int, size: int, owner: _Arrived) -> memoryview:
    array: Any = (ctypes.c_ubyte * size).from_address(address)
    array.owner = owner
    import numpy as np  # here, because commands that only ever see small frames should not wait for it

    return np.frombuffer(array, np.uint8).data  # a memoryview of the array itself would have a format of ctypes' own


def _find_note() -> int | None:
    """The address of :data:`_NOTE`; None where it is not to be had, so that everything has to be copied."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, _NOTE):
        return None
    note = libc[_NOTE]
    for content in (bytes(64), b"\xff" * 64):
        flag = ctypes.c_int(_PENDING)
        note(content, ctypes.byref(flag))
        if flag.value not in (0, 1):
            return None
    return ctypes.cast(note, ctypes.c_void_p).value


def _declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = library[name]  # not the attribute, which everybody else would share
    function.restype, function.argtypes = result, arguments
    return function
