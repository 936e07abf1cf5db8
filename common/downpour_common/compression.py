"""Which codecs a job's gradients and weights travel in, as a text; free of torch.

::

    push=CODEC[,pull=CODEC]     either side alone will do

    fp16   bf16   int8   1bit   2bit   topk[:f]   randomk[:f]       f: the fraction that travels, above 0, at most 1
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from downpour_common.errors import ConfigError

if TYPE_CHECKING:
    from downpour_common.layout import Chunk

CODECS: dict[str, float] = {
    "fp16": 0.0,
    "bf16": 0.0,
    "int8": 0.0,
    "1bit": 0.0,
    "2bit": 0.0,
    "topk": 0.01,
    "randomk": 0.5,
}
"""The codecs by name, and the fraction that each takes unless told; 0: it takes none."""

WHOLE = frozenset({"fp16", "bf16", "int8"})
"""Those that weights can be sent in as they are. In the others, weights travel as differences."""

CODED_DTYPE = "float32"
"""The dtype of the trainable chunks that codecs are for; all others travel as they are."""


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """One codec. ``fraction``: of the elements that travel; 0 where the codec takes none."""

    name: str
    fraction: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}:{self.fraction!r}" if self.fraction else self.name

    @property
    def whole(self) -> bool:
        """See :data:`WHOLE`."""
        return self.name in WHOLE


@dataclass(frozen=True, slots=True)
class Compression:
    """A job's codecs; None: as it is."""

    push: CodecChoice | None = None
    pull: CodecChoice | None = None

    def __str__(self) -> str:
        return ",".join(f"{side}={c}" for side, c in (("push", self.push), ("pull", self.pull)) if c is not None)

    def __bool__(self) -> bool:
        return self.push is not None or self.pull is not None

    @property
    def remembers(self) -> bool:
        """Whether something that follows from all former steps is kept outside the weights: what pushes still owe, or
        what workers have. A worker that dies takes a part of it along."""
        return self.push is not None or (self.pull is not None and not self.pull.whole)


NO_COMPRESSION = Compression()


def is_coded(chunk: Chunk) -> bool:
    """Whether the job's codecs are for this chunk."""
    return chunk.kind == "trainable" and chunk.dtype == CODED_DTYPE


def parse_compression(text: str) -> Compression:
    """The codecs that ``text`` names, as in the module; empty: none. Raises :class:`ConfigError`."""
    sides: dict[str, CodecChoice] = {}
    for part in text.split(",") if text.strip() else ():
        side, equals, codec = (piece.strip() for piece in part.partition("="))
        if not equals or side not in ("push", "pull"):
            raise ConfigError(f"compress: expected push=CODEC or pull=CODEC, found {part.strip()!r}")
        if side in sides:
            raise ConfigError(f"compress: {side} is given twice")
        sides[side] = _choice(codec)
    return Compression(sides.get("push"), sides.get("pull"))


def _choice(text: str) -> CodecChoice:
    name, colon, argument = text.partition(":")
    if name not in CODECS:
        near = difflib.get_close_matches(name, CODECS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"compress: unknown codec {name!r}{hint} (known: {', '.join(CODECS)})")
    usual = CODECS[name]
    if not colon:
        return CodecChoice(name, usual)
    if not usual:
        raise ConfigError(f"compress: {name} takes no fraction, found {text!r}")
    try:
        fraction = float(argument)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        usually = f"such as {name}:{usual:g}"
        raise ConfigError(f"compress: {name} takes a fraction above 0 and at most 1, {usually}; found {text!r}")
    return CodecChoice(name, fraction)
