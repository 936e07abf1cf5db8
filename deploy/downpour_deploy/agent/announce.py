"""What an agent tells people: one line when it is ready, lines on standard error while it waits, and systemd."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from downpour_deploy.agent.state import AgentState
from downpour_deploy.notify import notify

STATUS_S = 10.0
_TROUBLE = {
    "": "",
    "unreachable": "; nobody answers there",
    "refused": "; it does not accept our key",
    "wrong-server-key": "; who answers there does not have the key of coordinator.pub",
}


@dataclass(slots=True)
class Announcer:
    """Speaks for one agent. ``facts`` go into the readiness line."""

    role: str
    node: str
    where: str
    """the coordinator's HOST:PORT"""
    facts: dict[str, Any]
    json: bool
    _since_s: float | None = field(default=None, init=False)
    _told_s: float = field(default=0.0, init=False)
    _told: bool = field(default=False, init=False)
    _ready: bool = field(default=False, init=False)
    _status: str = field(default="", init=False)

    def tell(self, text: str) -> None:
        """A line on standard error."""
        sys.stderr.write(f"downpour {self.role} {self.node}: {text}\n")
        sys.stderr.flush()

    def update(self, state: AgentState, trouble: str, now_s: float) -> None:
        """Called often: says what has changed, and every ten seconds what is being waited for."""
        link = state.link
        if link.registered and not self._ready:
            self._ready = True
            self._say_ready()
        if link.open(now_s):
            if self._told:
                self.tell(f"the coordinator at {self.where} is there")
            self._since_s, self._told = None, False
            count = state.running
            self._systemd(f"joined {self.where}, {count} process{'' if count == 1 else 'es'}")
            return
        self.waiting(link.heard_s, trouble, now_s)

    def waiting(self, since_s: float, trouble: str, now_s: float) -> None:
        """The coordinator has not answered since then."""
        if self._since_s is None:
            self._since_s = self._told_s = since_s
            self._systemd(f"waiting for the coordinator at {self.where}")
        if now_s - self._told_s >= STATUS_S:
            self._told_s, self._told = now_s, True
            text = f"waiting for the coordinator at {self.where} ({now_s - self._since_s:.0f} s)"
            self.tell(text + _TROUBLE.get(trouble, ""))
            self._systemd(text)

    def stopping(self, running: int, again: bool) -> None:
        """A signal to end came."""
        notify("STOPPING=1", "STATUS=stopping")
        end = "at once" if again else "in good order; a second signal ends them at once"
        self.tell(f"stopping; {running} process{'' if running == 1 else 'es'} to end {end}" if running else "stopping")

    def refused(self, trouble: str) -> None:
        """The coordinator does not accept the key, or is not the right one."""
        if trouble == "refused":
            text = (
                f"the coordinator at {self.where} does not accept our key: give its folder of keys the file "
                f"{self.role}.pub that belongs to our {self.role}.key, or join it with --keys if we gave none"
            )
        else:
            text = (
                f"who answers at {self.where} does not have the key of our coordinator.pub: "
                "copy that file from the coordinator's folder of keys again, or check --join"
            )
        self.tell(text)

    def gave_up(self, waited_s: float) -> None:
        """The time to wait for the coordinator is over."""
        self.tell(f"no coordinator at {self.where} within {waited_s:.0f} s")

    def left(self, reason: str) -> None:
        """The agent ends."""
        if reason:
            self.tell(f"the coordinator turned this node down: {reason}")

    def _say_ready(self) -> None:
        notify("READY=1")
        if self.json:
            line = json.dumps(
                {"event": "ready", "node": self.node, "role": self.role, "joined": self.where, **self.facts}
            )
        else:
            facts = "".join(f", {name} {value}" for name, value in self.facts.items())
            line = f"downpour {self.role} ready: node {self.node}, joined {self.where}{facts}"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def _systemd(self, status: str) -> None:
        if status != self._status:
            self._status = status
            notify(f"STATUS={status}")
