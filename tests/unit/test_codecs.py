"""Codecs as pure functions: sizes, what comes back, and that error feedback loses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from downpour_common.codecs import codec_for
from downpour_common.codecs.base import Codec, as_memory, as_tensor
from downpour_common.codecs.feedback import encode_with_feedback, seed_of
from downpour_common.compression import CODECS, NO_COMPRESSION, CodecChoice, parse_compression
from downpour_common.config import JobSpec, job_spec
from downpour_common.errors import ConfigError, ProtocolError

NAMES = list(CODECS)
BITS = {"fp16": 16, "bf16": 16, "int8": 8, "1bit": 1, "2bit": 2, "topk": 0.01 * 64, "randomk": 0.5 * 32}
"""Per element, in theory: values of 32 bits, places of 32."""


def made(name: str) -> Codec:
    return codec_for(CodecChoice(name, CODECS[name]))


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def there_and_back(codec: Codec, flat: torch.Tensor, seed: int = 3) -> torch.Tensor:
    data = torch.empty(codec.nbytes(flat.numel()), dtype=torch.uint8)
    codec.encode(flat, data, seed)
    back = torch.full_like(flat, 9.0)
    codec.decode(as_tensor(bytes(as_memory(data))), back, seed)
    return back


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_within_5_percent_of_theory(name: str) -> None:
    numel = 524_288
    assert made(name).nbytes(numel) == pytest.approx(numel * BITS[name] / 8, rel=0.05)


@pytest.mark.parametrize(
    ("name", "error"),
    [("fp16", 3e-4), ("bf16", 2e-3), ("int8", 0.01), ("1bit", 0.61), ("2bit", 0.45), ("topk", 0.97), ("randomk", 0.96)],
)
def test_what_comes_back_is_near(name: str, error: float) -> None:
    flat = normal(5000)
    back = there_and_back(made(name), flat)
    assert (back - flat).norm() / flat.norm() < error
    assert torch.equal(back, there_and_back(made(name), flat)), "the same again"


@pytest.mark.parametrize("name", NAMES)
@given(numel=st.integers(1, 2100), seed=st.integers(0, 1 << 62))
@settings(max_examples=20, deadline=None)
def test_nothing_is_lost_for_good(name: str, numel: int, seed: int) -> None:
    """What was decoded and what is still owed add up to what came in."""
    codec, residual, scratch = made(name), torch.zeros(numel), torch.empty(numel)
    data = torch.empty(codec.nbytes(numel), dtype=torch.uint8)
    came, arrived = torch.zeros(numel), torch.zeros(numel)
    for step in range(4):
        flat = normal(numel, step)
        before = flat.clone()
        came += flat
        encode_with_feedback(codec, flat, residual, data, scratch, seed + step)
        assert torch.equal(flat, before), "the gradient is the script's"
        decoded = torch.empty(numel)
        codec.decode(data, decoded, seed + step)
        arrived += decoded
    torch.testing.assert_close(arrived + residual, came, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flat", [torch.zeros(3), torch.full((2049,), -3.0e38), torch.tensor([1e-45, -1e-45])])
def test_extremes_stay_finite(name: str, flat: torch.Tensor) -> None:
    assert torch.isfinite(there_and_back(made(name), flat)).all()
    if not flat.any():
        assert not there_and_back(made(name), flat).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_what_is_sent_and_not_what_is_owed(name: str, bad: float) -> None:
    codec, residual, scratch = made(name), normal(300), torch.empty(300)
    owed, flat, data = residual.clone(), normal(300, 1), torch.empty(codec.nbytes(300), dtype=torch.uint8)
    flat[7] = bad
    encode_with_feedback(codec, flat, residual, data, scratch, 5)
    codec.decode(data, scratch, 5)
    assert not torch.isfinite(scratch).all()
    assert torch.equal(residual, owed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numel", [1, 700, 2048])
def test_what_is_spoilt_decodes_as_nan(name: str, numel: int) -> None:
    codec, back = made(name), torch.zeros(numel)
    data = torch.empty(codec.nbytes(numel), dtype=torch.uint8)
    codec.spoil(data)
    codec.decode(data, back, 1)
    assert torch.isnan(back).any()


def test_the_signs_means_keep_the_sum_of_a_block() -> None:
    flat = normal(2048)
    back = there_and_back(made("1bit"), flat)
    assert float(back.sum()) == pytest.approx(float(flat.sum()), abs=1e-2)
    assert len(back.unique()) == 2
    assert torch.equal(back > 0, flat >= 0)


def test_the_largest_travel_exactly() -> None:
    flat = normal(1000)
    back = there_and_back(codec_for(CodecChoice("topk", 0.05)), flat)
    kept = flat.abs().topk(50).indices
    assert torch.equal(back[kept], flat[kept])
    assert int((back != 0).sum()) == 50


@pytest.mark.parametrize("place", [-1, 10])
def test_a_place_outside_is_refused(place: int) -> None:
    codec, data = codec_for(CodecChoice("topk", 0.1)), torch.zeros(8, dtype=torch.uint8)
    data[:4].view(torch.int32)[0] = place
    with pytest.raises(ProtocolError, match="outside"):
        codec.decode(data, torch.empty(10), 0)


def test_places_are_drawn_alike_everywhere() -> None:
    """From the seed alone, whatever library draws: these numbers are part of the protocol."""
    back = there_and_back(codec_for(CodecChoice("randomk", 0.25)), torch.arange(1.0, 17.0), seed_of(3, 5))
    assert back.nonzero().flatten().tolist() == PLACES
    drawn = torch.zeros(1000)
    for seed in range(200):
        drawn += there_and_back(codec_for(CodecChoice("randomk", 0.1)), torch.ones(1000), seed)
    assert float(drawn.sum()) == 200 * 100
    assert 5 < float(drawn.min()) <= float(drawn.max()) < 45, "each as often as others"


PLACES = [2, 6, 9, 15]


# ---------------------------------------------------------------- the text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("push=1bit", "push=1bit"),
        (" pull=bf16 , push=topk ", "push=topk:0.01,pull=bf16"),
        ("push=randomk:1", "push=randomk:1.0"),
        ("push=topk:1e-3,pull=2bit", "push=topk:0.001,pull=2bit"),
    ],
)
def test_the_text_of_a_job_has_one_form(text: str, canonical: str) -> None:
    assert str(parse_compression(text)) == canonical
    assert str(parse_compression(canonical)) == canonical
    assert bool(parse_compression(text)) == bool(text)
    assert parse_compression("") == NO_COMPRESSION


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("topk", "expected push=CODEC or pull=CODEC"),
        ("both=int8", "expected push=CODEC or pull=CODEC"),
        ("push=int8,push=fp16", "push is given twice"),
        ("push=int9", "unknown codec 'int9'; did you mean int8"),
        ("push=int8:3", "int8 takes no fraction"),
        ("push=topk:0", "above 0 and at most 1"),
        ("pull=randomk:1.5", "above 0 and at most 1"),
        ("pull=topk:nan", "above 0 and at most 1"),
        ("push=topk:x", "above 0 and at most 1, such as topk:0.01"),
    ],
)
def test_other_texts_are_refused_in_words(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_compression(text)


def spec(**fields: object) -> JobSpec:
    return job_spec(name="a", script="a.py", workers=2, shards=1, **fields)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"compress": "push=topk:2"}, "compress: topk takes a fraction"),
        ({"compress": "push=1bit", "settings": {"push_dtype": "bfloat16"}}, "both say how gradients travel"),
        ({"compress": "pull=1bit", "settings": {"fetch": "layers"}}, "goes without fetch=layers"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        spec(**fields)


def test_a_job_knows_its_codecs() -> None:
    assert spec(compress="pull=int8").compression.pull == CodecChoice("int8")
    assert not spec(compress="pull=int8").compression.remembers
    assert spec(compress="pull=1bit").compression.remembers
    assert spec(compress="push=fp16").compression.remembers
