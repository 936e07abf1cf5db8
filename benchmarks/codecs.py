"""What do the codecs of --compress cost and lose? Bytes beside theory, GB/s, and the final loss beside a run without.

Learning is that of a job in ``sync``, step by step, in one process: two workers' gradients go through the classes that
workers and shards use, so numbers are those of ``downpour run --mode sync -w 2 --compress WAY`` and no time is spent on
processes. The digits MLP and CNN of the examples, with Adam and with SGD, trained as there but for a rate that falls to
zero along a cosine, so that final losses can be compared. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_lib.arguments import at_least_one, writable
from bench_lib.documents import before, head, write_document

SCHEMA = 1
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUMEL = 1 << 20
"""Elements of the chunk that is timed: 4 MiB."""
TURNS = 9
THEORY = {"fp16": 16.0, "bf16": 16.0, "int8": 8.0, "1bit": 1.0, "2bit": 2.0, "topk": 64.0, "randomk": 32.0}
"""Bits of an element that travels."""
WORKERS = 2
BATCH = 32
PASSES = {"mlp": 20, "mlp-sgd": 20, "cnn": 15, "cnn-sgd": 15}
LR = {"mlp": 0.002, "mlp-sgd": 0.05, "cnn": 0.003, "cnn-sgd": 0.05}
NONE = "none"


@dataclass(frozen=True)
class Speed:
    """One codec. GB/s of float32 on one core; medians."""

    codec: str
    bits: float
    """per element, as sent"""
    theory: float
    encode: float
    decode: float


@dataclass(frozen=True)
class Row:
    """One run. ``loss`` is that of the training data, ``test_loss`` and ``accuracy`` of data not seen."""

    workload: str
    way: str
    seed: int
    loss: float
    test_loss: float
    accuracy: float
    pushed: int
    """payload bytes of all workers"""
    pulled: int


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; an exit code."""
    from downpour_common.compression import CODECS, CodecChoice

    choices = [str(CodecChoice(name, fraction)) for name, fraction in CODECS.items()]
    ways = [NONE, *(f"{side}={choice}" for side in ("push", "pull") for choice in choices)]
    options = _parse(arguments, ways)
    from bench_lib import machine
    from bench_lib.report import console

    terminal = console()
    kept = before(options.json, "codecs", SCHEMA).get("results", []) if options.json and options.add else []
    rows = [Row(**row) for row in kept if not (row["workload"] in options.workloads and row["way"] in options.ways)]
    document = {
        **head("codecs", SCHEMA, machine.look()),
        "passes": options.passes or PASSES,
        "batch": BATCH,
        "workers": WORKERS,
    }
    speeds = [speed(choice) for choice in choices]
    terminal.print(_speeds(speeds))
    for workload in options.workloads:
        for way in options.ways:
            for seed in range(options.seeds):
                rows.append(train(workload, way, seed, options.passes or PASSES[workload]))
            terminal.print(f"{workload} {way}: {_median([r.loss for r in rows[-options.seeds :]]):.4f}", style="dim")
    terminal.print(_table(rows))
    if options.json:
        results = {"speeds": [asdict(s) for s in speeds], "results": [asdict(row) for row in rows]}
        write_document(options.json, document | results)
    return 0


def speed(text: str) -> Speed:
    """Time one codec on one core."""
    import torch

    from downpour_common.codecs import codec_for
    from downpour_common.compression import parse_compression

    torch.set_num_threads(1)
    choice = parse_compression(f"push={text}").push
    assert choice is not None
    codec = codec_for(choice)
    flat, back = torch.randn(NUMEL), torch.empty(NUMEL)
    data = torch.empty(codec.nbytes(NUMEL), dtype=torch.uint8)
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for turn in range(TURNS):
        start_s = time.perf_counter()
        codec.encode(flat, data, turn)
        between_s = time.perf_counter()
        codec.decode(data, back, turn)
        times["encode"].append(between_s - start_s)
        times["decode"].append(time.perf_counter() - between_s)
    rates = {name: 4 * NUMEL / 1e9 / statistics.median(values) for name, values in times.items()}
    theory = THEORY[choice.name] * (choice.fraction or 1.0)
    return Speed(text, 8 * codec.nbytes(NUMEL) / NUMEL, theory, rates["encode"], rates["decode"])


# ---------------------------------------------------------------- learning


class Exchange:
    """Two workers and a shard of one chunk, without a network. ``pushed``, ``pulled``: payload bytes."""

    def __init__(self, way: str, numel: int) -> None:
        from downpour.client.coding import WorkerCoding
        from downpour_common.compression import parse_compression
        from downpour_common.layout import Chunk
        from downpour_server.coding import ChunkCoding

        self._chunk = Chunk(0, 0, 0, "trainable", "float32", 0, 0, numel)
        self._compression = parse_compression("" if way == NONE else way)
        self._shard = ChunkCoding(self._chunk, self._compression, together=True)
        self._workers = [WorkerCoding(self._compression) for _ in range(WORKERS)]
        self.pushed = self.pulled = 0

    def push(self, slot: int, gradient: Any, step: int) -> Any:
        """The gradient as the shard has it."""
        from downpour.staging import host_bytes

        if self._compression.push is None:
            self.pushed += gradient.nbytes
            return gradient.clone()
        payload = self._workers[slot].encode(self._chunk, host_bytes(gradient), step, True)
        self.pushed += payload.nbytes
        return self._shard.gradient(payload, step)

    def begin(self, master: Any) -> None:
        """These are the first weights."""
        self._shard.begin(master)

    def pull(self, master: Any, weights: Any, version: int) -> None:
        """Bring the weights of a round to the workers, who have the same."""
        from downpour.staging import host_bytes
        from downpour_common import messages as m

        self._shard.advance(master)
        for slot, worker in enumerate(self._workers):
            if self._compression.pull is None:
                weights.copy_(master)
                self.pulled += weights.nbytes
                continue
            view, base, answer = self._shard.answer(slot, worker.held(self._chunk), master, version)
            worker.take(m.WeightsCoded(0, 0, version, view, base, answer), self._chunk, host_bytes(weights))
            self.pulled += memoryview(answer).nbytes


