"""From the options of ``downpour server start`` and ``downpour worker start`` to an agent that runs."""

from __future__ import annotations

import ipaddress
import platform
import re
import secrets
import socket
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvloop

from downpour_common import exitcodes
from downpour_common.addresses import is_local
from downpour_common.config import parse_labels
from downpour_common.errors import ConfigError
from downpour_common.keys import ClientKeys, load_pair, load_public
from downpour_common.sizes import format_bytes, parse_bytes
from downpour_common.transport.zeromq import public_of
from downpour_deploy.agent import resources, spawn
from downpour_deploy.agent.announce import Announcer
from downpour_deploy.agent.effects import AgentFacts
from downpour_deploy.agent.folder import DataFolder
from downpour_deploy.agent.service import AgentService

MEMORY_SHARE = 0.8
"""Of the host's memory, what shards get unless told otherwise."""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line's values as they were given; "" for those that were not. Times in seconds."""

    role: str
    join: str
    keys: str
    security: str
    name: str
    labels: tuple[str, ...]
    data_dir: str
    grace_s: float
    orphan_s: float
    start_timeout_s: float
    json: bool
    memory: str = ""
    advertise: str = ""
    bind: str = ""
    slots: str = "auto"
    device: str = "auto"


def start(options: Options) -> int:
    """Run an agent to its end; an exit code. Raises :class:`ConfigError` with all problems, :class:`OSError`."""
    problems: list[str] = []
    host, port = _join(options.join, problems)
    keys = _keys(options, host, problems)
    name = options.name or resources.node_name(resources.host_name(), options.role)
    if not _NAME.fullmatch(name):
        problems.append(f"--name {name}: use a-z, 0-9 and -, at most 64 characters")
    gpus = resources.gpus() if options.role == "worker" and options.device != "cpu" else ()
    document = _facts(options, len(gpus), problems)
    bind = _bind(options, problems)
    if problems:
        raise ConfigError(*problems)
    where = f"{host}:{port}"
    announcer = Announcer(options.role, name, where, _for_people(options.role, document), options.json)
    if keys is None and (options.security == "none" or not is_local(f"tcp://{host}:{port}")):
        announcer.tell("WARNING: --security none: whoever reaches the coordinator's network can run code on this host")
    if options.role == "server" and not bind:
        bind = _address(host, port, announcer, options.start_timeout_s)
        if not bind:
            return exitcodes.UNREACHABLE
    document["address"] = bind
    facts = AgentFacts(name, options.role, secrets.token_hex(8), document, options.orphan_s, options.grace_s)
    process_host = spawn.Host(
        f"tcp://{where}", bind, document["cores"], document["slots"], gpus, options.device, spawn.inherited()
    )
    folder = DataFolder(options.data_dir)
    try:
        return uvloop.run(_run(facts, process_host, folder, keys, announcer, options.start_timeout_s))
    finally:
        folder.close()


async def _run(
    facts: AgentFacts,
    host: spawn.Host,
    folder: DataFolder,
    keys: ClientKeys | None,
    announcer: Announcer,
    start_timeout_s: float,
) -> int:
    return await AgentService(facts, host, folder, keys, announcer, start_timeout_s).run()


# ---------------------------------------------------------------- options


def _join(text: str, problems: list[str]) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
        problems.append(f"--join {text}: expected HOST:PORT of the coordinator, an IPv4 address or a name")
        return "localhost", 0
    return host, int(port)


def _keys(options: Options, host: str, problems: list[str]) -> ClientKeys | None:
    if options.security not in ("", "none", "curve"):
        problems.append(f"--security {options.security}: expected curve or none")
    elif options.security == "none":
        pass  # whatever DOWNPOUR_KEYS says
    elif options.keys:
        try:
            pair = load_pair(Path(options.keys), options.role, public_of=public_of)
            return ClientKeys(pair, {}, load_public(Path(options.keys), "coordinator"))
        except ConfigError as error:
            problems += [f"--keys {problem}" for problem in error.problems]
    elif options.security == "curve":
        problems.append("--security curve: give the folder of keys with --keys DIR")
    elif not is_local(f"tcp://{host}:0"):
        problems.append(
            f"--join {options.join}: without keys, whoever reaches that network could run code on this host. "
            f"Give --keys DIR with {options.role}.key and coordinator.pub (made by: downpour keys new), "
            "or --security none where nobody else reaches it"
        )
    return None


def _facts(options: Options, gpus: int, problems: list[str]) -> dict[str, Any]:
    """What the coordinator is told of this host, but for its address and the time."""
    cores, memory = resources.cores(), resources.memory_bytes()
    slots, labels = 0, {}
    if options.role == "server":
        memory = int(memory * MEMORY_SHARE)
        try:
            memory = parse_bytes(options.memory) if options.memory else memory
        except ConfigError as error:
            problems.append(f"--memory: {error}")
    else:
        if options.device not in _DEVICES:
            problems.append(f"--device {options.device}: expected one of {', '.join(_DEVICES)}")
        if options.device == "cuda" and not gpus:
            problems.append("--device cuda: no GPU was found on this host")
        slots = _slots(options.slots, gpus or cores, problems)
    try:
        labels = parse_labels("--label", options.labels)
    except ConfigError as error:
        problems += error.problems
    return {
        "host": resources.host_name(),
        "address": "",
        "cores": cores,
        "memory_bytes": memory,
        "gpus": gpus,
        "labels": labels,
        "slots": slots,
        "version": version("downpour-ps"),
        "boot": resources.boot_id(),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def _slots(text: str, auto: int, problems: list[str]) -> int:
    if text == "auto":
        return auto
    if not text.isdecimal() or not 0 < int(text) <= 4096:
        problems.append(f"--slots {text}: expected a number from 1 to 4096, or auto")
        return 1
    return int(text)


def _bind(options: Options, problems: list[str]) -> str:
    """Where shards listen, as far as the options say; shards are reached at the address that they listen on."""
    if options.role != "server":
        return ""
    if options.bind and options.advertise and options.bind != options.advertise:
        problems.append("--bind and --advertise: shards are reached at the address they listen on; give one of the two")
    address = options.bind or options.advertise
    if not address:
        return ""
    option = f"{'--bind' if options.bind else '--advertise'} {address}"
    try:
        parsed = ipaddress.IPv4Address(address)
        if parsed.is_unspecified:
            problems.append(f"{option}: give the address of one interface, at which other hosts reach this one")
            return ""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
    except ValueError:
        problems.append(f"{option}: expected an IPv4 address")
    except OSError as error:
        problems.append(f"{option}: shards cannot listen there: {error.strerror}")
    return address


def _for_people(role: str, document: dict[str, Any]) -> dict[str, Any]:
    if role == "server":
        return {"memory": format_bytes(document["memory_bytes"]), "cores": document["cores"]}
    return {"slots": document["slots"], "cores": document["cores"], "GPUs": document["gpus"]}


def _address(host: str, port: int, announcer: Announcer, timeout_s: float) -> str:
    """The address on the route to the coordinator, once there is one; "" when that took too long."""
    started_s = time.monotonic()
    while True:
        try:
            return resources.address_towards(host, port)
        except OSError:  # the name is not known yet, or the network is not up
            now_s = time.monotonic()
            announcer.waiting(started_s, "", now_s)
            if timeout_s and now_s - started_s >= timeout_s:
                announcer.gave_up(now_s - started_s)
                return ""
            time.sleep(1.0)
