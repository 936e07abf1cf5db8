"""Which package may import which, read from the sources themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "downpour_common": ROOT / "common",
    "downpour_server": ROOT / "paramserver",
    "downpour_coordinator": ROOT / "paramserver",
    "downpour": ROOT / "worker",
    "downpour_deploy": ROOT / "deploy",
}
MAY_IMPORT = {
    "downpour_common": set[str](),
    "downpour_server": {"downpour_common"},
    "downpour_coordinator": {"downpour_common"},
    "downpour": {"downpour_common"},
}
STATE_MACHINES = [
    "downpour_server/shard.py",
    "downpour_server/store.py",
    "downpour_server/snapshot.py",
    "downpour_server/stats.py",
    "downpour_server/members.py",
    "downpour_server/dedup.py",
    "downpour_server/contribution.py",
    "downpour_server/tensors.py",
    "downpour_server/policy/*.py",
    "downpour_server/rules/*.py",
    "downpour_server/upload.py",
    "downpour_server/vectors.py",
    "downpour_server/replica.py",
    "downpour_server/state.py",
    "downpour_coordinator/access.py",
    "downpour_coordinator/answers.py",
    "downpour_coordinator/beginnings.py",
    "downpour_coordinator/changes.py",
    "downpour_coordinator/checkpointing.py",
    "downpour_coordinator/cluster.py",
    "downpour_coordinator/data.py",
    "downpour_coordinator/effects.py",
    "downpour_coordinator/ending.py",
    "downpour_coordinator/facts.py",
    "downpour_coordinator/lbfgs.py",
    "downpour_coordinator/leases.py",
    "downpour_coordinator/lifecycle.py",
    "downpour_coordinator/lifecycle_document.py",
    "downpour_coordinator/linesearch.py",
    "downpour_coordinator/membership.py",
    "downpour_coordinator/minimiser.py",
    "downpour_coordinator/nodes.py",
    "downpour_coordinator/participants.py",
    "downpour_coordinator/phases.py",
    "downpour_coordinator/placement.py",
    "downpour_coordinator/portions.py",
    "downpour_coordinator/processes.py",
    "downpour_coordinator/reports.py",
    "downpour_coordinator/roster.py",
    "downpour_coordinator/running.py",
    "downpour_coordinator/shard_ends.py",
    "downpour_coordinator/shard_words.py",
    "downpour_coordinator/snapshots.py",
    "downpour_coordinator/snapshotting.py",
    "downpour_coordinator/spares.py",
    "downpour_coordinator/standing.py",
    "downpour_coordinator/training.py",
    "downpour_coordinator/training_document.py",
    "downpour_coordinator/worker_ends.py",
    "downpour_coordinator/worker_words.py",
    "downpour_deploy/agent/download.py",
    "downpour_deploy/agent/effects.py",
    "downpour_deploy/agent/link.py",
    "downpour_deploy/agent/logs.py",
    "downpour_deploy/agent/process.py",
    "downpour_deploy/agent/state.py",
    "downpour/jobs/exchange.py",
    "downpour/jobs/logs.py",
    "downpour/jobs/status.py",
    "downpour/client/core.py",
    "downpour/data/order.py",
    "downpour/data/rounds.py",
    "downpour_common/wire.py",
    "downpour_common/layout.py",
]
WITHOUT_TORCH = [
    "downpour_common/**/*.py",
    "downpour_coordinator/**/*.py",
    "downpour_deploy/**/*.py",
    "downpour/jobs/**/*.py",
]
COMPUTING = {"codecs", "rules"}
"""Packages in what all share whose modules import torch; the packages themselves do not."""


def sources(pattern: str) -> list[Path]:
    """Files below a package's folder; at least one."""
    package, _, rest = pattern.partition("/")
    found = sorted((PACKAGES[package] / package).glob(rest))
    assert found, f"{pattern} matches nothing: the rule has lost its object"
    return found


def imported(path: Path) -> Iterator[str]:
    """Every module that the file names in an import, wherever it stands; ``a.b`` for ``from a import b`` as well."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(path: Path) -> set[str]:
    """The top-level packages that the file imports."""
    return {name.partition(".")[0] for name in imported(path)}


def at_import(path: Path) -> set[str]:
    """The top-level packages that importing the file imports: not those of functions, not those for types alone."""
    found: set[str] = set()
    rest: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _for_types(node):
            rest += ast.iter_child_nodes(node)
    return found


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_package_of_the_project_is_looked_at() -> None:
    roots = {folder.parent for folder in PACKAGES.values()}
    assert roots == {ROOT}
    found = {p.parent.name for folder in set(PACKAGES.values()) for p in folder.glob("*/__init__.py")}
    assert found == set(PACKAGES)
    assert not [f for f in set(PACKAGES.values()) if (f / "__init__.py").exists()], "roots are no packages"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package: str) -> None:
    siblings = set(PACKAGES) - {package} - MAY_IMPORT[package]
    wrong = {str(path): tops(path) & siblings for path in sources(f"{package}/**/*.py") if tops(path) & siblings}
    assert wrong == {}


def test_exactly_one_module_knows_zeromq() -> None:
    files = [path for package in PACKAGES for path in sources(f"{package}/**/*.py")]
    assert [p.name for p in files if "zmq" in tops(p)] == ["zeromq.py"]


@pytest.mark.parametrize("pattern", STATE_MACHINES)
def test_state_machines_know_neither_sockets_nor_clocks_nor_event_loops(pattern: str) -> None:
    forbidden = {"zmq", "asyncio", "time", "datetime", "socket", "selectors", "uvloop", "subprocess"}
    for path in sources(pattern):
        assert tops(path) & forbidden == set(), path
        assert "downpour_common.transport.zeromq" not in set(imported(path)), path


@pytest.mark.parametrize("pattern", WITHOUT_TORCH)
def test_the_control_plane_and_what_all_share_do_without_torch(pattern: str) -> None:
    """They may ask for it in a function; importing them must not, but for those who compute, and are only asked to."""
    found = [path for path in sources(pattern) if "torch" in at_import(path)]
    assert [str(p) for p in found if p.parent.name not in COMPUTING or p.name == "__init__.py"] == []


@pytest.mark.parametrize("module", ["pickle", "marshal", "shelve", "dill", "cloudpickle"])
def test_nothing_is_ever_unpickled(module: str) -> None:
    files = [path for package in PACKAGES for path in sources(f"{package}/**/*.py")]
    assert [str(path) for path in files if module in tops(path)] == []
    text = {path: path.read_text(encoding="utf-8") for path in files}
    assert [str(path) for path, source in text.items() if "torch.load(" in source or "send_pyobj" in source] == []


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_command_line_parses_before_it_imports_anything_heavy() -> None:
    loaded = loaded_by("import downpour_deploy.main")
    assert "typer" in loaded
    assert loaded & {"torch", "numpy", "pydantic", "zmq", "msgpack", "uvloop", "asyncio"} == set()


def test_importing_the_library_is_cheap_without_a_launcher() -> None:
    """A script that only asks for its rank does not wait for torch twice, and opens no socket."""
    assert loaded_by("import downpour; assert downpour.rank() == 0") & {"zmq", "torch"} == set()
