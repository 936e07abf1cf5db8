"""The description of a job: what is accepted, and every problem in one go."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common.config import JobSpec, Settings, job_spec, parse_settings, to_toml
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
    """The job as plain values; what is None is left out."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in spec.model_dump().items() if v is not None}


def test_job_toml_holds_everything_and_makes_the_same_job_again() -> None:
    spec = job_spec(**GOOD, resume="runs/0", mode="ssp:2", seed=(1 << 63) - 1, settings={"checkpoint_s": 0.25})
    assert as_toml(spec) == expected(spec)
    assert job_spec(**as_toml(spec)) == spec


ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    script=ANY_TEXT,
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
