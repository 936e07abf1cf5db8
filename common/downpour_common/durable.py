"""What must survive a power cut: files and the folders that name them, told to the disk."""

from __future__ import annotations

import os


def sync(path: str) -> None:
    """Have the file or folder at ``path`` on disk: its bytes, or its entries. Raises ``OSError``."""
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: str) -> None:
    """As ``os.makedirs``, each new folder's entry on disk. Raises ``OSError``."""
    path = os.path.abspath(path)
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)
        sync(os.path.dirname(folder))
