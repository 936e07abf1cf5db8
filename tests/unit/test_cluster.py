"""The cluster: nodes that come and go, jobs that queue, and that what should run does, whatever is lost on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from coordinator_kit import Agent, Hosts, facts, spec_of
from hypothesis import given
from hypothesis import strategies as st

from downpour_common import messages as m
from downpour_common.errors import ConfigError, ProtocolError
from downpour_common.messages import Refusal
from downpour_coordinator.cluster import Cluster, JobKeys, JobRecord
from downpour_coordinator.describe import job_document, node_document
from downpour_coordinator.effects import Send
from downpour_coordinator.phases import Phase
from downpour_coordinator.running import NO_PLACE_S


def small(**fields: Any) -> Hosts:
    """One server, and two worker nodes with two slots each."""
    hosts = Hosts(**fields)
    hosts.add("s1", "server")
    hosts.add("w1")
    hosts.add("w2")
    return hosts


def running(hosts: Hosts, **fields: Any) -> JobRecord:
    """A job in training."""
    record = hosts.submit(**fields)
    hosts.join(record)
    assert record.life.phase is Phase.TRAINING
    return record


def where(record: JobRecord) -> dict[str, str]:
    return {p.name: p.node for p in record.life.processes.values() if p.running}


def refused(message: m.Message | None) -> str:
    assert isinstance(message, m.Refused), message
    return message.code


def has(hosts: Hosts, record: JobRecord) -> set[tuple[str, str, int, int]]:
    """What the job's agents run of it."""
    found = {(a.role, a.name, i, e) for a in hosts.agents.values() for job, i, e in a.processes if job == record.job}
    return {(name, role, index, epoch) for role, name, index, epoch in found}


def finish(hosts: Hosts, record: JobRecord) -> None:
    """Its workers leave and end well; so do, told to, its shards."""
    for slot, worker in list(record.life.training.workers.items()):
        node = record.life.processes["worker", slot].node
        peer = f"{record.job} worker/{slot}".encode()
        hosts.say(peer, m.Goodbye(hosts.number(), record.job, slot, worker.epoch, False, 0))
        hosts.agents[node].end(record.job, slot, worker.epoch)
    for slot, process in record.life.processes.items():
        assert slot[0] != "worker" or process.code == 0
    number = record.life.training.snapshot
    assert number
    for index in record.life.training.shards:
        entry = {"file": f"shard-{index}.safetensors", "bytes": 1, "sha256": "", "chunks": {}}
        taken = {**entry, "trainable_versions": [1], "position": []}
        epoch = record.life.training.facts.shard_epoch
        peer = f"{record.job} server/{index}".encode()
        hosts.say(peer, m.SnapshotTaken(record.job, index, epoch, number, "", taken))
    hosts.wait(8.0)
    assert record.life.state == "SUCCEEDED"


# ---------------------------------------------------------------- nodes register


def test_a_node_says_what_it_has() -> None:
    hosts = Hosts()
    hosts.add("w1", labels={"gpu": "a100"}, gpus=2, slots=2)
    node = hosts.cluster.nodes["w1"]
    document = node_document(hosts.cluster, node, hosts.now_s + 3.0)
    assert (document["state"], document["slots"], document["used"], document["gpus"]) == ("READY", 2, 0, 2)
    assert (document["labels"], document["last_seen_s"]) == ({"gpu": "a100"}, 3.0)


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "a/b", "x" * 200, "é"])
def test_a_name_must_be_one(name: str) -> None:
    hosts = Hosts()
    message = m.RegisterNode(1, name, "worker", "i", facts())
    hosts.do(hosts.cluster.register_node(b"peer", "worker", message, 0.0))
    assert refused(hosts.sent[-1][1]) == Refusal.UNUSABLE
    assert hosts.cluster.nodes == {}


