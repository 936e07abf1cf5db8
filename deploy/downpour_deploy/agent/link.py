"""The agent's relation to its coordinator: registered or not, there or silent. I/O-free."""

from __future__ import annotations

import math

from downpour_common.messages import Ack, NodeLeaving, Ping, Refusal, Refused, RegisterNode
from downpour_deploy.agent.effects import AgentFacts, Effect, Exit, Numbers, Reconnect, Send, Tell

REPEAT_S = 2.0
HEARTBEAT_S = 1.0
PING_S = 5.0
"""Heartbeats are not answered; pings are, and so tell whether the coordinator is there."""
SILENT_S = 10.0
"""After so long without a word from it, only what is answered at once is sent: the rest would pile up in the queue."""
RECONNECT_S = 60.0
"""After so long, the connection is made anew, which empties the queue."""


class Link:
    """Registers, pings and knows how long the coordinator has been silent."""

    def __init__(self, facts: AgentFacts, numbers: Numbers, now_s: float) -> None:
        self._facts, self._numbers = facts, numbers
        self.registered = False
        self.known = False
        """whether it was registered ever"""
        self.heard_s = now_s
        """when the coordinator was heard last; at first the agent's start"""
        self._connected_s = now_s
        self._registration = RegisterNode(numbers.new(), facts.node, facts.role, facts.instance, facts.document)
        self._asked_s = -math.inf
        self._heartbeat_s = -math.inf
        self._leaving: NodeLeaving | None = None
        self.left = False
        """whether the coordinator has taken note of the agent's end"""
        self._told = ""

    def silent(self, now_s: float) -> bool:
        """Whether nothing was heard for some time."""
        return now_s - self.heard_s >= SILENT_S

    def open(self, now_s: float) -> bool:
        """Whether what is sent now has a chance to be answered soon. Never again after the goodbye."""
        return self.registered and self._leaving is None and not self.silent(now_s)

    def heard(self, now_s: float) -> None:
        """Something came from the coordinator."""
        if self.silent(now_s):
            self.hurry()
        self.heard_s = self._connected_s = now_s

    def hurry(self) -> None:
        """The next heartbeat is due at once."""
        self._heartbeat_s = -math.inf

    def unknown(self) -> None:
        """The coordinator does not know this agent (any more)."""
        if self.registered and self._leaving is None:  # else it has only just forgotten this agent
            self.registered = False
            facts = self._facts
            request = self._numbers.new()
            self._registration = RegisterNode(request, facts.node, facts.role, facts.instance, facts.document)
            self._asked_s = -math.inf

    def answered(self, message: Ack | Refused) -> list[Effect] | None:
        """The answer to a request of this object, or None when it is to another's."""
        if self._leaving is not None and message.request == self._leaving.request:
            self.left = True
            return []
        if message.request != self._registration.request or self.registered:
            return None
        if isinstance(message, Ack):
            self.registered = self.known = True
            self._told = ""
            self.hurry()
            return []
        if message.code != Refusal.NOT_READY:
            return [Exit(message.reason)]
        first = self._told != message.reason
        self._told = message.reason
        return [Tell(f"not registered yet: {message.reason}")] if first else []

    def tick(self, now_s: float) -> list[Effect]:
        """What is due but for the heartbeat."""
        effects: list[Effect] = []
        if self._leaving is not None:
            if not self.left and now_s - self._asked_s >= REPEAT_S:
                self._asked_s = now_s
                effects.append(Send(self._leaving))
            return effects
        if now_s - self._connected_s >= RECONNECT_S:
            self._connected_s = now_s
            effects.append(Reconnect())
        if not self.registered:
            if now_s - self._asked_s >= REPEAT_S:
                self._asked_s = now_s
                effects.append(Send(self._registration))
        elif now_s - self._asked_s >= (REPEAT_S if self.silent(now_s) else PING_S):
            self._asked_s = now_s
            effects.append(Send(Ping(self._numbers.new(), b"")))
        return effects

    def heartbeat_due(self, now_s: float) -> bool:
        """Whether a heartbeat is to be sent now; the next is due a second later."""
        if not self.open(now_s) or now_s - self._heartbeat_s < HEARTBEAT_S:
            return False
        self._heartbeat_s = now_s
        return True

    def leave(self, reason: str, now_s: float) -> list[Effect]:
        """Say that the agent ends; nothing else is said from here on."""
        self._leaving = NodeLeaving(self._numbers.new(), self._facts.node, self._facts.instance, reason)
        self._asked_s = now_s
        return [Send(self._leaving)]
