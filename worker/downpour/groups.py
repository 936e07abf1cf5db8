"""Parameter groups with modes of their own, against the optimizer that has them."""

from __future__ import annotations

from downpour_common.errors import ModelError
from downpour_common.layout import ModelSpec
from downpour_common.modes import Mode

NAMES_TOLD = 3


def check_groups(mode: Mode, spec: ModelSpec) -> None:
    """Raise :class:`ModelError` where ``mode`` names a parameter group that the optimizer does not have."""
    there = len(spec.options)
    missing = [str(group) for group, _ in mode.groups if group >= there]
    if missing:
        which = f"parameter group{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        has = "; ".join(f"{group}: {_names(spec, group)}" for group in range(there)) or "none"
        raise ModelError(
            f"mode {mode} names {which}, which the optimizer does not have. Its groups, numbered from 0 in the order "
            f"in which it got them: {has}"
        )


def _names(spec: ModelSpec, group: int) -> str:
    names = [tensor.name for tensor in spec.tensors if tensor.group == group]
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return (", ".join(names[:NAMES_TOLD]) + more) or "nothing that is trained"
