"""Files in memory, with what a real disk may do when power fails: what was not fsynced is there, or torn, or gone.

:class:`Disk` has the functions of ``os``, ``shutil``, ``mmap`` and ``open`` that production modules use on files.
A directory's entries are durable once the directory was fsynced, a file's bytes once the file was.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any


class Inode:
    """A file's bytes, and those that survive a power failure."""

    __slots__ = ("data", "synced")

    def __init__(self) -> None:
        self.data = b""
        self.synced: bytes | None = None


class SimFile(io.BytesIO):
    """An open file; what is written is there for others once it is flushed or closed."""

    def __init__(self, disk: Disk, inode: Inode, writable: bool, descriptor: int) -> None:
        super().__init__(inode.data)
        self._disk, self._inode, self._writable, self._descriptor = disk, inode, writable, descriptor

    def fileno(self) -> int:
        """For fsync and mmap."""
        return self._descriptor

    def flush(self) -> None:
        """See the interface."""
        if self._writable and not self.closed:
            self._inode.data = self.getvalue()

    def close(self) -> None:
        """See the interface."""
        if not self.closed:
            self.flush()
            self._disk.descriptors.pop(self._descriptor, None)
            super().close()


class Map(bytearray):
    """What ``mmap`` gives."""

    def close(self) -> None:
        """See the interface."""


