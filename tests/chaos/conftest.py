"""The tests here use the clusters and hosts of the process tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "process"))
