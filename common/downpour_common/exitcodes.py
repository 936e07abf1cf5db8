"""Exit codes of the ``downpour`` command. A failed script's own code passes through unchanged."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
IO_ERROR = 74
"""The run ended well but its results could not be written (EX_IOERR)."""
INTERRUPTED = 130


def of_process(returncode: int) -> int:
    """The shell's exit code for a process that ended with ``returncode`` (negative: killed by that signal)."""
    return 128 - returncode if returncode < 0 else returncode