class Disk:
    """Paths are absolute. ``operation`` is told of each change before it is made, and may raise or kill.
    ``syncs``: whether fsync does what it says."""

    def __init__(self) -> None:
        self.descriptors: dict[int, Inode | str] = {}
        self.operation: Callable[[str, str], None] = lambda _what, _path: None
        self.syncs = True
        self.full = False
        self._live: dict[str, Inode] = {}
        self._durable: dict[str, Inode] = {}
        self._folders: set[str] = {"/"}
        self._next = 100
        self.os = SimpleNamespace(
            path=SimpleNamespace(
                join=posixpath.join,
                basename=posixpath.basename,
                dirname=posixpath.dirname,
                abspath=posixpath.abspath,
                exists=self.exists,
                getsize=self.getsize,
                isdir=lambda path: self._key(path) in self._folders,
            ),
            makedirs=self.makedirs,
            rename=self.rename,
            replace=self.rename,
            unlink=self.unlink,
            remove=self.unlink,
            listdir=self.listdir,
            open=self.open_descriptor,
            close=self.close_descriptor,
            fsync=self.fsync,
            pread=self.pread,
            getpid=lambda: 1,
            O_RDONLY=os.O_RDONLY,
            O_CLOEXEC=os.O_CLOEXEC,
            O_DIRECTORY=os.O_DIRECTORY,
        )
        self.shutil = SimpleNamespace(rmtree=self.rmtree)
        self.mmap = SimpleNamespace(mmap=self.map, ACCESS_COPY=3, ACCESS_READ=1)

    @staticmethod
    def _key(path: str) -> str:
        return posixpath.normpath(path)

    def _found(self, path: str) -> Inode:
        inode = self._live.get(self._key(path))
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return inode

    def exists(self, path: str) -> bool:
        """A file or a folder."""
        return self._key(path) in self._live or self._key(path) in self._folders

    def getsize(self, path: str) -> int:
        """Bytes of a file."""
        return len(self._found(path).data)

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        """Folders survive everything: production makes them long before they matter."""
        path = self._key(path)
        while path != "/":
            self._folders.add(path)
            path = posixpath.dirname(path)

    def listdir(self, path: str) -> list[str]:
        """Names in a folder."""
        path = self._key(path)
        if path not in self._folders:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        names = {p for p in (*self._live, *self._folders) if posixpath.dirname(p) == path and p != path}
        return sorted(posixpath.basename(p) for p in names)

    def open(self, path: str, mode: str = "r", encoding: str | None = None, **_: Any) -> Any:
        """``open``: rb, wb, ab and text."""
        key = self._key(path)
        if posixpath.dirname(key) not in self._folders:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        if "w" in mode or "a" in mode:
            self.operation("write", key)
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device", path)
            inode = self._live.get(key)
            if inode is None or "w" in mode:
                fresh = Inode()
                if inode is not None:  # truncated in place: what was durable may be lost
                    fresh = inode
                    fresh.data = b""
                inode = self._live[key] = fresh
            file = self._file(inode, True)
            if "a" in mode:
                file.seek(0, io.SEEK_END)
            return file if "b" in mode else io.TextIOWrapper(file, encoding=encoding)
        inode = self._found(path)
        return self._file(inode, False) if "b" in mode else io.StringIO(inode.data.decode(encoding or "utf-8"))

    def _file(self, inode: Inode, writable: bool) -> SimFile:
        self._next += 1
        self.descriptors[self._next] = inode
        return SimFile(self, inode, writable, self._next)

    def open_descriptor(self, path: str, _flags: int = 0) -> int:
        """``os.open`` of a folder, or of a file to read."""
        key = self._key(path)
        self._next += 1
        self.descriptors[self._next] = key if key in self._folders else self._found(path)
        return self._next

    def close_descriptor(self, descriptor: int) -> None:
        """``os.close``."""
        self.descriptors.pop(descriptor, None)

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        """``os.pread``."""
        inode = self.descriptors[descriptor]
        assert isinstance(inode, Inode)
        return inode.data[offset : offset + length]

    def map(self, descriptor: int, _length: int, access: int = 0) -> Map:
        """``mmap.mmap``, of a copy."""
        inode = self.descriptors[descriptor]
        assert isinstance(inode, Inode)
        if not inode.data:
            raise ValueError("cannot mmap an empty file")
        return Map(inode.data)

    def fsync(self, descriptor: int) -> None:
        """Of a file its bytes, of a folder its entries."""
        target = self.descriptors[descriptor]
        self.operation("fsync", target if isinstance(target, str) else "")
        if not self.syncs:
            return
        if isinstance(target, Inode):
            target.synced = target.data
            return
        for path in {*self._live, *self._durable}:
            if posixpath.dirname(path) == target:
                if path in self._live:
                    self._durable[path] = self._live[path]
                else:
                    del self._durable[path]

    def rename(self, source: str, target: str) -> None:
        """Atomic for those who look; durable with the folder's fsync."""
        self.operation("rename", target)
        inode = self._found(source)
        del self._live[self._key(source)]
        self._live[self._key(target)] = inode

    def unlink(self, path: str) -> None:
        """Remove a file."""
        self._found(path)
        self.operation("unlink", path)
        del self._live[self._key(path)]

    def rmtree(self, path: str, ignore_errors: bool = False) -> None:
        """Remove a folder."""
        self.operation("rmtree", path)
        path = self._key(path)
        below = path + "/"
        for name in [p for p in self._live if p.startswith(below)]:
            del self._live[name]
        self._folders -= {p for p in self._folders if p == path or p.startswith(below)}

    # ------------------------------------------------------------ faults

    def power_failure(self, random: Random) -> None:
        """Whatever was not durable is as it was before, as it is now, or torn; each file and entry by itself."""
        entries = dict(self._durable)
        for path in sorted({*self._live, *self._durable}):
            if self._live.get(path) is not self._durable.get(path) and random.random() < 0.5:
                if path in self._live:
                    entries[path] = self._live[path]
                else:
                    entries.pop(path, None)
        for inode in {id(i): i for i in entries.values()}.values():
            if inode.data != inode.synced:
                inode.data = _torn(inode, random)
            inode.synced = inode.data
        self._live, self._durable = entries, dict(entries)
        for path in entries:
            self.makedirs(posixpath.dirname(path))

    def flip(self, random: Random) -> str:
        """One bit of one checkpoint's file turns over; which file."""
        files = sorted(p for p in self._live if "/checkpoints/" in p and self._live[p].data)
        if not files:
            return ""
        newest = max(posixpath.dirname(p) for p in files)
        files = [p for p in files if posixpath.dirname(p) == newest]
        path = random.choice(files)
        inode, data = self._live[path], bytearray(self._live[path].data)
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        inode.data = inode.synced = bytes(data)
        return path


def _torn(inode: Inode, random: Random) -> bytes:
    before = inode.synced or b""
    match random.randrange(4):
        case 0:
            return before
        case 1:
            return inode.data
        case 2:
            return inode.data[: random.randrange(len(inode.data) + 1)]
        case _:
            cut = random.randrange(len(inode.data) + 1)
            return inode.data[:cut] + bytes(len(inode.data) - cut)