@pytest.mark.parametrize(
    "fields", [{"cores": "4"}, {"labels": {"a": 1}}, {"slots": -1}, {"gpus": None}, {"memory_bytes": -1}], ids=repr
)
def test_facts_must_be_facts(fields: dict[str, Any]) -> None:
    hosts = Hosts()
    message = m.RegisterNode(1, "w", "worker", "i", {**facts(), **fields})
    hosts.do(hosts.cluster.register_node(b"peer", "worker", message, 0.0))
    assert refused(hosts.sent[-1][1]) == Refusal.UNUSABLE


def test_a_name_that_a_live_agent_has_is_not_given_away() -> None:
    hosts = Hosts()
    hosts.add("w1")
    second = Agent(hosts, "w1", "worker")
    second.instance = "instance-9"
    hosts.agents["second"] = second
    assert refused(second.register()) == Refusal.NOT_READY, "its predecessor may only just have died"
    hosts.agents["w1"].silent = True
    hosts.wait(hosts.node_timeout_s + 1.0)
    assert isinstance(second.register(), m.Ack)


@pytest.mark.parametrize("fields", [{"role": "server", "user": "server"}, {"user": "worker/other"}])
def test_a_name_belongs_to_a_role_and_a_key(fields: dict[str, str]) -> None:
    hosts = Hosts()
    hosts.add("n")
    other = Agent(hosts, "n", fields.get("role", "worker"))
    other.user, other.instance = fields["user"], "instance-9"
    hosts.agents["other"] = other
    assert refused(other.register()) == Refusal.UNUSABLE


def test_registering_again_changes_nothing() -> None:
    hosts = small()
    record = running(hosts)
    before = where(record)
    assert isinstance(hosts.agents["w1"].register(), m.Ack)
    hosts.tick()
    assert where(record) == before
    assert len(hosts.agents["w1"].starts) == 1


@pytest.mark.parametrize(("instance", "user"), [("other", "worker"), ("instance-1", "server")])
def test_a_heart_that_nobody_knows_is_asked_who_it_is(instance: str, user: str) -> None:
    hosts = Hosts()
    hosts.add("w1")
    hosts.do(hosts.cluster.heartbeat(b"stranger", user, m.Heartbeat("w1", instance, {}), hosts.now_s))
    assert hosts.sent[-1] == (b"stranger", m.WhoAreYou())


@pytest.mark.parametrize(
    "processes",
    [5, None, "text", [5], [{}], [{"job": "j"}], [{"job": "j", "role": "worker", "index": None, "epoch": 0}]],
    ids=repr,
)
def test_a_heartbeat_that_makes_no_sense_is_a_heartbeat(processes: Any) -> None:
    hosts = Hosts()
    hosts.add("w1")
    hosts.now_s += 5.0
    beat = m.Heartbeat("w1", "instance-1", {"processes": processes})
    hosts.do(hosts.cluster.heartbeat(hosts.agents["w1"].peer, "worker", beat, hosts.now_s))
    assert hosts.cluster.nodes["w1"].seen_s == hosts.now_s
    assert hosts.cluster.nodes["w1"].reported == {}


# ---------------------------------------------------------------- what should run does


def test_a_job_is_placed_and_started() -> None:
    hosts = small()
    record = hosts.submit(workers=3)
    assert record.life.phase is Phase.STARTING
    assert where(record) == {"server/0": "s1", "worker/0": "w1", "worker/1": "w2", "worker/2": "w1"}
    start = hosts.agents["w1"].starts[0]
    assert (start.job, start.role, start.index, start.epoch) == (record.job, "worker", 0, 0)
    assert (start.document["bundle"], start.document["workers"], start.document["keys"]) == ("b" * 64, 3, None)


def test_a_start_is_repeated_until_the_node_has_it() -> None:
    hosts = small()
    for agent in hosts.agents.values():
        agent.silent = True
    record = hosts.submit(workers=2)
    for agent in hosts.agents.values():
        agent.silent = False
        assert agent.processes == {}
    hosts.tick()
    assert has(hosts, record) == {("s1", "server", 0, 0), ("w1", "worker", 0, 0), ("w2", "worker", 1, 0)}
    before = len(hosts.sent)
    hosts.tick()
    assert hosts.sent[before:] == [], "all is as it should be"


