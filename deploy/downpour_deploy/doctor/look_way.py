"""Gathers facts about the way to the coordinator: name service, a connection, interfaces."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

from downpour_deploy.agent.resources import address_towards
from downpour_deploy.doctor.facts import Interface, WayFacts

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_GREETING_BYTES = 64
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00"
"""How a client of ZMTP 3 begins: signature and version. The listener then says all of its own greeting; it would hang
up before that if it saw a mechanism that is not its own. https://rfc.zeromq.org/spec/23"""
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")


def look(host: str, port: int, timeout_s: float) -> WayFacts:
    """Resolve ``host``, connect once, read how the listener greets, and see which way it goes."""
    addresses, error, only_ipv6 = _resolve(host, port)
    if not addresses:
        return WayFacts(host, port, resolve_error=error, only_ipv6=only_ipv6)
    connect_error, greeting = _greet(addresses, port, timeout_s)
    source = ""
    with suppress(OSError):  # no route
        source = address_towards(addresses[0], port)
    return WayFacts(
        host,
        port,
        addresses,
        connect_error=connect_error,
        mechanism=mechanism_of(greeting or b""),
        silent=not connect_error and greeting is None,
        source=source,
        interface=next((found for found in interfaces() if found.address == source), None),
        in_container=any(os.path.exists(mark) for mark in _CONTAINER_MARKS),
        bind_error=_bind_error(source) if source else "",
        ports=_ports(),
    )


def _resolve(host: str, port: int) -> tuple[tuple[str, ...], str, bool]:
    """IPv4 addresses, why there are none, and whether there are others."""
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        with suppress(socket.gaierror, UnicodeError):
            return (), "", bool(socket.getaddrinfo(host, port, socket.AF_INET6, socket.SOCK_STREAM))
        return (), str(getattr(error, "strerror", None) or error), False
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found)), "", False


def _greet(addresses: tuple[str, ...], port: int, timeout_s: float) -> tuple[str, bytes | None]:
    """Why no connection came about ("" when one did), and how the listener greets; None if it says nothing."""
    problem = ""
    for address in addresses:
        try:
            with socket.create_connection((address, port), timeout_s) as sock:
                return "", _greeting(sock)
        except TimeoutError:
            problem = f"no answer within {timeout_s:g} s"
        except OSError as error:
            problem = error.strerror or str(error)
    return problem, None


def _greeting(sock: socket.socket) -> bytes | None:
    answer = b""
    try:
        sock.sendall(_GREETING)
        while len(answer) < _GREETING_BYTES and (part := sock.recv(_GREETING_BYTES - len(answer))):
            answer += part
    except TimeoutError:
        return answer or None
    except OSError:
        pass  # it has hung up: what it said before counts
    return answer


def mechanism_of(greeting: bytes) -> str:
    """``NULL``, ``PLAIN``, ``CURVE``, … of a ZMTP greeting; "" for anything else."""
    if len(greeting) < _GREETING_BYTES or greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
        return ""
    return greeting[12:32].rstrip(b"\0").decode("ascii", "replace")


def interfaces() -> list[Interface]:
    """All interfaces that have an IPv4 address; the first address of each."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has no address
                address = fcntl.ioctl(sock, _SIOCGIFADDR, request)[20:24]
                mask = fcntl.ioctl(sock, _SIOCGIFNETMASK, request)[20:24]
                found.append(Interface(name, str(IPv4Address(address)), int.from_bytes(mask, "big").bit_count()))
    return found


def _bind_error(address: str) -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
            sock.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _ports() -> tuple[int, int]:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 0, 0
