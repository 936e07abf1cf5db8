"""Control plane of a cluster: agents (server and worker daemons), users, and the coordinator.

Who may say what follows from the key that a connection was made with, message by message. A request that is not
answered is repeated; what a repeat asks for is done once.
"""

from __future__ import annotations

from dataclasses import dataclass

from downpour_common.messages.base import Buffer, Document, Message, Request

# ---------------------------------------------------------------- agent → coordinator


@dataclass(frozen=True, slots=True)
class RegisterNode(Request):
    """An agent is up. Answered by :class:`Ack`, :class:`Refused` (name taken by a live agent, other version, …)."""

    TAG = 80
    node: str
    role: str
    """``server`` or ``worker``"""
    instance: str
    """random, new with every start of the agent"""
    document: Document
    """resources and facts of the host; see ``downpour_coordinator.nodes``"""


@dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    """The agent lives; ``document["processes"]`` lists what it has. Every second."""

    TAG = 81
    node: str
    instance: str
    document: Document


@dataclass(frozen=True, slots=True)
class LogData(Request):
    """Output of a process. Answered by :class:`Ack` with the bytes held, from which the agent goes on."""

    TAG = 82
    node: str
    instance: str
    job: str
    role: str
    index: int
    epoch: int
    offset: int
    payload: Buffer


@dataclass(frozen=True, slots=True)
class ProcessEnded(Request):
    """A process has ended and all its output was delivered. Answered by :class:`Ack`; repeated until then."""

    TAG = 83
    node: str
    instance: str
    job: str
    role: str
    index: int
    epoch: int
    document: Document
    """``code`` (negative: signal), ``tail`` (last lines of output), ``error`` (why it could not be started, or "")"""


@dataclass(frozen=True, slots=True)
class NodeLeaving(Request):
    """The agent is being stopped: its processes have ended. Answered by :class:`Ack`."""

    TAG = 84
    node: str
    instance: str
    reason: str


# ---------------------------------------------------------------- coordinator → agent


@dataclass(frozen=True, slots=True)
class StartProcess(Message):
    """Have this process run; repeated until a heartbeat shows it, so a repeat changes nothing."""

    TAG = 86
    job: str
    role: str
    """``server`` (a shard) or ``worker``"""
    index: int
    epoch: int
    document: Document
    """see ``downpour_coordinator.cluster.start_document``"""


@dataclass(frozen=True, slots=True)
class StopProcess(Message):
    """End this process: SIGTERM, after ``grace_s`` seconds SIGKILL. Repeated until it has ended."""

    TAG = 87
    job: str
    role: str
    index: int
    epoch: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class ForgetJob(Message):
    """The job is over and the coordinator has all of it: its folder may go."""

    TAG = 88
    job: str


@dataclass(frozen=True, slots=True)
class WhoAreYou(Message):
    """The coordinator does not know the sender of a heartbeat: register again."""

    TAG = 89


# ---------------------------------------------------------------- user → coordinator


@dataclass(frozen=True, slots=True)
class PutBundle(Request):
    """Bytes of a bundle of code. Answered by :class:`Ack` with the bytes held; an empty payload only asks."""

    TAG = 96
    digest: str
    total: int
    offset: int
    payload: Buffer


@dataclass(frozen=True, slots=True)
class SubmitJob(Request):
    """A new job. Answered by :class:`Reply` with the job's description."""

    TAG = 97
    token: str
    """random; a repeat with the same token is the same job"""
    bundle: str
    """digest of the bundle, which is there already"""
    document: Document
    """``spec``: a JobSpec; ``anyway``: queue it even if the cluster is too small; ``dry_run``: only check"""


@dataclass(frozen=True, slots=True)
class ListJobs(Request):
    """Answered by :class:`Reply` with ``jobs``."""

    TAG = 98


@dataclass(frozen=True, slots=True)
class DescribeJob(Request):
    """Answered by :class:`Reply`. ``job``: its id, an unambiguous beginning of one, or a name (its newest job)."""

    TAG = 99
    job: str


@dataclass(frozen=True, slots=True)
class CancelJob(Request):
    """Answered by :class:`Reply` at once; the job ends within its grace."""

    TAG = 100
    job: str


@dataclass(frozen=True, slots=True)
class ScaleJob(Request):
    """Answered by :class:`Reply`."""

    TAG = 101
    job: str
    workers: int


@dataclass(frozen=True, slots=True)
class CheckpointNow(Request):
    """Have a checkpoint begin now. Answered by :class:`Reply` at once with how far it is; asked again until it is
    committed. ``downpour run`` answers it as well."""

    TAG = 110
    job: str
    token: str
    """random; with the same token it is the same wish"""


@dataclass(frozen=True, slots=True)
class SetJob(Request):
    """Go on with a changed description. Answered by :class:`Reply` at once with how far that is; asked again until it
    is done. ``downpour run`` answers it as well."""

    TAG = 111
    job: str
    token: str
    """random; with the same token it is the same change"""
    assignments: tuple[str, ...]
    """``key=value`` each"""


@dataclass(frozen=True, slots=True)
class ListNodes(Request):
    """Answered by :class:`Reply` with ``nodes``."""

    TAG = 102


@dataclass(frozen=True, slots=True)
class DrainNode(Request):
    """No new processes on ``node``, its workers leave; ``undo``: use it again. Answered by :class:`Reply`."""

    TAG = 103
    node: str
    undo: bool


@dataclass(frozen=True, slots=True)
class ListFiles(Request):
    """Answered by :class:`Reply` with ``files``: [path, bytes] pairs of the job's folder at the coordinator."""

    TAG = 104
    job: str


@dataclass(frozen=True, slots=True)
class Ping(Request):
    """Answered by :class:`Pong` with the same payload."""

    TAG = 105
    payload: Buffer


@dataclass(frozen=True, slots=True)
class GetFile(Request):
    """Bytes of a file of the job's folder; agents also ask for ``bundle``. Answered by :class:`FileData`."""

    TAG = 108
    job: str
    path: str
    offset: int
    length: int


# ---------------------------------------------------------------- coordinator → user, agent


@dataclass(frozen=True, slots=True)
class Pong(Request):
    """See :class:`Ping`; ``document`` has the coordinator's facts (version, wall clock)."""

    TAG = 106
    document: Document
    payload: Buffer


@dataclass(frozen=True, slots=True)
class Reply(Request):
    """The answer to a user's request."""

    TAG = 107
    document: Document


@dataclass(frozen=True, slots=True)
class FileData(Request):
    """Bytes of a file from ``offset`` on; ``size`` is the file's at this moment. Empty at its end."""

    TAG = 109
    size: int
    offset: int
    payload: Buffer