def test_a_stop_is_repeated_until_it_is_done() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    for agent in hosts.agents.values():
        agent.silent = True
    hosts.do(hosts.cluster.cancel(record, hosts.now_s))
    hosts.tick()
    assert any(isinstance(message, m.StopProcess) for _, message in hosts.sent)
    for agent in hosts.agents.values():
        agent.silent = False
    hosts.wait(3.0)
    assert record.life.state == "CANCELLED"
    assert has(hosts, record) == set()


def test_what_should_not_run_is_ended() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    hosts.agents["w1"].processes[record.job, 7, 3] = "running"
    hosts.agents["w1"].processes["unknown-job", 0, 0] = "running"
    hosts.tick()
    assert (record.job, 7, 3) not in hosts.agents["w1"].processes
    assert hosts.agents["w1"].forgot == ["unknown-job"]


def test_what_has_ended_but_is_not_yet_reported_is_left_alone() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    hosts.agents["w1"].processes[record.job, 7, 3] = "ended"
    hosts.tick()
    assert (record.job, 7, 3) in hosts.agents["w1"].processes


def test_a_job_that_is_over_is_forgotten_by_its_nodes() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    other = hosts.add("w3")
    finish(hosts, record)
    hosts.tick()
    assert [hosts.agents[n].forgot for n in ("s1", "w1", "w2")] == [[record.job]] * 3
    assert other.forgot == []
    late = m.LogData(1, "w1", "instance-1", record.job, "worker", 0, 0, 0, b"")
    assert not hosts.cluster.owns("worker", late), "its files are complete by now"


def test_output_is_taken_from_nodes_that_had_the_job() -> None:
    hosts = small()
    record = running(hosts, workers=1)
    log = m.LogData(1, "w1", "instance-1", record.job, "worker", 0, 0, 0, b"")
    assert hosts.cluster.owns("worker", log)
    for other in ({"node": "w2"}, {"instance": "x"}, {"job": "unknown"}):
        assert not hosts.cluster.owns("worker", replace(log, **other))
    assert not hosts.cluster.owns("server", log)


def test_the_report_of_an_end_is_acknowledged_each_time() -> None:
    hosts = small()
    record = running(hosts, workers=2, restarts=1)
    node = where(record)["worker/1"]
    hosts.cluster.dirty_jobs.clear()
    assert isinstance(hosts.agents[node].end(record.job, 1, code=-9), m.Ack)
    assert record.job in hosts.cluster.dirty_jobs, "it is written down before the acknowledgement leaves"
    assert isinstance(hosts.agents[node].end(record.job, 1, code=-9), m.Ack)
    assert record.life.restarts == 1
    assert refused(hosts.agents[node].end("unknown", 1)) == Refusal.UNKNOWN


def test_the_report_of_another_node_counts_for_nothing() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    other = "w1" if where(record)["worker/1"] == "w2" else "w2"
    assert isinstance(hosts.agents[other].end(record.job, 1, code=1), m.Ack)
    assert record.life.phase is Phase.TRAINING


def test_the_last_output_is_shown() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    hosts.agents[where(record)["worker/1"]].end(record.job, 1, code=3, tail=["first line", "last line"])
    assert record.life.failure is not None
    assert record.life.failure.details == "first line\nlast line"


@pytest.mark.parametrize("document", [{"tail": "text"}, {"tail": [5, None]}, {"code": "no"}, {"error": 5}], ids=repr)
def test_a_report_that_makes_no_sense_is_an_end(document: dict[str, Any]) -> None:
    hosts = small()
    record = running(hosts, workers=2)
    agent = hosts.agents[where(record)["worker/1"]]
    assert isinstance(agent.end(record.job, 1, **document), m.Ack)
    assert record.life.failure is not None


# ---------------------------------------------------------------- nodes that are lost


def test_a_silent_node_is_lost_with_all_that_it_had() -> None:
    hosts = small()
    record = running(hosts, workers=2, restarts=1)
    node = where(record)["worker/1"]
    hosts.agents[node].silent = True
    hosts.wait(hosts.node_timeout_s + 2.0)
    assert hosts.cluster.nodes[node].state == "LOST"
    assert (record.life.restarts, where(record)["worker/1"]) == (1, "w1" if node == "w2" else "w2")
    hosts.join(record)
    assert record.life.training.live() == [0, 1]


