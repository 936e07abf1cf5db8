"""The description of a job: what is accepted, and every problem in one go."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common.config import JobSpec, Settings, job_spec, parse_env, parse_labels, parse_settings, to_toml
from downpour_common.errors import ConfigError
from downpour_common.modes import MODES, Mode, parse_mode

GOOD: dict[str, Any] = {
    "name": "digits",
    "script": "train.py",
    "args": ("--lr", "0.1"),
    "workers": 4,
    "shards": 2,
    "threads": 1,
    "out": "runs/1",
}


def problems(**fields: Any) -> list[str]:
    """What is wrong with a good job of which ``fields`` are replaced."""
    with pytest.raises(ConfigError) as caught:
        job_spec(**{**GOOD, **fields})
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("async", Mode("async")),
        ("sync", Mode("sync")),
        ("ssp:0", Mode("ssp", 0)),
        ("ssp:12", Mode("ssp", 12)),
        (" sync ", Mode("sync")),
    ],
)
def test_modes_are_parsed_and_written_back(text: str, mode: Mode) -> None:
    assert parse_mode(text) == mode
    assert str(mode) == text.strip()
    assert parse_mode(str(mode)) == mode


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snyc", "did you mean 'sync'"),
        ("asynch", "did you mean 'async'"),
        ("", "known: async"),
        ("SYNC", "unknown mode 'SYNC'"),
        ("ssp", "ssp:3"),
        ("ssp:", "ssp:3"),
        ("ssp:-1", "ssp:3"),
        ("ssp:1.5", "ssp:3"),
        ("ssp:2:3", "ssp:3"),
        ("ssp:²", "ssp:3"),
        ("sync:2", "takes no argument"),
        ("async:", "takes no argument"),
    ],
)
def test_what_is_not_a_mode_is_refused_with_what_to_write_instead(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"^mode: ") as caught:
        parse_mode(text)
    assert words in str(caught.value)


@given(st.text(max_size=10))
def test_any_text_is_a_mode_or_a_config_error(text: str) -> None:
    try:
        assert parse_mode(text).name in MODES
    except ConfigError:
        pass


def test_only_sync_is_synchronous() -> None:
    assert [parse_mode(text).synchronous for text in ("async", "ssp:0", "sync")] == [False, False, True]


# ---------------------------------------------------------------- jobs


def test_a_job_has_sensible_defaults_and_is_frozen() -> None:
    spec = job_spec(**GOOD)
    assert (spec.mode, spec.device, spec.seed, spec.resume, spec.settings) == ("async", "auto", 0, None, Settings())
    with pytest.raises(ValueError, match="frozen"):
        spec.workers = 5  # type: ignore[misc]


def test_settings_are_taken_as_the_text_of_the_command_line() -> None:
    values = parse_settings(["n_push=5", "timeout_s=2.5", "transport=tcp", "port=0"])
    settings = job_spec(**GOOD, settings=values).settings
    assert (settings.n_push, settings.timeout_s, settings.transport, settings.port) == (5, 2.5, "tcp", 0)


def test_all_problems_are_told_at_once_each_with_its_path() -> None:
    found = problems(
        name="No Good",
        workers=0,
        shards=5000,
        mode="snyc",
        device="tpu",
        seed=-1,
        settings={"chunk_bytes": 1, "n_push": "many", "buffers": "mean"},
    )
    paths = [line.partition(":")[0] for line in found]
    assert sorted(paths) == sorted(
        [
            "name",
            "workers",
            "shards",
            "mode",
            "device",
            "seed",
            "settings.chunk_bytes",
            "settings.n_push",
            "settings.buffers",
        ]
    )
    assert next(line for line in found if line.startswith("workers")).endswith("(found 0)")
    mode = next(line for line in found if line.startswith("mode"))
    assert "did you mean 'sync'" in mode
    assert "Value error" not in mode


def test_what_was_found_is_said_once() -> None:
    [line] = problems(mode="average")
    assert line == "mode: average needs its local steps, such as average:50; found 'average'"


def test_problems_between_fields_are_told_at_once_too() -> None:
    found = problems(mode="sync", settings={"n_push": 2, "port": 5000})
    assert len(found) == 2
    assert "n_push" in found[0]
    assert "transport=tcp" in found[1]


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("sync", {"n_push": 2}, "mode sync exchanges every step"),
        ("ssp:3", {"n_fetch": 2}, "mode ssp:3 exchanges every step"),
        ("sync", {"fetch_ahead": True}, "fetch_ahead belongs to mode async"),
        ("async", {"fetch_ahead": True, "n_push": 2}, "fetch_ahead belongs to mode async with n_push=1"),
        ("async", {"port": 5000}, "--set transport=tcp"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(mode: str, settings: dict[str, Any], words: str) -> None:
    assert words in problems(mode=mode, settings=settings)[0]


@pytest.mark.parametrize("name", ["", "A", "-a", "a b", "a_b", "a/b", "a\n", "a" * 65, "ä"])
def test_names_that_could_not_be_a_file_or_a_host_are_refused(name: str) -> None:
    assert problems(name=name)[0].startswith("name: ")


@pytest.mark.parametrize("field", ["timeout_s", "start_timeout_s", "checkpoint_s", "grace_s"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_times_are_finite(field: str, value: str) -> None:
    """Every wait has a deadline, and a file of settings can be written."""
    assert problems(settings={field: value})[0].startswith(f"settings.{field}: ")


def test_a_field_that_does_not_exist_is_refused() -> None:
    assert problems(worker=3)[0].startswith("worker: ")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"wrokers": 3}, "wrokers: no such key; did you mean workers?"),
        ({"worker_label": {}}, "worker_label: no such key; did you mean worker_labels?"),
        ({"zzz": 3}, "zzz: no such key; known: args, compress, device, env, "),
        ({"n_push": 3}, "n_push: no such key here; it belongs below [settings]"),
        ({"settings": {"n_psuh": 3}}, "settings.n_psuh: no such key; did you mean n_push?"),
        ({"settings": {"seed": 3}}, "settings.seed: no such key here; it belongs above the tables"),
    ],
)
def test_an_unknown_key_is_refused_with_what_was_meant(given: dict[str, Any], words: str) -> None:
    assert problems(**given)[0].startswith(words)


def test_what_is_missing_is_said_in_few_words() -> None:
    with pytest.raises(ConfigError) as caught:
        job_spec(script="train.py", workers=1)
    assert caught.value.problems == ("name: is missing", "shards: is missing")


# ---------------------------------------------------------------- jobs of a cluster


def test_what_a_cluster_needs_has_defaults_that_change_nothing() -> None:
    spec = job_spec(name="digits", script="train.py", workers=4, shards=2)
    assert (spec.min_workers, spec.fewest_workers, spec.restarts, spec.threads, spec.out) == (None, 4, 0, 0, "")
    assert (spec.env, spec.worker_labels, spec.server_labels, spec.folder) == ({}, {}, {}, "")
    assert spec.shard_memory == 256 << 20


def test_fewer_workers_are_enough_but_never_more() -> None:
    assert job_spec(**GOOD, min_workers=2).fewest_workers == 2
    assert job_spec(**GOOD, min_workers=4).fewest_workers == 4
    assert problems(min_workers=5) == ["min_workers: at most workers, which is 4 (found 5)"]
    assert problems(min_workers=0)[0].startswith("min_workers: ")


@pytest.mark.parametrize(("given", "count"), [("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), ("4096", 4096), (7, 7)])
def test_memory_is_given_in_bytes_or_as_text(given: str | int, count: int) -> None:
    assert job_spec(**GOOD, shard_memory=given).shard_memory == count


def test_sizes_among_the_settings_are_given_as_text_too() -> None:
    settings = job_spec(**GOOD, settings=parse_settings(["chunk_bytes=4MiB", "window_bytes=65536"])).settings
    assert (settings.chunk_bytes, settings.window_bytes) == (4 << 20, 1 << 16)


@pytest.mark.parametrize("given", ["lots", "8G", "-1", "0", 0, 1.5, 1 << 63, True])
def test_nonsense_is_no_memory(given: object) -> None:
    assert problems(shard_memory=given)[0].startswith("shard_memory: ")


@pytest.mark.parametrize("name", ["A", "_", "a1", "LD_PRELOAD", "OMP_NUM_THREADS", "downpour_x", "XDOWNPOUR_"])
def test_variables_have_the_names_of_variables(name: str) -> None:
    assert job_spec(**GOOD, env={name: "x=y z"}).env == {name: "x=y z"}


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "A\n", "Ä", "A\0", "DOWNPOUR_RANK", "DOWNPOUR_"])
def test_variables_that_cannot_be_set_or_are_our_own_are_refused(name: str) -> None:
    assert problems(env={name: "1"})[0].startswith(f"env.{name}: ")


def test_a_variable_is_text_without_nul() -> None:
    assert problems(env={"A": 1, "B": "\0", "C": True}) == [
        "env.A: expected a text, in quotes (found 1)",
        "env.B: may not hold a NUL character (found '\\x00')",
        "env.C: expected a text, in quotes (found True)",
    ]


@pytest.mark.parametrize("field", ["worker_labels", "server_labels"])
def test_labels_can_be_written_on_a_command_line(field: str) -> None:
    labels = {"gpu": "a100", "zone": "eu-west_1.b", "1": "A"}
    assert job_spec(**GOOD, **{field: labels}).model_dump()[field] == labels
    found = problems(**{field: {"GPU": "a", "b": "", "c": "x y", "d": "x" * 65, "e-": "-"}})
    assert [line.partition(":")[0] for line in found] == [f"{field}.{key}" for key in ("GPU", "b", "c", "d", "e-")]


@pytest.mark.parametrize("field", ["workers", "min_workers", "restarts", "threads", "seed"])
def test_a_count_is_no_truth_value(field: str) -> None:
    """JSON and TOML have both, and Python takes one for the other."""
    assert problems(**{field: True}) == [f"{field}: true or false makes no sense here (found True)"]
    assert job_spec(**GOOD, settings={"shared_memory": False}).settings.shared_memory is False


def test_a_table_is_no_other_value() -> None:
    assert problems(env="A=1", settings=3) == [
        "settings: expected a table, [settings] (found 3)",
        "env: expected a table, [env] (found 'A=1')",
    ]


def test_no_script_is_no_job() -> None:
    assert problems(script="")[0].startswith("script: ")


def test_a_job_survives_as_plain_values() -> None:
    """So it travels in messages."""
    spec = job_spec(**GOOD, min_workers=1, env={"A": "b"}, worker_labels={"gpu": "x"}, settings={"n_push": 3})
    assert JobSpec(**spec.model_dump()) == spec
    assert JobSpec(**spec.model_dump(mode="json")) == spec


# ---------------------------------------------------------------- --env, --label


def test_variables_and_labels_come_as_name_equals_value() -> None:
    assert parse_env(["A=b=c", "B=", "A=b=c"]) == {"A": "b=c", "B": ""}
    assert parse_labels("--label", ["gpu=a100", "zone=b"]) == {"gpu": "a100", "zone": "b"}


def test_what_is_no_assignment_or_contradicts_itself_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_env(["A", "B=1", "B=2"])
    assert caught.value.problems == ("--env A: expected name=value", "--env B: given twice, with different values")
    with pytest.raises(ConfigError, match=r"^--worker-label GPU: a label's name has ") as caught:
        parse_labels("--worker-label", ["GPU=1", "zone=?"])
    assert len(caught.value.problems) == 2


# ---------------------------------------------------------------- --set


def test_an_unknown_setting_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(["n_psuh=5", "timeout=3", "zzz=1", "n_push", "n_fetch=2"])
    first, second, third, fourth = caught.value.problems
    assert first == "--set n_psuh: no such setting; did you mean n_push?"
    assert "did you mean timeout_s?" in second
    assert all(name in third for name in Settings.model_fields)
    assert fourth == "--set n_push: expected key=value"


def test_a_setting_may_hold_an_equals_sign() -> None:
    with pytest.raises(ConfigError):
        job_spec(**GOOD, settings=parse_settings(["transport=a=b"]))
    assert parse_settings(["transport=a=b"]) == {"transport": "a=b"}


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


# ---------------------------------------------------------------- job.toml


def as_toml(spec: JobSpec) -> dict[str, Any]:
    """What a reader of job.toml gets."""
    return tomllib.loads(to_toml(spec))


def expected(spec: JobSpec) -> dict[str, Any]:
    """The job as plain values; what is None, and empty tables, are left out."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in spec.model_dump().items()}
    return {k: v for k, v in values.items() if v is not None and v != {}}


