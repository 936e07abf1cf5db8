"""Shared by all tests: one thread for torch, so that threads of a test do not fight for cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
