"""Finds the listening side: connects, and says why it cannot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from downpour_common import exitcodes, wire
from downpour_common.errors import ConfigError
from downpour_common.keys import ClientKeys
from downpour_common.messages import Refusal as Code
from downpour_common.transport.zeromq import Trouble, ZmqClient
from downpour_deploy.bench.identity import ASKS, known, own
from downpour_deploy.bench.measure import Link, LinkError, Refusal, Silence

AGAIN_S = 0.5
"""Time between two greetings, until one is answered."""


@contextmanager
def reached(address: str, folder: str | None, timeout_s: float) -> Iterator[Link]:
    """A link whose other side has answered; left in good order. Raises :class:`LinkError`, :class:`ConfigError`.

    Several public keys may be known: those that do not fit are tried first one after the other, which takes a moment.
    """
    where = address.removeprefix("tcp://")
    deadline_s = time.monotonic() + timeout_s
    trouble: Trouble = ""
    for keys in _candidates(folder):
        transport = ZmqClient(wire.DATA_HEADER_LIMIT, keys, watch=True)
        try:
            link = Link(transport, address, timeout_s)
            trouble = _greet(link, transport, address, where, deadline_s)
            if not trouble:
                try:
                    yield link
                except (Refusal, Silence) as error:
                    raise LinkError(exitcodes.FAILED, f"{where}: {error}") from None
                with suppress(Refusal, Silence):
                    link.leave()
                return
        finally:
            transport.close()
        if trouble != "wrong-server-key":
            break
    raise _error(trouble, where, folder, timeout_s)


def _candidates(folder: str | None) -> list[ClientKeys | None]:
    if folder is None:
        return [None]
    mine = own(Path(folder), ASKS)
    others = [public for public in known(Path(folder)) if public != mine.pair.public]
    if not others:
        raise ConfigError(f"--keys {folder}: whom to expect? copy the .pub of the listening host's key there")
    return [ClientKeys(mine.pair, {}, public) for public in others]


def _greet(link: Link, transport: ZmqClient, address: str, where: str, deadline_s: float) -> Trouble:
    """Greet until there is an answer: "". Else what is in the way, for certain or still when time is up."""
    trouble: Trouble = ""
    try:
        while (left_s := deadline_s - time.monotonic()) > 0:
            if link.greet(min(AGAIN_S, left_s)):
                return ""
            trouble = transport.trouble(address)
            if trouble in ("refused", "wrong-server-key"):
                return trouble
    except Refusal as error:
        if error.code == Code.NOT_READY:
            raise LinkError(exitcodes.FAILED, f"{where}: {error}; try again when it is over") from None
        raise LinkError(exitcodes.UNREACHABLE, f"{where} is not what listens for measurements: {error}") from None
    if trouble == "":
        raise LinkError(
            exitcodes.UNREACHABLE,
            f"{where} does not answer; start `downpour bench net --listen {where}` there (a daemon's port does not do)",
        )
    return trouble


def _error(trouble: Trouble, where: str, folder: str | None, timeout_s: float) -> LinkError:
    match trouble:
        case "refused" if folder is None:
            text = f"{where} wants a key; give --keys FOLDER"
        case "refused":
            file = own(Path(folder or ""), ASKS).file
            text = (
                f"{where} does not accept {file} of {folder}: copy {file.removesuffix('.key')}.pub into the listening "
                "side's folder of keys"
            )
        case "wrong-server-key":
            tried = ", ".join(known(Path(folder or "")).values())
            text = (
                f"{where} proves none of the keys that {folder} has a .pub of ({tried}): copy the .pub of the key "
                "that it says it presents; or it listens without keys"
            )
        case _:
            text = f"nothing listens at {where} (tried for {timeout_s:g} s): start `downpour bench net --listen` there"
            return LinkError(exitcodes.UNREACHABLE, text)
    return LinkError(exitcodes.REFUSED, text)
