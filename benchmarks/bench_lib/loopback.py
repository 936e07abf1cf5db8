"""Keeps torch's communication libraries on this machine, whatever its host name resolves to."""

from __future__ import annotations

import os


def use_loopback() -> None:
    """For gloo and TensorPipe; call before either is initialised."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TP_SOCKET_IFNAME"] = "lo"
