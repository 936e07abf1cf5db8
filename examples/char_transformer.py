"""A small causal transformer that predicts the next character of Python source code.

    python char_transformer.py                                              one ordinary process
    downpour run -w 2 -s 2 char_transformer.py                              two workers, two parameter-server shards
    downpour run -w 2 -s 1 --tensor 2 char_transformer.py                   one replica: two workers share each layer
    downpour run -w 2 -s 1 --pipeline 2 char_transformer.py                 one replica: two stages
    downpour run -w 4 -s 1 --tensor 2 --pipeline 2 char_transformer.py      one replica: two stages of two workers

Shows a weight used twice (the embedding is also the output layer), a schedule by step with warm-up, gradient
clipping and accumulation, and `downpour.forward_backward`, which a pipeline needs. On several hosts, whose Pythons
may differ, give all the same `--text FILE`.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import downpour


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a character-level transformer.")
    parser.add_argument("--text", type=Path, help="file to learn (default: Python's standard library)")
    parser.add_argument("--max-chars", type=int, default=1_000_000, help="use no more of the text than this")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each worker")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences per backward pass")
    parser.add_argument("--accumulate", type=int, default=1, metavar="K", help="backward passes per step")
    parser.add_argument("--context", type=int, default=64, help="characters per sequence")
    parser.add_argument("--width", type=int, default=96, help="size of the embedding, a multiple of 4")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.005, help="highest learning rate")
    parser.add_argument("--eval-every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_text(file: Path | None, max_chars: int) -> tuple[Tensor, int]:
    """Return the text as symbols 0..count-1, int64 of shape (n,), and count; all non-ASCII is one symbol."""
    files = [file] if file else sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(f.read_text(encoding="utf-8", errors="replace") for f in files)[:max_chars]
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").clip(max=128)
    alphabet, symbols = np.unique(codes, return_inverse=True)
    return torch.from_numpy(symbols.astype(np.int64)), len(alphabet)


class CharTransformer(nn.Module):
    """Input: symbols of shape (batch, context). Output: logits of shape (batch, context, alphabet)."""

    def __init__(self, alphabet: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(alphabet, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        layer = partial(nn.TransformerEncoderLayer, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer(width, 4, 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, alphabet, bias=False)
        self.output.weight = self.embed.weight  # tied: one parameter, two uses
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)  # made in forward, it would depend on the input's values

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position
        for layer in self.layers:
            h = layer(h, src_mask=self.mask, is_causal=True)
        logits: Tensor = self.output(self.norm(h))
        return logits


def next_symbol_loss(logits: Tensor, following: Tensor) -> Tensor:
    """The mean cross-entropy in nats of each symbol's successor."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


@torch.no_grad()
def validate(model: nn.Module, windows: Tensor) -> float:
    model.eval()
    parts = torch.split(windows, 64)
    total = sum(next_symbol_loss(model(part[:, :-1]), part[:, 1:]).item() * len(part) for part in parts)
    model.train()
    return total / len(windows)


def lr_factor(progress: float) -> float:
    """A tenth of the steps to warm up, times a cosine that ends at 0.1."""
    return min(1.0, 10 * progress) * (0.55 + 0.45 * math.cos(math.pi * progress))


def forever(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    while not downpour.should_stop():
        yield from loader


def main() -> None:
    args = parse_args()
    device = downpour.device()
    symbols, alphabet = load_text(args.text, args.max_chars)
    windows = symbols.unfold(0, args.context + 1, args.context)  # shape (n, context + 1)
    held_out = max(1, len(windows) // 20)
    train, validation = windows[:-held_out], windows[-held_out:].to(device)

    torch.manual_seed(args.seed)
    model = CharTransformer(alphabet, args.context, args.width, args.layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    loader = DataLoader(TensorDataset(train[:, :-1], train[:, 1:]), batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader = downpour.prepare(model, optimizer, loader)

    first = downpour.clock()  # above 0 when the run was resumed: the schedule goes on from there
    scheduler = LambdaLR(optimizer, lambda i: lr_factor((first + i + 1) / args.steps))
    batches = forever(loader)

    def criterion(logits: Tensor, following: Tensor) -> Tensor:
        return next_symbol_loss(logits, following) / args.accumulate

    for step in range(first, args.steps):
        optimizer.zero_grad()
        loss = 0.0
        for given, following in islice(batches, args.accumulate):
            # Alone: part = criterion(model(given), following); part.backward()
            loss += downpour.forward_backward(model, criterion, given.to(device), following.to(device)).item()
        if downpour.should_stop():
            break
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()

        if step % 10 == 0 and downpour.is_chief():
            downpour.log(loss=loss)
        if (step + 1) % args.eval_every == 0 and downpour.is_chief():
            nats = validate(downpour.unsplit(model), validation)
            print(f"step {step + 1}  loss {loss:.3f}  validation loss {nats:.3f} nats/char")

    if downpour.is_chief():
        nats = validate(downpour.unsplit(model), validation)
        downpour.log(validation_loss=nats)
        print(f"final validation loss {nats:.3f} nats/char, {nats / math.log(2):.3f} bits/char")


if __name__ == "__main__":
    main()
