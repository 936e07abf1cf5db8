"""Who may say what to the coordinator. The sender is the name of the key that its connection was made with.

``user`` and ``user/NAME`` submit and steer jobs, ``server`` and ``worker`` are agents, ``job/ID`` are the processes
of one job. An empty name is everybody: security is off.
"""

from __future__ import annotations

from downpour_common import messages as m
from downpour_common.messages import Message

_USERS = (
    m.PutBundle
    | m.SubmitJob
    | m.ListJobs
    | m.DescribeJob
    | m.CancelJob
    | m.ScaleJob
    | m.CheckpointNow
    | m.SetJob
    | m.ListNodes
    | m.DrainNode
    | m.ListFiles
    | m.GetFile
    | m.Ping
)
_AGENTS = m.RegisterNode | m.Heartbeat | m.LogData | m.ProcessEnded | m.NodeLeaving | m.GetFile | m.Ping
_PROCESSES = m.FromShard | m.SnapshotPart | m.WorkerRequest | m.WorkerNotice


def allowed(sender: str, message: Message) -> bool:
    """Whether ``message`` may come from ``sender``."""
    if not sender:
        return True
    role, _, name = sender.partition("/")
    if role == "user":
        return isinstance(message, _USERS)
    if role == "job":
        return isinstance(message, _PROCESSES) and message.job == name
    if role not in ("server", "worker"):
        return False
    if isinstance(message, m.RegisterNode | m.LogData | m.ProcessEnded) and message.role != role:
        return False
    if isinstance(message, m.GetFile):
        return message.path == "bundle" or message.path.startswith("checkpoints/")
    return isinstance(message, _AGENTS)
