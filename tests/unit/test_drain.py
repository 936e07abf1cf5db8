"""SIGTERM: whose handler it is, and what the second one does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from downpour.drain import EXIT_CODE, Drain


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_first_signal_asks_and_the_second_does_what_it_does_by_default() -> None:
    drain = Drain()
    drain.install()
    assert not drain.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert drain.asked
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert EXIT_CODE == 143


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda *_: None])
def test_a_scripts_own_handler_stays(own: signal.Handlers) -> None:
    signal.signal(signal.SIGTERM, own)
    Drain().install()
    assert signal.getsignal(signal.SIGTERM) is own


def test_another_thread_cannot_take_signals() -> None:
    thread = threading.Thread(target=Drain().install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