def test_a_lost_node_that_returns_ends_what_it_should_not_have_any_more() -> None:
    hosts = small()
    record = running(hosts, workers=2, restarts=1)
    node = where(record)["worker/1"]
    hosts.agents[node].silent = True
    hosts.wait(hosts.node_timeout_s + 2.0)
    hosts.agents[node].silent = False
    hosts.tick()
    assert hosts.cluster.nodes[node].state == "READY"
    assert hosts.agents[node].processes == {}
    assert (record.life.phase, record.life.restarts) == (Phase.TRAINING, 1)


def test_an_agent_that_is_started_again_has_lost_all() -> None:
    hosts = small()
    record = running(hosts, workers=2, restarts=1)
    agent = hosts.agents[where(record)["worker/1"]]
    assert refused(agent.restart()) == Refusal.NOT_READY
    agent.silent = True
    hosts.wait(hosts.node_timeout_s + 1.0)
    agent.silent = False
    assert isinstance(agent.register(), m.Ack)
    hosts.tick()
    hosts.join(record)
    assert record.life.training.live() == [0, 1]
    assert len(has(hosts, record)) == 3


def test_an_agent_that_leaves_takes_its_node_along() -> None:
    hosts = small()
    record = running(hosts, workers=2, min_workers=1)
    agent = hosts.agents[where(record)["worker/1"]]
    leaving = m.NodeLeaving(hosts.number(), agent.name, agent.instance, "SIGTERM")
    hosts.do(hosts.cluster.node_leaving(agent.peer, "worker", leaving, hosts.now_s))
    assert agent.told[-1] == m.Ack(leaving.request, 0)
    assert agent.name not in hosts.cluster.nodes
    assert record.life.phase is Phase.TRAINING
    hosts.do(hosts.cluster.node_leaving(agent.peer, "worker", leaving, hosts.now_s))
    assert agent.told[-1] == m.Ack(leaving.request, 0)


def test_nobody_says_goodbye_for_another() -> None:
    hosts = small()
    hosts.do(hosts.cluster.node_leaving(b"", "server", m.NodeLeaving(1, "w1", "instance-1", ""), hosts.now_s))
    assert "w1" in hosts.cluster.nodes


def test_an_agent_that_is_being_stopped_gets_nothing_new_and_its_workers_move() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    agent = hosts.agents[where(record)["worker/1"]]
    agent.draining = True
    agent.beat()
    assert hosts.cluster.nodes[agent.name].state == "DRAINING"
    agent.end(record.job, 1, code=143, stopped="agent")
    hosts.tick()
    assert where(record)["worker/1"] != agent.name
    assert record.life.restarts == 0


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_an_agent_may_be_stopped_while_a_job_starts(mode: str) -> None:
    hosts = small()
    record = hosts.submit(workers=2, mode=mode)
    agent = hosts.agents[where(record)["worker/1"]]
    agent.draining = True
    agent.beat()
    agent.end(record.job, 1, code=-15, stopped="agent", error="the agent is being stopped")
    hosts.tick()
    assert where(record)["worker/1"] != agent.name
    hosts.join(record)
    assert record.life.training.live() == [0, 1]
    assert (record.life.state, record.life.restarts, record.life.failure) == ("RUNNING", 0, None)


def test_a_shard_whose_agent_is_stopped_is_lost_with_its_host() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    hosts.agents["s1"].end(record.job, 0, code=0, stopped="agent")
    assert record.life.failure is not None
    assert (record.life.failure.reason, record.life.failure.exit_code) == ("NODE_LOST", 1)


# ---------------------------------------------------------------- drained nodes


