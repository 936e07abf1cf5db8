"""Bytes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour_common.errors import ConfigError
from downpour_common.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("1024", 1024),
        ("12B", 12),
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        (" 8gib ", 8 << 30),
        ("8Gi", 8 << 30),
        ("1.5GB", 1_500_000_000),
        ("0.5KiB", 512),
        ("1.0001KB", 1000),
        ("2TiB", 2 << 40),
        ("1PB", 10**15),
        ("7.5EiB", 15 << 59),
        ("9223372036854775807", (1 << 63) - 1),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "such as 512MiB, 8GiB or 1.5GB"),
        ("GiB", "is not a size"),
        ("-1", "is not a size"),
        ("1e9", "is not a size"),
        ("1_000", "is not a size"),
        (".5GiB", "is not a size"),
        ("1.GiB", "is not a size"),
        ("nan", "is not a size"),
        ("inf", "is not a size"),
        ("1GiB2", "is not a size"),
        ("1\nGiB", "is not a size"),
        ("²GiB", "is not a size"),
        ("٣GiB", "is not a size"),
        ("8G", "write 8GiB (1024s) or 8GB (1000s)"),
        ("1.5m", "write 1.5MiB (1024s) or 1.5MB (1000s)"),
        ("8GiBs", "known: B, KiB, MiB, GiB"),
        ("8EiB", "more than 8 EiB"),
        ("9999999999999999999", "more than"),
        ("9" * 5000, "is not a size"),
    ],
)
def test_what_is_no_size_is_refused_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1 MiB"),
        ((1 << 20) - 60, "1023.9 KiB"),
        (3 << 29, "1.5 GiB"),
        (256 << 20, "256 MiB"),
        ((1 << 63) - 1, "8 EiB"),
        (1 << 71, "2048 EiB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 7 << 60))
def test_what_is_written_is_read_as_nearly_the_same(count: int) -> None:
    """One decimal is kept, so a twentieth of the unit may go, and never more than a twentieth of the size."""
    assert abs(parse_bytes(format_bytes(count)) - count) <= count / 20


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    try:
        assert 0 <= parse_bytes(text) < 1 << 63
    except ConfigError:
        pass
