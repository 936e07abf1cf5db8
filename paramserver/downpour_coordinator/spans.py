"""Where what traced workers tell becomes ``spans.jsonl`` of the run; docs/tracing.md describes its lines."""

from __future__ import annotations

import os
import time

from downpour_common import messages as m
from downpour_common.messages import Message, Refusal
from downpour_common.spans import FILE

LINE_BYTES = 4 << 20
"""Largest line that is taken."""
FILE_BYTES = 2 << 30
"""No line is added to a file of this size."""


class SpanFile:
    """The spans of the run in ``folder``. The file is made by the first line. A line may come twice, if its answer was
    lost; readers see that by its number."""

    def __init__(self, folder: str, most_bytes: int = FILE_BYTES) -> None:
        self._path = os.path.join(folder, FILE)
        self._most_bytes = most_bytes
        self._told = False

    def answer(self, spans: m.Spans, problems: list[str]) -> Message:
        """Add a line. What is amiss is said once in ``problems``, and to each worker that it concerns."""
        try:
            error, code = self._add(bytes(spans.payload))
        except OSError as problem:  # a full disk does not stop the training
            error, code = f"the trace ends early: {problem.strerror or problem}", Refusal.UNUSABLE
        if not error:
            return m.Ack(spans.request, time.time_ns())
        if not self._told:
            self._told = True
            problems.append(error)
        return m.Refused(spans.request, code.value, error)

    def _add(self, line: bytes) -> tuple[str, Refusal]:
        if len(line) > LINE_BYTES or b"\n" in line:
            return "the trace ends early: a worker sent what is no line of it", Refusal.MALFORMED
        with open(self._path, "ab") as file:
            held = file.tell()
            if held + len(line) > self._most_bytes:
                return f"the trace ends early: {FILE} has {held} bytes", Refusal.TOO_LARGE
            file.write(line + b"\n")
        return "", Refusal.UNUSABLE