def test_a_drained_node_empties_and_can_be_used_again() -> None:
    hosts = small()
    hosts.add("w3", slots=2)
    record = running(hosts, workers=2)
    node = where(record)["worker/1"]
    hosts.do(hosts.cluster.drain(node, False, hosts.now_s))
    document = node_document(hosts.cluster, hosts.cluster.nodes[node], hosts.now_s)
    assert (document["state"], record.job in document["message"]) == ("DRAINING", True)
    hosts.wait(2.0)
    hosts.join(record)
    assert node not in where(record).values()
    assert record.life.training.live() == [0, 1]
    hosts.do(hosts.cluster.drain(node, True, hosts.now_s))
    assert hosts.cluster.nodes[node].state == "READY"
    hosts.submit(workers=3)
    assert hosts.agents[node].processes
    with pytest.raises(ConfigError):
        hosts.cluster.drain("unknown", False, hosts.now_s)


def test_a_job_that_had_not_begun_is_drained_once_it_has() -> None:
    hosts = small()
    record = hosts.submit(workers=2)
    node = where(record)["worker/1"]
    hosts.do(hosts.cluster.drain(node, False, hosts.now_s))
    hosts.tick()
    assert where(record)["worker/1"] == node
    hosts.join(record)
    hosts.wait(2.0)
    assert where(record)["worker/1"] != node


def test_a_node_stays_drained_over_its_agents_restart() -> None:
    hosts = small()
    hosts.cluster.drain("w1", False, hosts.now_s)
    hosts.agents["w1"].silent = True
    hosts.wait(hosts.node_timeout_s + 1.0)
    hosts.agents["w1"].silent = False
    hosts.agents["w1"].restart()
    assert hosts.cluster.nodes["w1"].state == "DRAINING"


# ---------------------------------------------------------------- the queue


def test_jobs_wait_in_their_order_and_nobody_overtakes() -> None:
    hosts = small()
    first = running(hosts, workers=3)
    large = hosts.submit(workers=4)
    little = hosts.submit(workers=1)
    assert (large.life.phase, little.life.phase) == (Phase.QUEUED, Phase.QUEUED)
    assert large.message == "waiting for room: 3 of 4 worker slots are missing"
    assert little.message == f"waiting for its turn behind {large.job}"
    positions = [job_document(hosts.cluster, r, hosts.now_s)["position"] for r in (first, large, little)]
    assert positions == [0, 1, 2]
    hosts.do(hosts.cluster.cancel(first, hosts.now_s))
    hosts.wait(5.0)
    assert (first.life.state, large.life.phase, little.life.phase) == ("CANCELLED", Phase.STARTING, Phase.QUEUED)
    hosts.do(hosts.cluster.cancel(large, hosts.now_s))
    hosts.wait(5.0)
    assert little.life.phase is Phase.STARTING
    assert little.message == ""


def test_a_job_that_begins_again_goes_before_the_queue() -> None:
    hosts = small()
    first = running(hosts, workers=3, restarts=1, mode="sync")
    hosts.agents["s1"].silent = True
    hosts.wait(hosts.node_timeout_s + 6.0)
    assert (first.life.state, first.life.phase) == ("RESTARTING", Phase.QUEUED)
    little = hosts.submit(workers=1)
    assert little.message == f"waiting for its turn behind {first.job}"
    positions = [job_document(hosts.cluster, r, hosts.now_s)["position"] for r in (first, little)]
    assert positions == [1, 2]
    hosts.agents["s1"].silent = False
    hosts.wait(2.0)
    assert (first.life.phase, little.life.phase) == (Phase.STARTING, Phase.STARTING)


def test_a_job_that_begins_again_makes_do_with_fewer() -> None:
    hosts = small()
    record = running(hosts, workers=4, min_workers=2, restarts=1, mode="sync")
    hosts.agents["w1"].silent = True
    hosts.wait(hosts.node_timeout_s + 6.0)
    assert (record.life.restarts, record.life.phase) == (1, Phase.TRAINING), "others are wanted, who take over"
    assert [p.name for p in record.life.pending()] == ["worker/0", "worker/2"]
    hosts.wait(NO_PLACE_S + 6.0)
    assert (record.life.restarts, record.life.phase) == (1, Phase.STARTING)
    assert sorted(where(record)) == ["server/0", "worker/0", "worker/1"]
    hosts.join(record)
    assert record.life.state == "RUNNING"


