# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The stream of mini-batches that a loader gives, epoch after epoch, from any place in it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from .sharding import StridedLoader, shard

_END = object()
_MAX_COUNTED = 100_000  # batches of an iterable without a length
_FIXED = (list, tuple, range, SequentialSampler, DistributedSampler)
_BY_EPOCH = (DistributedSampler, StridedLoader)
_SEEDS = 2**31
_SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_STATE = ("num_batches", "epoch", "position", "origin", "epoch_start", "seed")


class Batch(NamedTuple):
    """The arguments of model and guide for a step."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, also those in lists, tuples and mappings."""
        return list(_tensors_in((self.args, self.kwargs)))


class BatchStream:
    """The mini-batches of a loader as arguments of a model, one epoch after the other.

    :param loader: as that of :func:`~pyro_artransform.inference.fit`.
    :param kwargs: keyword arguments that all batches have.
    :raises TypeError: if the loader can be iterated over once only, or not at all, or is itself data.
    :raises ValueError: if it is empty, or has neither a length nor an end.
    """

    def __init__(
        self, loader: Iterable[object], kwargs: Mapping[str, object] | None = None
    ) -> None:
        self._loader, self._kwargs = _checked(loader), dict(kwargs or {})
        self._batches, self._rows = _samplers(loader)
        #: what has an order for each epoch, which it is told of
        self._by_epoch = loader if isinstance(loader, StridedLoader) else self._rows
        #: the stream of all processes that this one is a share of
        self.whole = self
        self._iterator: Iterator[object] | None = None
        #: the state of the generators at the beginning, and at that of the present epoch
        self.origin = self.epoch_start = self._random_state()
        #: whether the order is fixed, or follows torch's generators: then any place in it is known
        self.can_go_on = isinstance(self._rows, _FIXED + _SHUFFLED)
        #: whether other processes with this loader are known to see the same batches
        self.is_common = self.can_go_on and not isinstance(self._rows, DistributedSampler)
        #: whether an epoch is known to have each of its rows once
        self.is_partition = self._is_partition()
        self.epoch, self.position = 0, 0  #: epochs that are over, batches of the present one
        self.num_batches = self._count()  #: in an epoch
        if not self.num_batches:
            raise ValueError("loader: expected at least one batch, got none")

    def next(self) -> Batch:
        """The next batch, of the next epoch where this one is over."""
        # an iterator of PyTorch may have no length, and so no truth
        batch = next(self._begin_epoch() if self._iterator is None else self._iterator, _END)
        if batch is _END and self.position:
            self.epoch += 1
            batch = next(self._begin_epoch(), _END)
        if batch is _END:
            raise ValueError(
                f"loader: expected batches in each epoch, got none in epoch {self.epoch + 1}: an "
                "iterable is needed that begins anew each time, as a DataLoader or a list does"
            )
        self.position += 1
        return self._arguments(batch)

    @property
    def is_all_data(self) -> bool:
        """Whether each epoch is one batch, with each row once: it is as good as arguments."""
        return self.num_batches == 1 and self.is_partition

    def share(self, rank: int, size: int) -> "BatchStream":
        """The stream of the batches of one of many processes; itself for one process, and for one batch.

        :param rank: which of the processes this is, from 0.
        :param size: the number of processes, whose generators are in the same state.
        """
        if size == 1 or self.num_batches == 1:
            return self
        seed = int(torch.randint(_SEEDS, (), dtype=torch.int64, device="cpu"))
        loader = shard(self._loader, self.num_batches, rank, size, seed)
        stream = BatchStream(loader, self._kwargs)
        stream.origin, stream.whole = self.origin, self
        return stream

    @property
    def seed(self) -> int | None:
        """The seed of an order that epochs are told of; ``None`` of any other."""
        return self._by_epoch.seed if isinstance(self._by_epoch, _BY_EPOCH) else None

    def restart(self) -> None:
        """Goes back to the beginning; what is left to torch's own generator is drawn from there."""
        self.close()
        self._set_own(self.origin["own"])
        self.epoch, self.position = 0, 0

    def close(self) -> None:
        """Lets go of the present epoch, and of the processes that load it."""
        self._iterator = None

    def one_pass(self, count: int) -> Iterator[Batch]:
        """At most so many batches of one epoch, spread over it; the same ones each time.

        It leaves the stream and the generators as they were. The order is that of the first epoch,
        as far as it follows torch's generators.
        """
        count = min(count, self.num_batches)
        wanted = {(2 * k + 1) * self.num_batches // (2 * count) for k in range(count)}
        if isinstance(self._rows, _SHUFFLED):
            wanted = set(range(count))
        own, state, iterator = self._random_state()["own"], self.origin["torch"], None
        self._set_own(self.origin["own"])
        self._set_epoch(0)
        try:
            for k in range(max(wanted) + 1):
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(state)
                    iterator = iter(self._loader) if iterator is None else iterator
                    batch = next(iterator, _END)
                    state = torch.get_rng_state()
                if batch is _END:
                    return
                if k in wanted:
                    yield self._arguments(batch)
        finally:
            self._set_own(own)
            self._set_epoch(self.epoch)

    def place(self, num_steps: int | None) -> tuple[str, str]:
        """The epoch of so many steps in all, if their number is known, and the batch, in words."""
        total = self.num_batches
        epochs = "" if num_steps is None else f"/{math.ceil(num_steps / total)}"
        return f"epoch {self.epoch + 1}{epochs}", f"batch {self.position}/{total}"

    def state(self) -> dict[str, Any]:
        """Where the stream is, in tensors and plain data."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> bool:
        """Goes to where another stream of the same loader was, which leaves torch's generator anywhere.

        :return: whether that was possible; if the order is not known, the next epoch begins.
        """
        expected, position, start = state["num_batches"], state["position"], state["epoch_start"]
        if expected != self.num_batches:
            raise ValueError(
                f"resume: expected a loader of {expected} batches, as before, got {self.num_batches}"
            )
        if len(state["origin"]["own"]) != len(self._generators()):
            raise ValueError("resume: expected a loader with its own generator where it had one")
        self.origin = self.whole.origin = state["origin"]
        seed = state["seed"]
        if isinstance(self._by_epoch, _BY_EPOCH) and seed is not None:
            self._by_epoch.seed = seed
        self.restart()
        self.epoch = state["epoch"]
        if position and not self.can_go_on:
            self.epoch += 1
            return bool(position >= self.num_batches)
        if position:
            self._set_own(start["own"])
            torch.set_rng_state(start["torch"])
            self.position = sum(1 for _ in islice(self._begin_epoch(), position))
        return True

    def _begin_epoch(self) -> Iterator[object]:
        self.close()
        self.epoch_start = self._random_state()
        self._set_epoch(self.epoch)
        self._iterator, self.position = iter(self._loader), 0
        return self._iterator

    def _arguments(self, batch: object) -> Batch:
        if isinstance(batch, Tensor):
            return Batch((batch,), self._kwargs)
        if isinstance(batch, Mapping):
            clash = sorted(map(str, batch.keys() & self._kwargs.keys()))
            if clash:
                got = "which is a keyword argument of fit already"
                raise ValueError(f"loader: expected batches without '{clash[0]}', {got}")
            return Batch((), {**self._kwargs, **batch})
        if isinstance(batch, (tuple, list)):
            return Batch(tuple(batch), self._kwargs)
        raise TypeError(
            "loader: expected batches that are a tuple or list (positional arguments of the model), "
            f"a mapping (its keyword arguments) or a tensor, got {type(batch).__name__}"
        )

    def _count(self) -> int:
        try:
            return len(self._loader)  # type: ignore[arg-type]  # any iterable may lack a length
        except TypeError:
            own = self._random_state()["own"]
            with torch.random.fork_rng(devices=[]):
                count = sum(1 for _ in islice(self._loader, _MAX_COUNTED + 1))
            self._set_own(own)
            if count > _MAX_COUNTED:
                raise ValueError(
                    f"loader: expected an epoch that ends, got {_MAX_COUNTED} batches and no end: give "
                    "the iterable a length (__len__), so that it is not counted, or let it end"
                ) from None
            return count

    def _is_partition(self) -> bool:
        """Whether an epoch is known to have each row once; a subset that the user chose is all rows."""
        loader, batches, rows = self._loader, self._batches, self._rows
        is_random = isinstance(rows, RandomSampler) and rows.replacement
        if not self.can_go_on or is_random or isinstance(rows, WeightedRandomSampler):
            return False
        if not isinstance(loader, DataLoader) or batches is None or not isinstance(rows, Sized):
            return True
        data = loader.dataset
        is_subset = isinstance(rows, SubsetRandomSampler)
        if not is_subset and isinstance(data, Sized) and len(rows) < len(data):
            return False
        if not isinstance(batches, BatchSampler):
            return True
        return not batches.drop_last or len(rows) % batches.batch_size == 0

    def _generators(self) -> list[torch.Generator]:
        """The loader's own ones, by the name that PyTorch's loaders and samplers give them."""
        loader = _whole(self._loader)
        owners = [loader, self._batches, self._rows]
        if isinstance(loader, DataLoader):
            owners.append(loader.sampler)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _random_state(self) -> dict[str, Any]:
        own = [generator.get_state() for generator in self._generators()]
        return {"torch": torch.get_rng_state(), "own": own}

    def _set_epoch(self, epoch: int) -> None:
        if isinstance(self._by_epoch, _BY_EPOCH):
            self._by_epoch.set_epoch(epoch)

    def _set_own(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators(), states):
            generator.set_state(state)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))


def _samplers(loader: object) -> tuple[object, object]:
    """What draws the batches, and what draws the rows in them, as far as they are known."""
    loader = _whole(loader)
    if not isinstance(loader, DataLoader):
        return None, loader
    batches: object = loader.batch_sampler
    rows = batches.sampler if isinstance(batches, BatchSampler) else batches or loader.sampler
    return batches, rows


def _whole(loader: object) -> object:
    """The loader that all processes have a share in."""
    return loader.loader if isinstance(loader, StridedLoader) else loader


def _checked(loader: object) -> Iterable[object]:
    expected = "loader: expected a DataLoader or another iterable of batches"
    got = type(loader).__name__
    if isinstance(loader, (Tensor, Mapping, str, bytes)):
        hint = "A list of batches will do, as [(x, y)], or x.split(100)"
        raise TypeError(f"{expected}, got data of type {got}. {hint}")
    if isinstance(loader, Iterator):
        raise TypeError(f"{expected} that begins anew in each epoch, got an iterator ({got})")
    if not isinstance(loader, Iterable):
        raise TypeError(f"{expected}, got {got}")
    return loader
