"""Every error that Downpour raises on purpose.

::

    DownpourError
    ├── ConfigError            the job's description cannot be used         (exit code 2)
    ├── ModelError             the model, optimizer or loader cannot be distributed as it is
    │   └── ModelMismatch      this worker's model differs from the job's
    ├── ProtocolError          a message is malformed or out of place
    ├── PeerError              another process did not do its part
    │   ├── PeerTimeout        … within its deadline
    │   ├── PeerRefused        … and said why
    │   └── MateLost           another rank of the same replica has ended, or does not answer
    ├── NonFiniteContribution  a gradient holds NaN or Inf
    ├── RuleError              an update rule of the job's own cannot be used, or has failed
    ├── CheckpointError        a checkpoint cannot be written, read or used (exit code 74)
    ├── BundleError            a script's folder cannot travel, or what came is not what was sent
    └── JobFailed              a process of the job failed

Facts stand in attributes; the message is for people and says what to do.
"""

from __future__ import annotations


class DownpourError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(DownpourError):
    """The job cannot be run as described. ``problems`` lists every reason, one line each."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ModelError(DownpourError):
    """The model, optimizer or loader cannot be distributed as it is."""


class ModelMismatch(ModelError):
    """This worker's model is not the one the job started with; ``difference`` names the first tensor."""

    def __init__(self, difference: str) -> None:
        self.difference = difference
        super().__init__(
            f"this worker's model differs from the job's: {difference}. "
            "Every worker must build the same model and optimizer; check what depends on rank, host or random choice."
        )


class ProtocolError(DownpourError):
    """A message is malformed, too large, or makes no sense where it arrived."""


class PeerError(DownpourError):
    """Another process did not do its part; ``peer`` is its role and index, e.g. ``server/1``."""

    def __init__(self, peer: str, message: str) -> None:
        self.peer = peer
        super().__init__(message)


class PeerTimeout(PeerError):
    """``peer`` did not answer ``awaited`` within ``after_s`` seconds."""

    def __init__(self, peer: str, awaited: str, after_s: float) -> None:
        self.awaited = awaited
        self.after_s = after_s
        super().__init__(
            peer,
            f"{peer} did not answer within {after_s:g} s (awaited: {awaited}). "
            "Look at its log; raise the limit with --set timeout_s=… if the work really takes longer.",
        )


class PeerRefused(PeerError):
    """``peer`` refused a request; ``code`` is one of :class:`downpour_common.messages.Refusal`."""

    def __init__(self, peer: str, code: str, reason: str) -> None:
        self.code = code
        self.reason = reason
        super().__init__(peer, f"{peer}: {reason}")


class MateLost(PeerError):
    """Another rank of this worker's replica has ended, or has not done its part in time (``late``)."""

    def __init__(self, peer: str, late: bool, message: str) -> None:
        self.late = late
        super().__init__(peer, message)


class NonFiniteContribution(DownpourError):
    """A gradient held NaN or Inf and was not applied."""


class RuleError(DownpourError):
    """An update rule of the job's own, ``module:Class``, cannot be used or has failed; the cause is its own error."""

    def __init__(self, rule: str, message: str) -> None:
        self.rule = rule
        super().__init__(f"update rule {rule}: {message}")


class CheckpointError(DownpourError):
    """A checkpoint cannot be written, read or used; ``path`` names it."""

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        super().__init__(f"{path}: {message}")


class BundleError(DownpourError):
    """A script's folder cannot be packed, or a bundle not unpacked.

    ``path`` names the folder or the bundle; ``problems`` lists what is wrong with it, one line each.
    """

    def __init__(self, path: str, *problems: str) -> None:
        self.path = path
        self.problems = problems
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))


class JobFailed(DownpourError):
    """A process of the job failed, the first of those that did.

    ``role`` and ``index`` (-1: not one process) name it, ``host`` is where it ran ("" where that is not known),
    ``exit_code`` what it ended with (None: nobody saw it end), ``traceback`` its traceback or last output.
    """

    def __init__(
        self, job: str, role: str, index: int, host: str, exit_code: int | None, message: str, traceback: str
    ) -> None:
        self.job = job
        self.role = role
        self.index = index
        self.host = host
        self.exit_code = exit_code
        self.traceback = traceback
        who = f"{role}/{index}" if index >= 0 else role
        where = f" on {host}" if host else ""
        code = "" if exit_code is None else f" (exit code {exit_code})"
        details = f"\n\n{traceback.rstrip()}" if traceback.strip() else ""
        super().__init__(f"job {job}: {who}{where} failed{code}: {message}{details}")
