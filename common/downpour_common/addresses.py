"""Addresses as people type them."""

from __future__ import annotations

import ipaddress

from downpour_common.errors import ConfigError


def parse_address(text: str, any_port: bool = False) -> str:
    """``HOST:PORT``, ``[::1]:PORT``, ``tcp://HOST:PORT`` or ``ipc://PATH`` as ZeroMQ takes it.

    ``any_port``: port 0 is allowed, for a free one. Raises :class:`ConfigError`.
    """
    if text.startswith("ipc://") and len(text) > len("ipc://"):
        return text
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    valid = bool(bare) and not any(c.isspace() or c in "/@" for c in bare) and (":" not in bare or host[0] == "[")
    lowest = 0 if any_port else 1
    if not (colon and valid and port.isascii() and port.isdecimal() and lowest <= int(port) < 65536):
        raise ConfigError(f"{text}: expected HOST:PORT")
    return f"tcp://{host}:{int(port)}"


def is_local(address: str) -> bool:
    """Whether nothing leaves this host on the way to ``address``."""
    if address.startswith("ipc://"):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
