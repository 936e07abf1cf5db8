"""Tensor dtypes by name, as they stand on the wire and in files; free of torch."""

from __future__ import annotations

from downpour_common.errors import ProtocolError

ITEMSIZE: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "complex64": 8,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes per element."""

TRAINABLE = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Dtypes that an update rule can train."""

SAFETENSORS: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""Names of the dtypes in a safetensors header."""

FROM_SAFETENSORS: dict[str, str] = {code: name for name, code in SAFETENSORS.items()}


def itemsize(dtype: str) -> int:
    """Bytes per element of ``dtype``; raises :class:`ProtocolError` for a dtype that Downpour does not carry."""
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise ProtocolError(f"unknown dtype {dtype!r}; known: {', '.join(ITEMSIZE)}") from None


def pushed_as(dtype: str, push_dtype: str) -> str:
    """The dtype as which gradients of trainable chunks of ``dtype`` travel in a job with this ``push_dtype``.

    ``same``: as they are. ``bfloat16``: float32 is rounded to it, which halves what is sent; all else is as it is.
    """
    return "bfloat16" if push_dtype == "bfloat16" and dtype == "float32" else dtype
