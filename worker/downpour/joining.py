"""Joining rounds of a job in which workers come and go; see :mod:`downpour_server.policy.exchanges`."""

from __future__ import annotations

from collections.abc import Callable

from downpour.client.parameters import ParameterClient
from downpour.takeover import fresh
from downpour_common.layout import Column


def join(client: ParameterClient, column: Column, agreed: Callable[[int], int], number: int) -> int:
    """Take part from the round on that is open, which was ``number`` some time ago; returns its number.

    Others go on without one that joins until it says that it is there. Only from then on do they stand still, and it
    is asked again where: whoever began rounds behind them would be alone for ever. ``agreed``: of a number that every
    rank of the replica has, the greatest.
    """
    client.take_part()
    now = max(number, agreed(fresh(client.hello_again(), column).seq))
    if now > number:
        client.begin_at(now)
        client.take_part()
    return now