def test_an_elastic_job_takes_what_there_is_and_grows() -> None:
    hosts = small()
    other = running(hosts, workers=2)
    record = running(hosts, workers=4, min_workers=1)
    hosts.tick()
    assert record.life.training.live() == [0, 1]
    assert "waiting for room" in record.message
    assert record.life.state == "RUNNING"
    hosts.do(hosts.cluster.cancel(other, hosts.now_s))
    hosts.wait(5.0)
    hosts.join(record)
    assert record.life.training.live() == [0, 1, 2, 3]
    assert record.message == ""


def test_a_job_that_does_not_wait_any_more_does_not_say_so() -> None:
    hosts = small()
    record = running(hosts, workers=3, min_workers=1)
    hosts.do(hosts.cluster.scale(record, 9, hosts.now_s))
    hosts.tick()
    assert "waiting for room" in record.message
    hosts.do(hosts.cluster.scale(record, 3, hosts.now_s))
    hosts.tick()
    assert record.message == ""


def test_what_could_never_run_is_told() -> None:
    hosts = small()
    cluster = hosts.cluster
    assert cluster.too_large(spec_of(workers=4)) == ""
    assert cluster.too_large(spec_of(workers=5)) == "1 of 5 worker slots are missing"
    assert cluster.too_large(spec_of(workers=9, min_workers=2)) == ""
    assert "shards of 2 GiB" in cluster.too_large(spec_of(shard_memory="2GiB"))
    running(hosts, workers=4)
    assert cluster.too_large(spec_of(workers=4)) == "", "it would fit if the cluster were idle"
    cluster.drain("w1", False, hosts.now_s)
    assert cluster.too_large(spec_of(workers=4)) != ""


def test_where_a_job_would_run_is_told_without_running_it() -> None:
    hosts = small()
    found = hosts.cluster.would_place(spec_of(workers=2))
    assert not isinstance(found, str)
    assert {p.node for p in found.values()} == {"s1", "w1", "w2"}
    assert all(a.processes == {} for a in hosts.agents.values())
    hosts.submit(workers=9)
    assert "queue" in str(hosts.cluster.would_place(spec_of(workers=1)))


def test_two_jobs_do_not_get_the_same_gpu() -> None:
    hosts = Hosts()
    hosts.add("s1", "server")
    hosts.add("w1", slots=4, gpus=3)
    one, other = hosts.submit(workers=2), hosts.submit(workers=2)
    gpus = [s.document["gpu"] for s in hosts.agents["w1"].starts]
    assert sorted(gpus) == [-1, 0, 1, 2]
    assert {p.gpu for p in one.life.processes.values() if p.role == "worker"} == {0, 1}
    assert other.life.phase is Phase.STARTING


# ---------------------------------------------------------------- jobs are apart


def test_messages_of_one_job_do_not_touch_another() -> None:
    hosts = small()
    one, other = running(hosts, workers=2), running(hosts, workers=1)
    before = other.life.document()
    with pytest.raises(ProtocolError):
        hosts.say(b"x", m.ShardReady(one.job, 5, 0, ""))
    hosts.say(b"x", m.Goodbye(hosts.number(), one.job, 1, 0, False, 0))
    hosts.say(b"x", m.Goodbye(hosts.number(), one.job, 0, 0, False, 0))
    assert other.life.document() == before
    assert one.life.training.live() == []


def test_what_comes_for_a_job_that_is_over_is_refused() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    hosts.do(hosts.cluster.cancel(record, hosts.now_s))
    hosts.wait(5.0)
    for job in (record.job, "unknown"):
        take = m.TakeLease(hosts.number(), job, 0, 0, 0, 0, 8, 4, "order", ())
        hosts.say(b"late", take)
        assert hosts.sent[-1] == (b"late", m.Refused(take.request, "wrong-job", "the job is over"))
        before = len(hosts.sent)
        hosts.say(b"late", m.ShardReport(job, 0, 0, {}))
        assert len(hosts.sent) == before


