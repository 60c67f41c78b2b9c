# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The share that each of many processes has in a loader."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

_END = object()
_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers"),
)


class StridedLoader:
    """Every so many-th batch of a loader, through all of its epochs: those of one process.

    Where the number of batches is no multiple of that of processes, some are an epoch ahead in the last
    step, so that each batch still counts once an epoch. What is left to torch's generator is drawn from
    a seed, so that the order is the same for all processes.

    :param loader: the loader, the same for all processes.
    :param num_batches: the number of its batches, no smaller than that of processes.
    :param rank: which of the processes this is, from 0.
    :param size: the number of processes.
    :param seed: the seed of the first epoch.
    """

    def __init__(
        self, loader: Iterable[object], num_batches: int, rank: int, size: int, seed: int
    ) -> None:
        self.loader, self.seed, self.epoch = loader, seed, 0
        self._num_batches, self._rank, self._size = num_batches, rank, size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, from 0, whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self._num_batches // self._size)

    def __iter__(self) -> Iterator[object]:
        for k, batch in enumerate(self._batches(), self.epoch * self._num_batches):
            if k % self._size == self._rank:
                yield batch

    def _batches(self) -> Iterator[object]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + self.epoch)
            iterator = iter(self.loader)
            batch = next(
                iterator, _END
            )  # samplers draw their order, or its seed, with the first one
        while batch is not _END:
            yield batch
            batch = next(iterator, _END)


def shard(
    loader: Iterable[object], num_batches: int, rank: int, size: int, seed: int
) -> Iterable[object]:
    """The batches of one of many processes; the arguments are those of :class:`StridedLoader`.

    A ``DataLoader`` in the order of its data, or in any, gets a ``DistributedSampler``, so that a
    process loads its own rows only: some rows count twice in an epoch, so that all processes have as
    many; with ``drop_last`` some are left out. One that has such a sampler is taken as it is.

    :raises ValueError: if there are fewer batches than processes.
    """
    if isinstance(loader, DataLoader):
        batches = loader.batch_sampler
        rows = batches.sampler if isinstance(batches, BatchSampler) else loader.sampler
        if isinstance(rows, DistributedSampler):
            return loader
        if type(loader) is DataLoader and type(batches) is BatchSampler and _is_plain(loader, rows):
            is_random, drop_last = isinstance(rows, RandomSampler), loader.drop_last
            sampler: DistributedSampler[Any] = DistributedSampler(
                loader.dataset, size, rank, shuffle=is_random, seed=seed, drop_last=drop_last
            )
            return DataLoader(
                loader.dataset,
                loader.batch_size,
                sampler=sampler,
                drop_last=drop_last,
                **{name: getattr(loader, name) for name in _OPTIONS},
            )
    if num_batches < size:
        raise ValueError(
            f"loader: expected at least one batch for each of {size} processes, got {num_batches}"
        )
    return StridedLoader(loader, num_batches, rank, size, seed)


def _is_plain(loader: DataLoader[Any], rows: object) -> bool:
    """Whether each row comes once, in the order of the data or in any."""
    if type(rows) is RandomSampler:
        # a data set with such a sampler has a length
        return not rows.replacement and rows.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    return type(rows) is SequentialSampler
