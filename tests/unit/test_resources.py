"""What a host offers, read from file systems made for the purpose."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from downpour_deploy import notify as notify_module
from downpour_deploy.agent import resources
from downpour_deploy.notify import notify

GIB = 1 << 30


def write(root: Path, **files: str) -> None:
    """Files by path, with ``__`` for ``/`` and ``_DOT_`` for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """8 GiB and no control groups."""
    write(tmp_path, proc__meminfo=f"MemTotal:        {8 * GIB >> 10} kB\nMemFree:  5 kB\n", proc__self__cgroup="0::/\n")
    return tmp_path


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there really are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def test_without_limits_all_of_the_host(host: Path) -> None:
    assert resources.cores(host) == 16
    assert resources.memory_bytes(host) == 8 * GIB


def test_where_nothing_can_be_read_there_is_at_least_a_core(tmp_path: Path) -> None:
    assert resources.cores(tmp_path) == 16
    assert resources.memory_bytes(tmp_path) == 0
    assert resources.boot_id(tmp_path) == ""


def test_control_groups_version_2_limit_at_every_level(host: Path) -> None:
    write(
        host,
        proc__self__cgroup="0::/pods/one\n",
        sys__fs__cgroup__pods__one__cpu_DOT_max="max 100000\n",
        sys__fs__cgroup__pods__cpu_DOT_max="250000 100000\n",
        sys__fs__cgroup__pods__one__memory_DOT_max=f"{3 * GIB}\n",
        sys__fs__cgroup__pods__memory_DOT_max="max\n",
    )
    assert resources.cores(host) == 2
    assert resources.memory_bytes(host) == 3 * GIB


def test_a_container_sees_its_own_group_as_the_root(host: Path) -> None:
    write(
        host,
        proc__self__cgroup="0::/system.slice/docker-0815.scope\n",
        sys__fs__cgroup__cpu_DOT_max="400000 100000\n",
        sys__fs__cgroup__memory_DOT_max=f"{GIB}\n",
    )
    assert (resources.cores(host), resources.memory_bytes(host)) == (4, GIB)


def test_a_part_of_a_core_counts_as_one(host: Path) -> None:
    write(host, sys__fs__cgroup__cpu_DOT_max="50000 100000\n")
    assert resources.cores(host) == 1


@pytest.mark.parametrize("mounted", ["cpu", "cpu,cpuacct"])
def test_control_groups_version_1(host: Path, mounted: str) -> None:
    write(host, proc__self__cgroup="9:cpu,cpuacct:/job/7\n4:memory:/job/7\n1:name=systemd:/\n")
    for folder, files in {
        f"sys/fs/cgroup/{mounted}/job/7": {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"},
        f"sys/fs/cgroup/{mounted}": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
        "sys/fs/cgroup/memory/job/7": {"memory.limit_in_bytes": str(2 * GIB)},
        "sys/fs/cgroup/memory": {"memory.limit_in_bytes": "9223372036854771712"},
    }.items():
        (host / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (host / folder / name).write_text(text + "\n")
    assert (resources.cores(host), resources.memory_bytes(host)) == (3, 2 * GIB)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ("0", "1", "2", "3")),
        ("", ()),
        ("-1", ()),
        ("2,0", ("2", "0")),
        ("1,7,2", ("1",)),
        ("GPU-8f2a,GPU-11", ("GPU-8f2a", "GPU-11")),
    ],
)
def test_gpus_are_those_that_cuda_would_see(host: Path, visible: str | None, expected: tuple[str, ...]) -> None:
    for index in range(4):
        (host / f"proc/driver/nvidia/gpus/0000:0{index}:00.0").mkdir(parents=True)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert resources.gpus(host, environment) == expected


def test_without_a_driver_there_are_no_gpus(host: Path) -> None:
    assert resources.gpus(host, {}) == ()
    assert resources.gpus(host, {"CUDA_VISIBLE_DEVICES": "0,1"}) == ()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'GPU 0: H200 (UUID: GPU-1)'; echo '  MIG 1g.10gb Device 0: (UUID: MIG-1)'; echo 'GPU 1: H200'", 2),
        ("echo 'No devices were found'; exit 6", 0),
        ("exec sleep 60", 0),
    ],
)
def test_the_driver_s_tool_is_asked_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: int
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(resources, "GPU_TIMEOUT_S", 0.5)
    if expected == 0 and Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("this host has a driver")
    assert len(resources.gpus(environment={})) == expected


def test_the_address_is_that_of_the_route() -> None:
    assert resources.address_towards("127.0.0.1", 7077) == "127.0.0.1"
    with pytest.raises(socket.gaierror):
        resources.address_towards("no-such-host.invalid", 7077)


@pytest.mark.parametrize(
    ("host_name", "expected"),
    [("Node1.example.org", "node1-example-org-worker"), ("___", "node-worker"), ("a" * 80, "a" * 57 + "-worker")],
)
def test_node_names_are_made_of_what_names_may_have(host_name: str, expected: str) -> None:
    assert resources.node_name(host_name, "worker") == expected
    assert len(expected) <= 64


# ---------------------------------------------------------------- telling systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"@downpour-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1", "STATUS=joined\n10.0.0.1:7077")
        assert manager.recv(1000) == b"READY=1\nSTATUS=joined 10.0.0.1:7077"


@pytest.mark.parametrize("address", ["", "relative/path", "/no/such/socket"])
def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify_module.notify("READY=1")