def train(workload: str, way: str, seed: int, passes: int) -> Row:
    """One run of the examples' model, as a job of :data:`WORKERS` workers in ``sync`` would have it."""
    import torch
    import torch.nn.functional as F

    digits, model = _made(workload.partition("-")[0], seed)
    weights, gradient = _flat(model)
    master = weights.clone().requires_grad_()
    lr, sgd = LR[workload], workload.endswith("-sgd")
    optimizer = torch.optim.SGD([master], lr=lr, momentum=0.9) if sgd else torch.optim.Adam([master], lr=lr)
    exchange = Exchange(way, weights.numel())
    exchange.begin(master.detach())
    images, labels = digits.train.tensors
    each = len(images) // (WORKERS * BATCH)
    generator = torch.Generator().manual_seed(seed)
    for step in range(passes * each):
        if step % each == 0:
            order = torch.randperm(len(images), generator=generator)
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / (passes * each))) / 2
        gradients = []
        for slot in range(WORKERS):
            first = (step % each * WORKERS + slot) * BATCH
            batch = order[first : first + BATCH]
            gradient.zero_()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            gradients.append(exchange.push(slot, gradient, step))
        master.grad = torch.stack(gradients).mean(0)
        optimizer.step()
        exchange.pull(master.detach(), weights, step + 1)
    weights.copy_(master.detach())  # what the shards have is what the job leaves behind
    model.eval()
    with torch.no_grad():
        loss, outputs = float(F.cross_entropy(model(images), labels)), model(digits.test_images)
        test_loss = float(F.cross_entropy(outputs, digits.test_labels))
    right = int((outputs.argmax(1) == digits.test_labels).sum()) / len(digits.test_labels)
    return Row(workload, way, seed, loss, test_loss, right, exchange.pushed, exchange.pulled)


def _flat(model: Any) -> tuple[Any, Any]:
    """All weights and all gradients of a model, which become views of them."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    numel = sum(p.numel() for p in parameters)
    weights, gradient, at = torch.empty(numel), torch.zeros(numel), 0
    for p in parameters:
        part = slice(at, at + p.numel())
        weights[part] = p.detach().reshape(-1)
        p.data, p.grad = weights[part].view(p.shape), gradient[part].view(p.shape)
        at += p.numel()
    return weights, gradient


def _made(workload: str, seed: int) -> tuple[Any, Any]:
    """The data, and the example's model."""
    import importlib

    import torch

    sys.path.insert(0, str(EXAMPLES))
    try:
        digits_data, script = importlib.import_module("digits_data"), importlib.import_module(f"digits_{workload}")
    finally:
        sys.path.remove(str(EXAMPLES))
    torch.manual_seed(seed)
    model = script.make_model(128 if workload == "mlp" else 32)
    return digits_data.load(), model


# ---------------------------------------------------------------- telling


def _speeds(speeds: list[Speed]) -> Any:
    from rich.table import Table

    table = Table("codec", "bits per element", "theory", "difference", "encode GB/s", "decode GB/s")
    for s in speeds:
        difference = f"{100 * (s.bits / s.theory - 1):+.1f} %"
        table.add_row(s.codec, f"{s.bits:.3f}", f"{s.theory:.3f}", difference, f"{s.encode:.2f}", f"{s.decode:.2f}")
    return table


def _table(rows: list[Row]) -> Any:
    from rich.table import Table

    table = Table("workload", "compress", "loss", "test loss", "of none's", "accuracy", "pushed MB", "pulled MB")
    for workload in dict.fromkeys(row.workload for row in rows):
        here = [row for row in rows if row.workload == workload]
        plain = {row.seed: row.test_loss for row in here if row.way == NONE}
        for way in dict.fromkeys(row.way for row in here):
            mine = [row for row in here if row.way == way]
            ratio = _median([row.test_loss / plain[row.seed] for row in mine if row.seed in plain])
            table.add_row(
                workload,
                way,
                f"{_median([r.loss for r in mine]):.4f}",
                f"{_median([r.test_loss for r in mine]):.4f}",
                f"{100 * (ratio - 1):+.1f} %",
                f"{_median([r.accuracy for r in mine]):.4f}",
                f"{_median([r.pushed / 1e6 for r in mine]):.2f}",
                f"{_median([r.pulled / 1e6 for r in mine]):.2f}",
            )
    return table


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def _parse(arguments: list[str] | None, ways: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--ways", nargs="+", default=ways, help="such as none push=1bit pull=bf16")
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument("--passes", type=at_least_one, help="passes over the data, if not the examples' own number")
    parser.add_argument("--json", type=writable, help="write all figures to this file")
    parser.add_argument("--add", action="store_true", help="keep the other rows that are in --json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
