"""Counts of bytes as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal

from downpour_common.errors import ConfigError

_PREFIXES = "KMGTPE"
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}ib".lower(): 1 << 10 * i for i, p in enumerate(_PREFIXES, 1)},
    **{f"{p}i".lower(): 1 << 10 * i for i, p in enumerate(_PREFIXES, 1)},  # as Kubernetes writes them
    **{f"{p}b".lower(): 1000**i for i, p in enumerate(_PREFIXES, 1)},
}
_SIZE = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,19})?)[ ]?([A-Za-z]*)")
_LARGEST = (1 << 63) - 1


def parse_bytes(text: str) -> int:
    """``"8GiB"``, ``"512 MiB"``, ``"1.5GB"``, ``"8Gi"`` or ``"1024"`` → bytes, at most 2⁶³ - 1, parts of bytes cut off.

    Units in any case; ``GiB`` is 1024³, ``GB`` 1000³. ``8G`` is refused, since half of all tools mean one and half the
    other. Raises :class:`ConfigError`, which does not name the option: who asks knows it.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write a number of bytes such as 512MiB, 8GiB or 1.5GB")
    number, unit = match.groups()
    factor = _UNITS.get(unit.lower())
    if factor is None:
        prefix = unit.upper()
        if len(prefix) == 1 and prefix in _PREFIXES:
            hint = f"write {number}{prefix}iB (1024s) or {number}{prefix}B (1000s)"
        else:
            hint = "known: B, " + ", ".join(f"{p}iB" for p in _PREFIXES) + " (1024s), KB, MB, … (1000s)"
        raise ConfigError(f"{text!r}: no unit {unit!r}; {hint}")
    count = int(Decimal(number) * factor)
    if count > _LARGEST:
        raise ConfigError(f"{text!r} is more than {format_bytes(_LARGEST)}")
    return count


def format_bytes(count: int) -> str:
    """``1610612736`` → ``"1.5 GiB"``: for people, with one decimal at most."""
    if count < 1024:
        return f"{count} B"
    unit = min(len(_PREFIXES), (count.bit_length() - 1) // 10)
    tenths = round(10 * count / (1 << 10 * unit))
    if tenths >= 10240 and unit < len(_PREFIXES):  # 1023.96 KiB would be written as 1024
        unit, tenths = unit + 1, 10
    return f"{tenths / 10:g} {_PREFIXES[unit - 1]}iB"
