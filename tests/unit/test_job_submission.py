"""From a script or job file to a job at the coordinator, and back to files: what is checked, sent, fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_kit import Line, job_document, line_to

from downpour.jobs.download import download, read, wanted
from downpour.jobs.errors import BadJobFile, CoordinatorUnreachable, JobRefused, ResultsDiffer
from downpour.jobs.submission import describe, name_of, packed, send, upload
from downpour_common.bundle import digest_of
from downpour_common.errors import BundleError, ConfigError, ProtocolError
from downpour_common.messages import Ack, FileData, GetFile, Message, PutBundle, SubmitJob


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a script and a module."""
    folder = tmp_path / "project"
    (folder / "sub").mkdir(parents=True)
    (folder / "train.py").write_text("import helper\n")
    (folder / "helper.py").write_text("x = 1\n")
    (folder / "sub" / "deep.py").write_text("")
    return folder


# ---------------------------------------------------------------- description


def test_a_script_alone_is_a_job(project: Path) -> None:
    spec, folder = describe(str(project / "train.py"), {"workers": None})
    assert (spec.script, spec.name, spec.workers, spec.shards, spec.threads, spec.out) == (
        "train.py",
        "train",
        1,
        1,
        0,
        "",
    )
    assert folder == str(project)


def test_the_script_is_relative_to_the_folder(project: Path) -> None:
    spec, folder = describe(str(project / "sub" / "deep.py"), {"folder": str(project)})
    assert (spec.script, folder) == ("sub/deep.py", str(project))
    with pytest.raises(ConfigError, match="not in the folder that travels"):
        describe(str(project / "train.py"), {"folder": str(project / "sub")})


def test_flags_win_over_the_job_file(project: Path) -> None:
    file = project / "job.toml"
    file.write_text('script = "train.py"\nname = "digits"\nworkers = 8\nshards = 2\n[settings]\nn_push = 5\n')
    spec, folder = describe(str(file), {"workers": 4, "settings": {"n_fetch": "10"}, "args": ("--x",)})
    assert (spec.name, spec.workers, spec.shards, spec.args) == ("digits", 4, 2, ("--x",))
    assert (spec.settings.n_push, spec.settings.n_fetch) == (5, 10)
    assert folder == str(project)


def test_a_mode_of_a_group_is_added_to_the_mode_of_the_file(project: Path) -> None:
    (project / "job.toml").write_text('script = "train.py"\nmode = "sync"\nworkers = 2\n')
    spec, _ = describe(str(project / "job.toml"), {"mode": None}, (), ["1=async"])
    assert spec.mode == "sync;1=async"
    spec, _ = describe(str(project / "train.py"), {"mode": "ssp:2", "workers": 2}, (), ["0=sync"])
    assert spec.mode == "ssp:2;0=sync"


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        describe("nowhere.py", {"mode": "quick", "workers": 0}, ("--set x: no such setting",))
    assert not isinstance(caught.value, BadJobFile)
    text = "\n".join(caught.value.problems)
    for part in ("--set x: no such setting", "nowhere.py: no such file", "mode: unknown mode", "workers:"):
        assert part in text


def test_problems_with_a_job_file_are_known_as_such(project: Path) -> None:
    file = project / "job.toml"
    with pytest.raises(BadJobFile, match="no such file; give the path of a training script or a job file"):
        describe(str(file), {})
    file.write_text("script = \n")
    with pytest.raises(BadJobFile, match=r"job\.toml:1"):
        describe(str(file), {})
    file.write_text('script = "train.py"\nworkers = 0\n')
    with pytest.raises(BadJobFile, match="workers"):
        describe(str(file), {})
    file.write_text("workers = 1\n")
    with pytest.raises(BadJobFile, match="script"):
        describe(str(file), {})


@pytest.mark.parametrize(("script", "name"), [("a/My_Script.v2.py", "my-script-v2"), ("___.py", "job")])
def test_names(script: str, name: str) -> None:
    assert name_of(script) == name


# ---------------------------------------------------------------- sending


def test_code_goes_in_parts_once_and_the_job_after_it(project: Path) -> None:
    (project / "data.bin").write_bytes(b"x" * 600_000)
    line = line_to()
    spec, folder = describe(str(project / "train.py"), {})
    shown: list[tuple[int, int]] = []
    with packed(spec, folder) as made, line.client() as client:
        document = send(client, made, progress=lambda done, total: shown.append((done, total)))
        sent = bytes(line.coordinator.bundles[made.bundle.digest])
        assert sent == Path(made.path).read_bytes()
        temporary = made.path
        assert document["job"] == "train-0"
        before = len(line.coordinator.of(PutBundle))
        send(client, made)
    assert not Path(temporary).exists()
    assert shown[-1] == (len(sent), len(sent))
    puts = line.coordinator.of(PutBundle)
    assert [len(p.payload) for p in puts[:2]] == [0, 256 << 10]
    assert len(puts) == before + 1, "content that is there is only asked for"
    submits = line.coordinator.of(SubmitJob)
    assert len({s.token for s in submits}) == 2
    assert submits[0].document["spec"]["script"] == "train.py"
    assert (submits[0].document["anyway"], submits[0].document["dry_run"]) == (False, False)
    assert len(submits[0].token) == 32


