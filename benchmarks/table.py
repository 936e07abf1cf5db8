"""Writes the tables of the README and of some files in docs/ from the JSON files of the benchmarks.

So they never say what was not measured.

`python benchmarks/table.py` after `make bench-full`; `--check` only tells whether they are up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench_lib.markdown import TABLES, filled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = (
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in ("reliability.md", "model_parallel.md", "modes.md", "codecs.md")),
)


def documents(folder: Path = RESULTS) -> dict[str, Any]:
    """The benchmarks' results that are there, by name."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in TABLES if _is_there(folder, name)}


def _is_there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def main(arguments: list[str] | None = None) -> int:
    """Rewrite or check; an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is out of date")
    parser.add_argument("--file", type=Path, action="append", help="default: all of them")
    options = parser.parse_args(arguments)
    return max(_fill(file, options.check) for file in options.file or FILES)


def _fill(file: Path, check: bool) -> int:
    """An exit code."""
    before = file.read_text(encoding="utf-8")
    after = filled(before, documents())
    if check:
        if after != before:
            print(f"{file}: tables differ from the results; run python benchmarks/table.py", file=sys.stderr)
        return int(after != before)
    if after != before:
        file.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
