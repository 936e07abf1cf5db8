"""One run of the script with one batch size: started, awaited, and gone with all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from downpour.tuning import OUT_OF_MEMORY, Report, Trial, read_report
from downpour_common import exitcodes
from downpour_common.errors import DownpourError
from downpour_common.process import die_with_parent, prepare_child

TAIL_BYTES = 8 << 10


class ScriptError(DownpourError):
    """The script cannot be measured. ``code``: the command's exit code; ``output``: what the script said last."""

    def __init__(self, message: str, code: int = exitcodes.FAILED, output: str = "") -> None:
        self.code = code
        self.output = output
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run has ended. ``code``: None if it was ended because it took too long."""

    code: int | None
    report: Report | None
    output: str


def run(command: Sequence[str], environment: Mapping[str, str], trial: Trial, timeout_s: float) -> Ended:
    """Start ``command``, and wait for its end. It dies with this process, and with it goes what it has started."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(trial.report)
    prepare_child()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**environment, **trial.to_environment()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509  it allocates nothing and takes no lock
        )
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL_BYTES))
        return Ended(code, read_report(trial.report), output.read().decode(errors="replace"))


def judge(ended: Ended, script: str, timeout_s: float) -> Report | str:
    """What was measured; or, as a text, why this batch size is too large. Raises :class:`ScriptError`."""
    report = ended.report
    if ended.code is None:
        raise ScriptError(
            f"{script} has not taken its steps within {timeout_s:g} s; give it longer with --timeout",
            output=ended.output,
        )
    if (report is not None and report.problem == OUT_OF_MEMORY) or ended.code == -signal.SIGKILL:
        return OUT_OF_MEMORY
    if ended.code:
        problem = report.problem if report is not None and report.problem else "it failed before downpour.prepare"
        raise ScriptError(f"{script}: {problem}", exitcodes.of_process(ended.code), ended.output)
    if report is None:
        raise ScriptError(f"{script} has ended without a call of downpour.prepare", output=ended.output)
    if report.step_s:
        return report
    if report.steps == 0 and report.problem.startswith("the data set"):
        return report.problem
    if report.steps == 0:
        raise ScriptError(
            f"{script} has ended, and the optimizer given to downpour.prepare never took a step; tune times "
            "optimizer.step()",
            output=ended.output,
        )
    raise ScriptError(
        f"{script} has ended after {report.steps} step(s), too few to time one; have it train longer (more passes or "
        "samples)",
        output=ended.output,
    )