def test_what_is_held_already_is_not_sent_again(project: Path) -> None:
    line = line_to()
    spec, folder = describe(str(project / "train.py"), {})
    with packed(spec, folder) as made, line.client() as client:
        data = Path(made.path).read_bytes()
        line.coordinator.bundles[made.bundle.digest] = bytearray(data[:20])
        assert upload(client, made) == len(data) - 20
        assert bytes(line.coordinator.bundles[made.bundle.digest]) == data
        assert digest_of(made.path) == made.bundle.digest


def test_a_submission_that_is_repeated_is_one_job(project: Path) -> None:
    line = line_to()
    spec, folder = describe(str(project / "train.py"), {})

    def lose(message: Message) -> None:
        if isinstance(message, SubmitJob) and len(line.coordinator.of(SubmitJob)) < 3:
            line.deaf = 1

    line.coordinator.before = lose
    with packed(spec, folder) as made, line.client() as client:
        send(client, made)
    assert len(line.coordinator.of(SubmitJob)) == 3
    assert len(line.coordinator.jobs) == 1


def test_code_that_was_dropped_meanwhile_is_sent_once_more(project: Path) -> None:
    line = line_to()
    spec, folder = describe(str(project / "train.py"), {})

    def drop(message: Message) -> None:
        first = isinstance(message, SubmitJob) and len(line.coordinator.of(SubmitJob)) == 1
        line.coordinator.refuse = {SubmitJob: ("not-ready", "no such bundle")} if first else {}
        if first:
            line.coordinator.bundles.clear()

    line.coordinator.before = drop
    with packed(spec, folder) as made, line.client() as client:
        assert send(client, made)["job"] == "train-0"
        assert len(line.coordinator.bundles[made.bundle.digest]) == made.bundle.nbytes
    tokens = [s.token for s in line.coordinator.of(SubmitJob)]
    assert len(tokens) == 2
    assert len(set(tokens)) == 1


def test_a_coordinator_that_takes_nothing_does_not_hold_us_for_ever(project: Path) -> None:
    line = line_to()
    line.coordinator.answer = lambda m: Ack(m.request, 0)  # type: ignore[method-assign,attr-defined]
    spec, folder = describe(str(project / "train.py"), {})
    with packed(spec, folder) as made, line.client() as client, pytest.raises(JobRefused, match="takes no more"):
        send(client, made)


def test_one_that_goes_away_may_have_the_job(project: Path) -> None:
    line = line_to()

    def gone(message: Message) -> None:
        if isinstance(message, SubmitJob):
            line.cut, line.deaf = True, 1

    line.coordinator.before = gone
    spec, folder = describe(str(project / "train.py"), {})
    with (
        packed(spec, folder) as made,
        line.client() as client,
        pytest.raises(CoordinatorUnreachable, match=r"may have been accepted: look with `downpour list`"),
    ):
        send(client, made)


def test_too_large_says_how_to_queue_it_anyway(project: Path) -> None:
    line = line_to()
    line.coordinator.refuse = {SubmitJob: ("too-large", "64 workers, and the cluster has 8 slots")}
    spec, folder = describe(str(project / "train.py"), {"workers": 64})
    with packed(spec, folder) as made, line.client() as client:
        with pytest.raises(JobRefused, match=r"has 8 slots; ask for less, or .* --anyway$"):
            send(client, made)
        line.coordinator.refuse = {PutBundle: ("too-large", "more than 64 MiB of code")}
        with pytest.raises(JobRefused, match=r"^more than 64 MiB of code$"):
            send(client, made)


def test_a_dry_run_sends_no_code(project: Path) -> None:
    line = line_to()
    spec, folder = describe(str(project / "train.py"), {})
    with packed(spec, folder) as made, line.client() as client:
        assert send(client, made, dry_run=True)["fits"] is True
        local = made.document()
    assert line.coordinator.of(PutBundle) == []
    assert line.coordinator.jobs == {}
    assert [path for path, _ in local["bundle"]["files"]] == ["helper.py", "sub/deep.py", "train.py"]


def test_a_script_that_is_ignored_cannot_travel(project: Path) -> None:
    (project / ".downpourignore").write_text("train.py\n")
    spec, folder = describe(str(project / "train.py"), {})
    with pytest.raises(BundleError, match=r"train\.py: the script itself stays at home"), packed(spec, folder):
        raise AssertionError


# ---------------------------------------------------------------- fetching