def test_job_toml_holds_everything_and_makes_the_same_job_again() -> None:
    spec = job_spec(**GOOD, resume="runs/0", mode="ssp:2", seed=(1 << 63) - 1, settings={"checkpoint_s": 0.25})
    assert as_toml(spec) == expected(spec)
    assert job_spec(**as_toml(spec)) == spec


def test_tables_stand_below_everything_else_and_only_when_they_hold_something() -> None:
    text = to_toml(job_spec(**GOOD, env={"A": 'a "b"\n[c]'}, server_labels={"zone": "x"}))
    headers = [line for line in text.splitlines() if line.startswith("[")]
    assert headers == ["[settings]", "[env]", "[server_labels]"]
    assert tomllib.loads(text)["env"] == {"A": 'a "b"\n[c]'}


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    script=ANY_TEXT.filter(bool),
    args=st.lists(ANY_TEXT, max_size=4),
    timeout_s=st.floats(1e-9, 1e300),
    keep=st.integers(1, 1 << 60),
)
def test_any_text_and_number_survives_in_job_toml(script: str, args: list[str], timeout_s: float, keep: int) -> None:
    fields = {**GOOD, "script": script, "args": tuple(args)}
    spec = job_spec(**fields, settings={"timeout_s": timeout_s, "keep_checkpoints": keep})
    assert as_toml(spec) == expected(spec)


@pytest.mark.parametrize("text", ['"', "\\", "\n\t\r\x00\x1f\x7f", "é", "🚀", "a'''b", "\u2028", "#", "\\u0041"])
def test_awkward_text_survives_in_job_toml(text: str) -> None:
    spec = job_spec(**{**GOOD, "args": (text,)})
    assert as_toml(spec)["args"] == [text]


def test_an_argument_that_is_not_utf_8_does_not_spoil_job_toml() -> None:
    """The command line gives such bytes as lone surrogates (PEP 383)."""
    text = b"caf\xe9.csv".decode("utf-8", "surrogateescape")
    try:
        spec = job_spec(**{**GOOD, "args": (text,)})
    except ConfigError:
        return
    assert len(as_toml(spec)["args"]) == 1
