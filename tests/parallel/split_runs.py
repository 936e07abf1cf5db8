"""Jobs of ``train.py`` under every way to split a model, beside one process that does the same without Downpour.

python tests/parallel/split_runs.py [--json FILE]        the whole table; exit code 1 beyond 1e-5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "workloads"))

from models import SAMPLES, STEPS, make, optimizer_of  # noqa: E402

from downpour.data.order import pass_order  # noqa: E402

BATCH = 16
"""Samples of a step, over all replicas."""
KINDS = ("mlp", "cnn", "transformer", "tied")
WAYS = {"tensor 2": (2, 1), "pipeline 2": (1, 2), "pipeline 3": (1, 3), "tensor 2 x pipeline 2": (2, 2)}
DEADLINE_S = 100.0
LIMIT = 1e-5


def one_process(kind: str) -> dict[str, torch.Tensor]:
    """The weights after all steps, with plain PyTorch, on the samples of the job's rounds."""
    torch.manual_seed(0)
    model, samples, labels = make(kind)
    optimizer, criterion = optimizer_of(model), nn.CrossEntropyLoss()
    loader = DataLoader(TensorDataset(samples, labels), batch_size=BATCH, shuffle=True)
    for step in range(STEPS):
        epoch, round_ = divmod(step, SAMPLES // BATCH)
        picked = torch.tensor([int(i) for i in pass_order(loader, 0, 0, epoch)[round_ * BATCH : (round_ + 1) * BATCH]])
        optimizer.zero_grad()
        criterion(model(samples[picked]), labels[picked]).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def command(kind: str, tensor: int, pipeline: int, replicas: int, out: Path, *more: str) -> list[str]:
    """``downpour run`` in ``sync``."""
    workers = replicas * tensor * pipeline
    options = ["-w", str(workers), "-s", "2", "--mode", "sync", "--threads", "1", "--out", str(out)]
    options += ["--tensor", str(tensor), "--pipeline", str(pipeline), *more]
    script = [str(HERE / "workloads" / "train.py"), kind, str(BATCH // replicas)]
    return [sys.executable, "-m", "downpour_deploy", "run", *options, *script]


def difference(expected: dict[str, torch.Tensor], out: Path) -> float:
    """The largest one of any weight; the file must load into the plain model."""
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def main() -> int:
    """All of it: a few minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for kind in KINDS:
        expected = one_process(kind)
        for way, (tensor, pipeline) in WAYS.items():
            for replicas in (1, 2):
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder, "out")
                    subprocess.run(command(kind, tensor, pipeline, replicas, out), check=True, timeout=DEADLINE_S)
                    found = difference(expected, out)
                rows.append({"model": kind, "split": way, "replicas": replicas, "largest_difference": found})
                print(f"{kind:12} {way:22} {replicas} replicas  {found:.1e}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any(row["largest_difference"] > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