FILES = {
    "job.toml": b'name = "digits"\n',
    "metrics.jsonl": b"{}\n",
    "logs/worker-0.log": b"hello\n",
    "model.safetensors": bytes(range(256)) * 3000,
    "checkpoints/000001/manifest.json": b"{}",
    "checkpoints/000001/shard-0.safetensors": b"y" * 10,
}


@pytest.fixture
def line() -> Line:
    line = line_to(job_document(state="SUCCEEDED", model=True))
    line.coordinator.files = dict(FILES)
    return line


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fetch(line: Line, folder: Path, checkpoints: bool = False, force: bool = False) -> tuple[str, ...]:
    with line.client() as client:
        files = wanted(client.files("digits"), checkpoints)
        return download(client, "digits", files, str(folder), force).written


def test_all_files_arrive(line: Line, tmp_path: Path) -> None:
    assert set(fetch(line, tmp_path / "a" / "b")) == set(FILES) - {p for p in FILES if p.startswith("checkpoints")}
    fetch(line, tmp_path / "c", checkpoints=True)
    assert tree(tmp_path / "c") == FILES
    assert fetch(line, tmp_path / "c", checkpoints=True) == (), "what is there already is left alone"


def test_files_of_others_stay_and_differing_ones_are_not_replaced_without_being_told(
    line: Line, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "job.toml").write_bytes(b"NAME" + FILES["job.toml"][4:])
    (tmp_path / "metrics.jsonl").write_bytes(b"other size")
    before = tree(tmp_path)
    with pytest.raises(ResultsDiffer, match=r"metrics\.jsonl: there already, with other content; .*--force"):
        fetch(line, tmp_path)
    assert line.coordinator.of(GetFile) == [], "seen by its size alone"
    (tmp_path / "metrics.jsonl").write_bytes(FILES["metrics.jsonl"])
    before = tree(tmp_path)
    with pytest.raises(ResultsDiffer, match=r"job\.toml: there already") as caught:
        fetch(line, tmp_path)
    assert caught.value.paths == ("job.toml",)
    assert tree(tmp_path) == before
    fetch(line, tmp_path, force=True)
    assert tree(tmp_path)["job.toml"] == FILES["job.toml"]
    assert tree(tmp_path)["mine.txt"] == b"mine"


def test_a_failure_leaves_nothing(line: Line, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    def cut(message: Message) -> None:
        if isinstance(message, GetFile) and message.path == "model.safetensors" and message.offset:
            line.cut, line.deaf = True, 8

    line.coordinator.before = cut
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        line.cut = False
        with pytest.raises(CoordinatorUnreachable):
            fetch(line, folder)
        line.deaf = 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt"]


def test_a_checkpoint_that_is_removed_meanwhile_is_left_out_as_a_whole(line: Line, tmp_path: Path) -> None:
    def prune(message: Message) -> None:
        if isinstance(message, GetFile) and message.path.endswith("manifest.json"):
            line.coordinator.files = {p: d for p, d in FILES.items() if "shard" not in p}

    line.coordinator.before = prune
    with line.client() as client:
        got = download(client, "digits", wanted(client.files("digits"), True), str(tmp_path))
    assert got.gone == ("checkpoints/000001/shard-0.safetensors",)
    assert set(tree(tmp_path)) == {p for p in FILES if not p.startswith("checkpoints")}


def test_a_log_that_grows_is_fetched_as_long_as_it_was(line: Line, tmp_path: Path) -> None:
    with line.client() as client:
        files = wanted(client.files("digits"), False)
        line.coordinator.files["logs/worker-0.log"] = b"hello\nworld\n"
        download(client, "digits", files, str(tmp_path))
    assert tree(tmp_path)["logs/worker-0.log"] == b"hello\n"


def test_a_file_that_shrinks_is_an_error(line: Line) -> None:
    with line.client() as client, pytest.raises(ProtocolError, match=r"job\.toml: the coordinator gave 16 bytes at 0"):
        list(read(client, "digits", "job.toml", 99))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "logs/..", ".", "a\\b\n", "a/", ""])
def test_paths_that_lead_elsewhere_are_not_followed(path: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be one of a job"):
        wanted([(path, 1)], True)


def test_a_refusal_or_a_wrong_answer_leaves_nothing(line: Line, tmp_path: Path) -> None:
    line.coordinator.refuse = {GetFile: ("forbidden", "not your job")}
    with pytest.raises(Exception, match="not your job"):
        fetch(line, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    answer = line.coordinator.answer
    line.coordinator.answer = (  # type: ignore[method-assign]
        lambda m: FileData(m.request, 1, 0, b"12345") if isinstance(m, GetFile) else answer(m)
    )
    with pytest.raises(ProtocolError):
        fetch(line, tmp_path / "x")
    assert not (tmp_path / "x").exists()
