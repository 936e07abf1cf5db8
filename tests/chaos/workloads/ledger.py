"""Which push was applied, and how often? The weights themselves are the ledger.

    ledger.py FOLDER [--steps N] [--rows N] [--slots N] [--pause-ms MS]

Each of ``--rows`` parameters (give the number of shards: one lies on each) has an entry for every step of every worker,
and each step adds 1 to its own entry of all of them: SGD with rate 1, gradients -1 in one place. FOLDER/book-SLOT.bin
notes each push before it is made (``b`` and 4 bytes of its number) and when it is known to be answered (``a``). A
process that takes a slot over goes on behind the last push that was begun, so that no entry is meant twice.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import nn

import downpour

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--rows", type=int, default=1)
parser.add_argument("--slots", type=int, default=2)
parser.add_argument("--pause-ms", type=float, default=2.0)


def main() -> None:
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    slot = int(json.loads(os.environ["DOWNPOUR_WORKER"])["slot"])
    model = nn.ParameterList([nn.Parameter(torch.zeros(args.slots * args.steps)) for _ in range(args.rows)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer = downpour.prepare(model, optimizer)
    path = args.folder / f"book-{slot}.bin"
    entries = path.read_bytes() if path.exists() else b""
    begun = [int.from_bytes(entries[i + 1 : i + 5], "little") for i in range(0, len(entries), 5) if entries[i] == 98]
    book = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    first = max(begun, default=-1) + 1
    print(f"slot {slot} begins with push {first} at clock {downpour.clock()}", flush=True)
    for number in range(first, args.steps):
        os.write(book, b"b" + number.to_bytes(4, "little"))
        optimizer.zero_grad()
        (-sum(row[slot * args.steps + number] for row in model)).backward()
        optimizer.step()
        os.write(book, b"a" + number.to_bytes(4, "little"))
        time.sleep(args.pause_ms / 1e3)
    print(f"slot {slot} has made its last push", flush=True)


main()
