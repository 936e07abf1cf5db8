"""What several unit tests need: models and layouts to order, a shard and its workers without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from downpour_common import messages as m
from downpour_common.dtypes import ITEMSIZE, TRAINABLE
from downpour_common.layout import KINDS, Chunk, Kind, Layout, ModelSpec, TensorSpec, plan
from downpour_common.modes import parse_mode
from downpour_common.transport import Peer
from downpour_server.effects import Effect, Reply, SendWeights
from downpour_server.shard import Identity, Shard
from downpour_server.snapshot import WriteSnapshot

JOB = "job-1"
ADD: tuple[dict[str, Any], ...] = ({"lr": 1.0, "maximize": True},)
"""Options of SGD with which a gradient is added to the weights as it is."""
CHUNK_SIZES = (1, 3, 16, 100, 1 << 20)


def tensor(
    name: str,
    *shape: int,
    dtype: str = "float32",
    kind: Kind = "trainable",
    group: int | None = None,
    aliases: tuple[str, ...] = (),
) -> TensorSpec:
    """A tensor; trainable ones are in parameter group 0 unless told otherwise."""
    at = (0 if kind == "trainable" else -1) if group is None else group
    return TensorSpec(name, aliases, tuple(shape), dtype, kind, at)


def model(
    *tensors: TensorSpec,
    rule: str = "SGD",
    options: Sequence[Mapping[str, Any]] = ADD,
    buffers: str = "average",
) -> ModelSpec:
    """A model; its rule adds gradients to the weights unless told otherwise."""
    return ModelSpec(tuple(tensors), rule, tuple(options), buffers)


@st.composite
def model_specs(draw: st.DrawFn, largest: int = 9, rule: str = "SGD") -> ModelSpec:
    """Any model: kinds, dtypes, shapes (empty and scalar ones too), parameter groups, tied names."""
    groups = draw(st.integers(1, 3))
    tensors: list[TensorSpec] = []
    for index in range(draw(st.integers(0, 7))):
        kind = draw(st.sampled_from(KINDS))
        trainable = kind == "trainable"
        tensors.append(
            TensorSpec(
                f"t{index}",
                tuple(f"t{index}.alias{a}" for a in range(draw(st.integers(0, 2)))),
                tuple(draw(st.lists(st.integers(0, largest), max_size=3))),
                draw(st.sampled_from(sorted(TRAINABLE if trainable else ITEMSIZE))),
                kind,
                draw(st.integers(0, groups - 1)) if trainable else -1,
            )
        )
    options = tuple({"lr": 0.5, "betas": [0.9, 0.99], "amsgrad": False} for _ in range(groups))
    return ModelSpec(tuple(tensors), rule, options, draw(st.sampled_from(["average", "chief", "local"])))


@dataclass
class FakeSent:
    """A transport's token: ``done`` is set by the test."""

    done: bool = False


