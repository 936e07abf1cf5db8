"""Barriers: who has come to one, and who is let go when all have."""

from __future__ import annotations

from collections.abc import Callable, Collection

from downpour_common.transport import Peer

Entry = tuple[Peer, int]
"""Where a worker waits, and its request; a negative one belonged to a process that has died, and is not answered."""
_NOBODY: Entry = (b"", -1)


class Barriers:
    """By name; one is gone when it opens, and the next of that name is another."""

    def __init__(self) -> None:
        self._entered: dict[str, dict[int, Entry]] = {}

    def enter(self, name: str, slot: int, peer: Peer, request: int) -> None:
        """``slot`` has come."""
        self._entered.setdefault(name, {})[slot] = (peer, request)

    def asked_again(self, name: str, slot: int, peer: Peer, request: int) -> None:
        """A repeat of what is not answered yet: the answer goes to ``peer``."""
        if slot in self._entered.get(name, {}):
            self._entered[name][slot] = (peer, request)

    def leave(self, slot: int) -> None:
        """Nobody waits for ``slot`` any more, nor it for anybody."""
        for entered in self._entered.values():
            entered.pop(slot, None)

    def taken_over(self, slot: int) -> None:
        """Where ``slot`` has come it has come, though the process that did has died."""
        for entered in self._entered.values():
            if slot in entered:
                entered[slot] = _NOBODY

    def opened(self, live: Collection[int], past: Callable[[int, Collection[int]], bool]) -> list[tuple[int, Entry]]:
        """Who is let go now that ``live`` are the workers. ``past(slot, entered)``: that one will not come to a
        barrier in which these wait."""
        free: list[tuple[int, Entry]] = []
        for name, entered in list(self._entered.items()):
            if all(slot in entered or past(slot, entered) for slot in live):
                free += [(slot, entry) for slot, entry in entered.items() if entry[1] >= 0]
                del self._entered[name]
        return free

    def document(self) -> list[list[object]]:
        """Plain values, for the journal."""
        return [[name, [[s, r] for s, (_, r) in entered.items()]] for name, entered in self._entered.items()]

    @classmethod
    def from_document(cls, document: list[tuple[str, list[tuple[int, int]]]]) -> Barriers:
        """The inverse of :meth:`document`; who waits will ask again."""
        self = cls()
        self._entered = {name: {slot: (b"", request) for slot, request in entered} for name, entered in document}
        return self
