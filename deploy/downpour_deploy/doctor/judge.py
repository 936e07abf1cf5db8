"""From facts to verdicts. Everything here and in the modules that it calls is a pure function."""

from __future__ import annotations

from downpour_deploy.doctor import judge_cluster, judge_host, judge_way
from downpour_deploy.doctor.facts import Facts
from downpour_deploy.doctor.verdict import Verdict

NEEDS_COORDINATOR = ("version", "clock", "round-trip", "throughput", "nodes")
"""Checks that nothing can be said about before the coordinator has answered."""


def judge(facts: Facts) -> list[Verdict]:
    """All verdicts, in the order in which they depend on each other. What nobody can know is left out."""
    verdicts: list[Verdict] = []
    if facts.keys is not None:
        verdicts.append(judge_way.keys(facts.keys, facts.role, facts.way))
    if facts.way is not None:
        way = facts.way
        verdicts.append(judge_way.name(way))
        if way.addresses:
            verdicts.append(judge_way.connection(way))
    if facts.way is not None and facts.keys is not None and facts.cluster is not None and _listening(facts):
        verdicts.append(judge_way.security(facts.way, facts.keys, facts.cluster.outcome))
    if facts.cluster is not None and facts.cluster.outcome == "answered":
        verdicts += judge_cluster.all_of(facts.cluster, facts.role, facts.host.version)
    if facts.way is not None and facts.way.source:
        verdicts += [judge_way.address(facts.way, facts.cluster, facts.role), judge_way.ports(facts.way, facts.role)]
    return verdicts + judge_host.all_of(facts.host, facts.role)


def skipped(facts: Facts, verdicts: list[Verdict]) -> list[str]:
    """Names of checks for which the coordinator would have had to answer."""
    cluster = facts.cluster
    if facts.way is None or cluster is None:
        return []
    known = {verdict.name for verdict in verdicts}
    if cluster.nodes is None and cluster.throughput is not None:
        known.add("nodes")  # the key of an agent does not allow to ask
    return [name for name in NEEDS_COORDINATOR if name not in known]


def _listening(facts: Facts) -> bool:
    way = facts.way
    return way is not None and bool(way.addresses) and not way.connect_error and bool(way.mechanism)