def test_jobs_are_found_by_id_name_or_beginning() -> None:
    hosts = small()
    one = hosts.submit("digits-aaaa11", workers=1)
    two = hosts.submit("digits-aaab22", workers=1)
    other = hosts.submit("words-cccc33", workers=1, name="words")
    find = hosts.cluster.find
    assert find("digits-aaaa11") is one
    assert find("digits") is two, "the newest of that name"
    assert find("digits-aaab") is two
    assert find("w") is other
    with pytest.raises(ConfigError, match="digits-aaaa11, digits-aaab22"):
        find("digits-")
    for text in ("", "nothing", "digits-aaaa11-more"):
        with pytest.raises(LookupError):
            find(text)


def test_keys_go_to_those_who_need_them() -> None:
    hosts = small()
    record = hosts.submit(workers=1)
    record.keys = JobKeys(("job-public", "job-secret"), ("shard-public", "shard-secret"))
    hosts.agents["s1"].processes.clear()
    hosts.agents["w1"].processes.clear()
    hosts.tick()
    server, worker = (hosts.agents[n].starts[-1].document["keys"] for n in ("s1", "w1"))
    assert server == {**worker, "shard_secret": "shard-secret"}
    assert worker == {"coordinator": "", "job": ["job-public", "job-secret"], "shards": "shard-public"}


# ---------------------------------------------------------------- another process takes over


def test_a_restarted_coordinator_goes_on_with_what_there_is() -> None:
    hosts = small()
    record = running(hosts, workers=2)
    queued = hosts.submit(workers=4)
    starts = [len(a.starts) for a in hosts.agents.values()]
    hosts.restarted()
    record, queued = hosts.cluster.jobs[record.job], hosts.cluster.jobs[queued.job]
    hosts.wait(3.0)
    assert (record.life.state, queued.life.state) == ("RUNNING", "PENDING")
    assert [len(a.starts) for a in hosts.agents.values()] == starts, "nothing was started twice"
    finish(hosts, record)
    hosts.wait(2.0)
    assert queued.life.state == "STARTING"


def test_a_node_that_was_lost_meanwhile_is_found_out() -> None:
    hosts = small()
    record = running(hosts, workers=2, restarts=1)
    node = where(record)["worker/1"]
    hosts.agents[node].silent = True
    hosts.restarted()
    record = hosts.cluster.jobs[record.job]
    hosts.wait(hosts.node_timeout_s - 1.0)
    assert record.life.restarts == 0, "it is given time to be heard of"
    hosts.wait(3.0)
    assert record.life.restarts == 1


def test_the_loss_of_a_node_is_written_down_with_what_it_had() -> None:
    """Else another process would wait for ever for what ran on a node that is known to be lost."""
    hosts = small()
    record = running(hosts, workers=2)
    hosts.do(hosts.cluster.cancel(record, hosts.now_s))
    hosts.cluster.dirty_jobs.clear()
    hosts.agents["w1"].silent = True
    hosts.now_s += hosts.node_timeout_s + 1.0
    hosts.cluster.tick(hosts.now_s)
    assert "w1" in hosts.cluster.dirty_nodes
    assert record.job in hosts.cluster.dirty_jobs


def test_a_node_is_remembered_as_it_was() -> None:
    hosts = small()
    hosts.cluster.drain("w1", False, hosts.now_s)
    hosts.agents["w2"].silent = True
    hosts.wait(hosts.node_timeout_s + 1.0)
    states = {n: node.state for n, node in hosts.cluster.nodes.items()}
    hosts.restarted()
    assert {n: node.state for n, node in hosts.cluster.nodes.items()} == states
    hosts.agents["w2"].silent = False
    hosts.tick()
    assert hosts.cluster.nodes["w2"].state == "READY"


EVENTS = ["submit", "join", "finish", "kill", "silent", "heard", "agent", "drain", "undrain", "cancel", "scale", "wait",
          "restart", "leave"]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 20)), max_size=30))
