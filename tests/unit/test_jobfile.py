"""Job files: what to_toml writes can be read again, mistakes are all told, and flags win."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common import jobfile
from downpour_common.config import JobSpec, Settings, job_spec, parse_settings, to_toml
from downpour_common.errors import ConfigError

NEEDED: dict[str, Any] = {"name": "digits", "script": "train.py", "workers": 4, "shards": 2}

GOOD = """
name = "digits"
script = "train.py"
args = ["--lr", "0.1"]
workers = 4
shards = 2
mode = "ssp:2"
shard_memory = "2GiB"

[settings]
chunk_bytes = "2MiB"

[env]
WANDB_MODE = "offline"

[worker_labels]
gpu = "a100"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where a job file may stand."""
    return tmp_path / "job.toml"


def problems(file: Path, text: str | bytes) -> list[str]:
    """What is wrong with a job file that holds ``text``; each line begins with the file."""
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        jobfile.load(str(file))
    assert all(line.startswith(f"{file}:") for line in caught.value.problems)
    return [line.removeprefix(f"{file}:").removeprefix(" ") for line in caught.value.problems]


# ---------------------------------------------------------------- reading


def test_a_job_file_gives_the_fields_that_it_has(file: Path) -> None:
    file.write_text(GOOD)
    fields = jobfile.load(str(file))
    assert set(fields) == {*NEEDED, "args", "mode", "shard_memory", "settings", "env", "worker_labels"}
    spec = job_spec(**fields)
    assert (spec.name, spec.workers, spec.shards, spec.mode) == ("digits", 4, 2, "ssp:2")
    assert (spec.shard_memory, spec.settings.chunk_bytes) == (2 << 30, 2 << 20)
    assert (spec.env, spec.worker_labels, spec.server_labels) == ({"WANDB_MODE": "offline"}, {"gpu": "a100"}, {})


def test_what_is_absent_is_no_problem_of_the_file(file: Path) -> None:
    file.write_text("workers = 3\n")
    assert jobfile.load(str(file)) == {"workers": 3}
    file.write_text("")
    assert jobfile.load(str(file)) == {}


def test_script_and_folder_are_relative_to_the_file(file: Path) -> None:
    file.write_text('script = "sub/train.py"\nfolder = "."\nout = "runs/1"\nresume = "runs/0"\n')
    folder = str(file.parent)
    assert jobfile.load(str(file)) == {
        "script": f"{folder}/sub/train.py",
        "folder": f"{folder}/.",
        "out": "runs/1",
        "resume": "runs/0",
    }
    file.write_text('script = "/abs/train.py"\nfolder = ""\n')
    assert jobfile.load(str(file)) == {"script": "/abs/train.py", "folder": ""}


def test_a_file_in_the_present_folder_leaves_paths_as_they_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('script = "train.py"\n')
    monkeypatch.chdir(file.parent)
    assert jobfile.load("job.toml") == {"script": "train.py"}


# ---------------------------------------------------------------- mistakes


def test_all_mistakes_are_told_at_once_each_with_its_path(file: Path) -> None:
    found = problems(
        file,
        'name = "No Good"\nworkers = 0\nmode = "snyc"\nshard_memory = "8G"\nwrokers = 3\nn_push = 3\nseed = true\n'
        '[settings]\nchunk_bytes = 1\nn_fecth = 2\nscript = "x"\n'
        '[env]\nDOWNPOUR_RANK = "1"\nOMP_NUM_THREADS = 4\n'
        '[server_labels]\nzone = ""\n'
        "[evn]\n",
    )
    told = {line.partition(":")[0]: line for line in found}
    assert set(told) == {
        "name",
        "workers",
        "mode",
        "shard_memory",
        "wrokers",
        "n_push",
        "seed",
        "settings.chunk_bytes",
        "settings.n_fecth",
        "settings.script",
        "env.DOWNPOUR_RANK",
        "env.OMP_NUM_THREADS",
        "server_labels.zone",
        "evn",
    }
    assert len(told) == len(found)
    assert "did you mean 'sync'" in told["mode"]
    assert "8GiB" in told["shard_memory"]
    assert "did you mean workers?" in told["wrokers"]
    assert "below [settings]" in told["n_push"]
    assert "did you mean n_fetch?" in told["settings.n_fecth"]
    assert "above the tables" in told["settings.script"]
    assert "in quotes" in told["env.OMP_NUM_THREADS"]
    assert "did you mean env?" in told["evn"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('name = "a"\nworkers == 3\n', "2:10: Invalid value"),
        ('name = "a"\n\nname = "b"\n', "3:11: Cannot overwrite a value"),
        ('name = "a"\nargs = ["b",\n', "2: Invalid value"),
        ("[settings\n", "1:10: Expected ']' at the end of a table declaration"),
        ('name = "a\n', "1:10: Illegal character '\\n'"),
        (b'name = "a"\nscript = "caf\xe9.py"\n', "2: not UTF-8"),
        ("a = " + "[" * 5000, "arrays or tables within one another too often"),
    ],
)
def test_what_is_not_toml_is_told_with_its_line(file: Path, text: str | bytes, told: str) -> None:
    found = problems(file, text)
    assert len(found) == 1
    assert found[0].startswith(told)


@pytest.mark.parametrize("text", ["workers = " + "9" * 5000, "workers = 1979-05-27", "timeout_s = nan", "[[env]]"])
def test_values_that_only_toml_has_are_refused(file: Path, text: str) -> None:
    assert len(problems(file, text)) == 1


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_times_are_finite(file: Path, value: str) -> None:
    assert problems(file, f"[settings]\ntimeout_s = {value}")[0].startswith("settings.timeout_s: ")


def test_a_mark_at_the_beginning_and_other_ends_of_lines_do_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfworkers = 3\r\nshards = 2\r\n")
    assert jobfile.load(str(file)) == {"workers": 3, "shards": 2}


def test_a_file_that_is_not_there_or_no_job_file_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"job\.toml: No such file"):
        jobfile.load(str(file))
    with pytest.raises(ConfigError, match="Is a directory"):
        jobfile.load(str(file.parent))
    assert problems(file, b"#" * (2 << 20)) == ["larger than 1 MiB; is this a job file?"]


# ---------------------------------------------------------------- there and back


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
LABELS = st.dictionaries(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,9}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True),
    max_size=3,
)
ENV = st.dictionaries(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True).filter(lambda n: not n.startswith("DOWNPOUR_")),
    TEXT.filter(lambda text: "\0" not in text),
    max_size=3,
)
SPECS = st.builds(
    job_spec,
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True),
    script=TEXT.map(lambda text: f"/{text}"),
    args=st.lists(TEXT, max_size=3).map(tuple),
    folder=st.one_of(st.just(""), TEXT.map(lambda text: f"/{text}")),
    workers=st.integers(9, 4096),
    min_workers=st.one_of(st.none(), st.integers(1, 9)),
    shards=st.integers(1, 4096),
    threads=st.integers(0, 64),
    shard_memory=st.integers(1, (1 << 63) - 1),
    seed=st.integers(0, (1 << 63) - 1),
    restarts=st.integers(0, 1_000_000),
    out=TEXT,
    resume=st.one_of(st.none(), TEXT),
    env=ENV,
    worker_labels=LABELS,
    server_labels=LABELS,
    settings=st.builds(
        Settings, n_push=st.integers(1, 100), timeout_s=st.floats(1e-9, 1e300), shared_memory=st.booleans()
    ),
)


@given(spec=SPECS)
def test_a_written_job_can_be_submitted_again(tmp_path_factory: pytest.TempPathFactory, spec: JobSpec) -> None:
    file = tmp_path_factory.getbasetemp() / "again.toml"
    file.write_text(to_toml(spec), encoding="utf-8")
    assert job_spec(**jobfile.load(str(file))) == spec


# ---------------------------------------------------------------- flags


def test_flags_win_over_the_file_and_what_is_not_given_stays(file: Path) -> None:
    file.write_text(GOOD)
    flags = {"workers": 8, "mode": None, "args": None, "seed": 0, "env": {}, "name": "other"}
    spec = job_spec(**jobfile.merge(jobfile.load(str(file)), flags))
    assert (spec.workers, spec.mode, spec.name, spec.seed) == (8, "ssp:2", "other", 0)
    assert spec.args == ("--lr", "0.1")
    assert spec.env == {"WANDB_MODE": "offline"}


def test_tables_are_merged_key_by_key_and_arguments_are_not() -> None:
    fields = {
        "args": ["--lr", "0.1"],
        "settings": {"n_push": 2, "timeout_s": 5},
        "env": {"A": "1", "B": "2"},
        "worker_labels": {"gpu": "a100"},
    }
    flags = {
        "args": ("--lr", "1"),
        "settings": parse_settings(["n_push=5"]),
        "env": {"B": "3"},
        "server_labels": {"zone": "x"},
    }
    merged = jobfile.merge(fields, flags)
    assert merged == {
        "args": ("--lr", "1"),
        "settings": {"n_push": "5", "timeout_s": 5},
        "env": {"A": "1", "B": "3"},
        "worker_labels": {"gpu": "a100"},
        "server_labels": {"zone": "x"},
    }
    assert fields["settings"] == {"n_push": 2, "timeout_s": 5}, "the file's own are as before"


# ---------------------------------------------------------------- what travels


@pytest.mark.parametrize(
    ("script", "folder", "there", "root"),
    [
        ("/home/me/job/train.py", "", "train.py", "/home/me/job"),
        ("/home/me/job/src/train.py", "/home/me/job", "src/train.py", "/home/me/job"),
        ("/home/me/job/./src/../train.py", "/home/me/", "job/train.py", "/home/me"),
        ("/home/me/job/..train.py", "", "..train.py", "/home/me/job"),
    ],
)
def test_the_script_is_relative_to_the_folder_that_travels(script: str, folder: str, there: str, root: str) -> None:
    spec, found = jobfile.travelling(job_spec(**{**NEEDED, "script": script, "folder": folder}))
    assert (spec.script, spec.folder, found) == (there, ".", root)


def test_relative_paths_are_taken_from_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec, root = jobfile.travelling(job_spec(**NEEDED))
    assert (spec.script, root) == ("train.py", os.getcwd())


@pytest.mark.parametrize(
    ("script", "folder"),
    [("/home/me/train.py", "/home/me/job"), ("/home/me/job2/train.py", "/home/me/job"), ("/home/me", "/home/me")],
)
def test_a_script_that_would_stay_at_home_is_refused(script: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=r"^script: .* is not in the folder that travels"):
        jobfile.travelling(job_spec(**{**NEEDED, "script": script, "folder": folder}))


def test_the_job_file_of_a_submitted_job_describes_it_in_a_copy_of_its_folder(tmp_path: Path) -> None:
    first, _ = jobfile.travelling(
        job_spec(**{**NEEDED, "script": "/home/me/job/src/train.py", "folder": "/home/me/job"})
    )
    (tmp_path / "job.toml").write_text(to_toml(first))
    again, root = jobfile.travelling(job_spec(**jobfile.load(str(tmp_path / "job.toml"))))
    assert again == first
    assert root == str(tmp_path)
