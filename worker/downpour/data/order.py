"""The order of one pass over a map-style dataset, the same in every worker, from (seed, loader, epoch)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from downpour_common.errors import ModelError


def pass_order(loader: DataLoader[Any], seed: int, loader_index: int, epoch: int) -> Sequence[Any]:
    """What the workers share out: sample indices, or whole batches where the script gave a batch sampler.

    A shuffling loader gets a permutation from the seed; any other sampler is asked itself, with its ``generator``
    seeded first. Raises :class:`ModelError` for a sampler whose order is random in a way that cannot be seeded.
    """
    source = units(loader)
    if type(source) is SequentialSampler:
        return range(len(source))
    if type(source) is RandomSampler and not source.replacement and len(source) == len(source.data_source):
        generator = np.random.Generator(np.random.PCG64([seed, loader_index, epoch]))
        order: Sequence[Any] = generator.permutation(len(source))  # type: ignore[assignment]
        return order
    return _ask(source, seed, loader_index, epoch)


def units(loader: DataLoader[Any]) -> Any:
    """The sampler whose items are shared out: the loader's own batch sampler, or its sampler of indices."""
    from torch.utils.data import BatchSampler

    batches = loader.batch_sampler
    plain = batches is None or (type(batches) is BatchSampler and loader.batch_size is not None)
    return loader.sampler if plain else batches


def digest(order: Sequence[Any]) -> str:
    """A short digest of an order, to compare between workers."""
    if isinstance(order, range):
        return f"range-{len(order)}"
    if isinstance(order, np.ndarray):
        return hashlib.sha256(order.tobytes()).hexdigest()[:16]
    return hashlib.sha256(repr(list(order)).encode()).hexdigest()[:16]


def _ask(sampler: Any, seed: int, loader_index: int, epoch: int) -> Sequence[Any]:
    generators = [g for g in (_generator(sampler), _generator(getattr(sampler, "sampler", None))) if g is not None]
    if generators:
        number = int(np.random.SeedSequence([seed, loader_index, epoch]).generate_state(1, np.uint64)[0] >> 1)
        for generator in generators:
            generator.manual_seed(number)
        return _listed(sampler)
    first = _listed(sampler)
    if first != _listed(sampler):
        raise ModelError(
            f"{type(sampler).__name__} gives another order each time and has no torch.Generator to seed, so the "
            "workers cannot share it out; give it generator=torch.Generator(), or do not prepare this loader"
        )
    return first


def _generator(sampler: Any) -> Any:
    if sampler is None or not hasattr(sampler, "generator"):
        return None
    if sampler.generator is None:
        import torch

        sampler.generator = torch.Generator()
    return sampler.generator


def _listed(items: Iterable[Any]) -> list[Any]:
    return list(items)