def test_in_the_end_everything_is_as_it_should_be(events: list[tuple[str, int]]) -> None:
    """Whatever is lost on the way: once all is heard again, nodes have what they should have, and nothing else."""
    hosts = small()
    for kind, dice in events:
        agent = [*hosts.agents.values()][dice % 3]
        records = [r for r in hosts.cluster.jobs.values() if not r.over]
        record = records[dice % len(records)] if records else None
        match kind:
            case "submit" if len(hosts.cluster.jobs) < 4:
                mode = ["async", "sync"][dice % 2]
                ranks = 1 + (dice > 13)
                fields = {"restarts": dice % 3, "mode": mode, "min_workers": ranks, "tensor": ranks}
                hosts.submit(workers=(1 + dice % 3) * ranks, **fields)
            case "join" if record is not None and record.life.phase in (Phase.STARTING, Phase.TRAINING):
                hosts.join(record)
            case "finish" | "kill":
                if agent.processes and not agent.silent:
                    job, index, epoch = sorted(agent.processes)[dice % len(agent.processes)]
                    agent.end(job, index, epoch, 0 if kind == "finish" else -9)
            case "silent" | "heard":
                agent.silent = kind == "silent"
            case "agent":
                agent.instance += "0"
                agent.processes.clear()
                agent.silent = False
            case "leave":
                message = m.NodeLeaving(hosts.number(), agent.name, agent.instance, "")
                hosts.do(hosts.cluster.node_leaving(agent.peer, agent.user, message, hosts.now_s))
                agent.processes.clear()
            case "drain" | "undrain" if agent.name in hosts.cluster.nodes:
                hosts.do(hosts.cluster.drain(agent.name, kind == "undrain", hosts.now_s))
            case "cancel" if record is not None:
                hosts.do(hosts.cluster.cancel(record, hosts.now_s))
            case "scale" if record is not None and record.life.phase is Phase.TRAINING:
                hosts.do(hosts.cluster.scale(record, (1 + dice % 4) * record.life.spec.ranks, hosts.now_s))
            case "wait":
                hosts.tick(dice)
            case "restart":
                hosts.restarted()
    for agent in hosts.agents.values():
        agent.silent = False
    for _ in range(40):
        for agent in hosts.agents.values():
            node = hosts.cluster.nodes.get(agent.name)
            if node is None or node.instance != agent.instance:
                agent.register()
        hosts.tick()
    _agree(hosts)
    for record in list(hosts.cluster.jobs.values()):
        hosts.do(hosts.cluster.cancel(record, hosts.now_s))
    hosts.wait(20.0)
    assert all(r.over for r in hosts.cluster.jobs.values())
    assert all(a.processes == {} for a in hosts.agents.values())
    assert all(r.nodes == [] for r in hosts.cluster.jobs.values()), "everybody has been told to forget them"


def _agree(hosts: Hosts) -> None:
    wanted = {
        (p.node, r.job, p.index, p.epoch)
        for r in hosts.cluster.jobs.values()
        for p in r.life.processes.values()
        if p.running
    }
    assert {(a.name, *key) for a in hosts.agents.values() for key in a.processes} == wanted
    for record in hosts.cluster.jobs.values():
        for process in record.life.roster.workers():
            mates = record.life.roster.mates(process)
            assert len({(p.node, p.epoch) for p in mates if p.running}) <= 1, "a replica is on one node"
    for agent in hosts.agents.values():
        slots = [key for key in agent.processes if agent.role == "worker"]
        assert len(slots) <= 2, "no slot is used twice"


def test_an_agent_of_another_version_is_turned_away_and_told_why() -> None:
    cluster = Cluster(10.0, version="2")
    register = m.RegisterNode(1, "w1", "worker", "first", facts(version="1"))
    (answer,) = cluster.register_node(b"peer", "worker", register, 0.0)
    assert isinstance(answer, Send)
    assert isinstance(answer.message, m.Refused)
    assert (answer.message.code, "install the same" in answer.message.reason) == (Refusal.UNUSABLE.value, True)
    assert cluster.nodes == {}
    register = m.RegisterNode(2, "w1", "worker", "first", facts(version="2"))
    assert cluster.register_node(b"peer", "worker", register, 0.0) == [Send(b"peer", m.Ack(2, 0))]
