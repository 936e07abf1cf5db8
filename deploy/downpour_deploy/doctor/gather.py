"""From the command line's values to facts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from downpour_common.addresses import is_local, parse_address
from downpour_common.errors import ConfigError
from downpour_deploy.doctor import look_cluster, look_host, look_keys, look_way
from downpour_deploy.doctor.facts import ClusterFacts, Facts

ROLES = ("user", "server", "worker")


@dataclass(frozen=True, slots=True)
class Options:
    """The values as they were given; "" for those that were not."""

    join: str
    keys: str
    security: str
    role: str
    data_dir: str
    timeout_s: float


def gather(options: Options, environment: Mapping[str, str] = os.environ) -> Facts:
    """Look at everything that can be looked at. Raises :class:`ConfigError` for values that make no sense."""
    join = options.join or environment.get("DOWNPOUR_COORDINATOR", "")
    address = _check(options, join, environment)
    host_facts = look_host.look(options.data_dir)
    declined = options.security == "none"
    folder = None if declined else options.keys or environment.get("DOWNPOUR_KEYS") or None
    if not address:
        keys_facts = None if folder is None else look_keys.look(folder, False, False, options.role)[0]
        return Facts(options.role, keys_facts, None, None, host_facts)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    keys_facts, keys = look_keys.look(folder, declined, is_local(address), options.role)
    way = look_way.look(host.strip("[]"), int(port), options.timeout_s)
    cluster = ClusterFacts("not-tried")
    # Whoever knows only the other mechanism never answers: what the listener says of itself is enough then.
    if way.mechanism == ("NULL" if folder is None else "CURVE") and (folder is None or keys is not None):
        may_list = options.role == "user" or keys is None
        cluster = look_cluster.look(f"tcp://{way.addresses[0]}:{port}", keys, may_list, options.timeout_s)
    return Facts(options.role, keys_facts, way, cluster, host_facts)


def _check(options: Options, join: str, environment: Mapping[str, str]) -> str:
    """The address; "" when none was given."""
    problems = []
    if options.role not in ROLES:
        problems.append(f"--role {options.role}: expected one of {', '.join(ROLES)}")
    if options.security not in ("", "none", "curve"):
        problems.append(f"--security {options.security}: expected curve or none")
    elif options.security == "none" and options.keys:
        problems.append("--keys and --security none exclude each other")
    elif options.security == "curve" and not (options.keys or environment.get("DOWNPOUR_KEYS")):
        problems.append("--security curve: give the folder of keys with --keys")
    address = ""
    try:
        address = parse_address(join) if join else ""
    except ConfigError as error:
        problems += [f"{'--join' if options.join else 'DOWNPOUR_COORDINATOR'} {problem}" for problem in error.problems]
    if address.startswith("ipc://"):
        problems.append(f"--join {join}: expected HOST:PORT")
    if problems:
        raise ConfigError(*problems)
    return address