class ShardDriver:
    """A shard, the connections of its workers, and what came back over them.

    ``answers[request]`` is the answer's message; weights are copied when they are sent, as on a network, unless
    ``sent`` is given: then they are sent from the shard's memory under that token, and kept in ``views``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mode: str = "async",
        workers: int = 2,
        shards: int = 1,
        chunk_bytes: int = 1 << 20,
        shard: int = 0,
        shard_epoch: int = 5,
        timeout_s: float = 10.0,
    ) -> None:
        self.layout: Layout = plan(spec, shards, chunk_bytes)
        identity = Identity(JOB, shard, shard_epoch)
        self.shard = Shard(identity, self.layout, parse_mode(mode), workers, timeout_s)
        self.chunks: tuple[Chunk, ...] = self.layout.of_shard(shard)
        self.answers: dict[int, m.Message] = {}
        self.written: list[WriteSnapshot] = []
        self.views: dict[int, memoryview] = {}
        self.sent: FakeSent | None = None
        self.now_s = 0.0
        self._request = 0

    # ------------------------------------------------------------ what workers do

    def hello(self, slot: int = 0, job: str = JOB, worker_epoch: int = 0, digest: str | None = None) -> m.Message:
        """Greet; the answer."""
        digest = self.layout.digest if digest is None else digest
        return self.answer(m.Hello(self.number(), job, slot, worker_epoch, digest))

    def init(
        self, chunk: int, values: torch.Tensor | bytes, slot: int = 0, job: str = JOB, worker_epoch: int = 0
    ) -> m.Message:
        """Send first weights; the answer."""
        return self.answer(m.Init(self.number(), job, slot, worker_epoch, chunk, payload(values)))

    def init_all(self, value: float = 0.0) -> None:
        """Send ``value`` as the first weight everywhere."""
        for chunk in self.chunks:
            self.init(chunk.index, torch.full((chunk.numel,), value, dtype=getattr(torch, chunk.dtype)))

    def pushed(
        self, chunk: int, slot: int, seq: int, values: torch.Tensor | bytes, fetch: bool = True, **others: Any
    ) -> m.Contribution:
        """A contribution, not yet sent; ``others`` are further fields of it."""
        fields: dict[str, Any] = {
            "job": JOB,
            "shard_epoch": self.shard.identity.shard_epoch,
            "slot": slot,
            "worker_epoch": 0,
            "seq": seq,
            "base_version": 0,
            "chunk": chunk,
            "samples": 1,
            "position": (),
            "hyper": b"",
            "payload": payload(values),
        }
        return (m.PushPull if fetch else m.Push)(self.number(), **{**fields, **others})

    def push_pull(
        self, chunk: int, slot: int, seq: int, values: torch.Tensor | bytes, **others: Any
    ) -> m.Message | None:
        """Send a contribution; the answer, or None while there is none."""
        return self.send(self.pushed(chunk, slot, seq, values, **others))

    def push(self, chunk: int, slot: int, seq: int, values: torch.Tensor | bytes, **others: Any) -> m.Message:
        """Send a contribution without a fetch; the answer."""
        return self.answer(self.pushed(chunk, slot, seq, values, fetch=False, **others))

    def pull(self, chunk: int, slot: int = 0, **others: Any) -> m.Message | None:
        """Ask for weights; the answer, or None while there is none."""
        fields = {"job": JOB, "slot": slot, "worker_epoch": 0, "chunk": chunk}
        return self.send(m.Pull(self.number(), **{**fields, **others}))

    def end_epoch(self, slot: int, worker_epoch: int = 0) -> int:
        """Say that the epoch is over; the request's number."""
        request = m.EndEpoch(self.number(), JOB, slot, worker_epoch)
        self.send(request)
        return request.request

    def leave(self, slot: int, worker_epoch: int = 0) -> m.Message:
        """Leave; the answer."""
        return self.answer(m.Leave(self.number(), JOB, slot, worker_epoch))

    def members(self, version: int, *epochs: tuple[int, int]) -> None:
        """Have the coordinator say who the workers are, as (slot, epoch)."""
        self.carry_out(self.shard.set_members(version, dict(epochs)))

    # ------------------------------------------------------------ carrying messages

    def number(self) -> int:
        """A fresh request number."""
        self._request += 1
        return self._request

    def send(self, request: m.Request) -> m.Message | None:
        """Hand a message to the shard; its answer, or None while there is none."""
        peer: Peer = b"peer of %d" % request.request
        self.carry_out(self.shard.handle(peer, request, self.now_s))
        return self.answers.get(request.request)

    def answer(self, request: m.Request) -> m.Message:
        """As :meth:`send`, where an answer must come."""
        answer = self.send(request)
        assert answer is not None
        return answer

    def tick(self, now_s: float) -> list[m.Message]:
        """Let time pass; the answers that this brought."""
        self.now_s = now_s
        before = set(self.answers)
        self.carry_out(self.shard.tick(now_s))
        return [answer for request, answer in self.answers.items() if request not in before]

    def snapshot(self, number: int = 1, at_clock: int = -1) -> None:
        """Ask for a snapshot; see ``written``."""
        self.carry_out(self.shard.snapshot(number, "folder", at_clock))

    def carry_out(self, effects: list[Effect]) -> None:
        """Do what the shard's process does with effects."""
        for effect in effects:
            match effect:
                case Reply(peer, message):
                    assert isinstance(message, m.Request)
                    self._answered(peer, message)
                case SendWeights(peer, request, stored):
                    view = stored.payload()
                    if self.sent is not None:
                        self.views[request] = view
                        stored.being_read(self.sent)
                    self._answered(peer, m.Weights(request, stored.chunk.index, stored.version, bytes(view)))
                case WriteSnapshot():
                    self.written.append(effect)

    def _answered(self, peer: Peer, message: m.Request) -> None:
        assert peer == b"peer of %d" % message.request, "an answer went to another peer"
        assert message.request not in self.answers, "a request was answered twice"
        self.answers[message.request] = message

    # ------------------------------------------------------------ what the shard holds

    def weights(self, chunk: int = 0) -> torch.Tensor:
        """A copy of a chunk's weights."""
        return self.shard.chunks[chunk].weights.clone()

    def vector(self) -> torch.Tensor:
        """A copy of all weights, chunk after chunk."""
        return torch.cat([self.weights(c.index) for c in self.chunks])

    def slices(self, gradient: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """A vector over all chunks, cut into (chunk, its part)."""
        at = 0
        for chunk in self.chunks:
            yield chunk.index, gradient[at : at + chunk.numel]
            at += chunk.numel


def payload(values: torch.Tensor | bytes) -> bytearray | bytes:
    """A message's payload: the tensor's bytes in memory of their own."""
    if isinstance(values, bytes):
        return values
    return bytearray(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def values_of(message: m.Message | None, dtype: torch.dtype = torch.float32) -> list[float]:
    """The weights in an answer."""
    assert isinstance(message, m.Weights), message
    values: list[float] = torch.frombuffer(bytearray(message.payload), dtype=dtype).tolist()
    return values


def refusal(message: m.Message | None) -> tuple[str, str]:
    """Code and reason of an answer that must be a refusal."""
    assert isinstance(message, m.Refused), message
    return message.code, message.reason
