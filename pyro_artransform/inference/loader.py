# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The mini-batches of a loader by epoch and process, and the check that model and guide support them."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.infer.autoguide.effect import AutoMessenger
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from .._base.processes import EveryNth, Processes
from ..model import LogJoint
from ..model.protocols import FlowGuide, MinibatchGuide

_END = object()
_SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# containers and samplers with a fixed order, or one drawn from torch's generators
_KNOWN = (list, tuple, range, SequentialSampler, DistributedSampler, *_SHUFFLED)
_OPTIONS = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers"),
)


class Batch(NamedTuple):
    """The arguments of model and guide in one step."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


class BatchStream:
    """The mini-batches of a loader as arguments of a model, with common keyword arguments."""

    def __init__(
        self, loader: Iterable[object], kwargs: Mapping[str, object] | None = None
    ) -> None:
        is_data = isinstance(loader, (Tensor, Mapping, str, bytes))
        if is_data or isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise TypeError(
                "loader: expected a DataLoader or another iterable of batches that restarts in each epoch, "
                f"got {type(loader).__name__}. A list works, such as [(x, y)], or x.split(100)"
            )
        loader = _by_batch(loader)
        self._loader, self._kwargs = loader, dict(kwargs or {})
        #: the samplers of batches and of rows, if known
        self._batches: Any = None
        self._rows: Any = loader
        owners: list[Any] = [loader]
        if isinstance(loader, DataLoader):
            self._batches = batches = loader.batch_sampler
            rows = batches.sampler if isinstance(batches, BatchSampler) else batches
            self._rows = loader.sampler if rows is None else rows
            owners += batches, rows, loader.sampler
        # the attribute has this name in all of PyTorch's loaders and samplers
        own = {getattr(owner, "generator", None) for owner in owners} | {torch.default_generator}
        self._generators = [each for each in own if isinstance(each, torch.Generator)]
        #: the stream of all processes, and those that share it
        self.whole, self.processes = self, Processes()
        self.all_batches: Any = None  #: those of a pass, for the density of all data
        self._iterator: Iterator[object] | None = None
        #: the initial states of torch's generator and of the loader's own ones
        self._origin = self._states()
        self.epoch, self.position = 0, 0  #: completed epochs, batches taken from the current one
        self.num_batches = self._count()  #: batches per epoch
        if not self.num_batches:
            raise ValueError("loader: expected at least one batch, got none")
        #: whether each epoch is one batch with each row once, which is equivalent to arguments
        self.is_all_data = self.num_batches == 1 and self.is_partition

    def next(self) -> Batch:
        """Returns the next batch, and starts a new epoch if the current one is over."""
        while True:
            if self._iterator is None:
                self._iterator, self.position = self._iterate(self.epoch), 0
            batch = next(self._iterator, _END)
            if batch is not _END:
                self.position += 1
                return self._arguments(batch)
            if not self.position:
                raise ValueError(
                    f"loader: expected batches in each epoch, got none in epoch {self.epoch + 1}: use an "
                    "iterable that restarts each time, such as a DataLoader or a list"
                )
            if self.whole is self and self.position != self.num_batches:
                raise ValueError(
                    f"loader: expected {self.num_batches} batches in each epoch, got {self.position} in "
                    f"epoch {self.epoch + 1}: the weight of each batch would be wrong. Drop the last one in "
                    "every epoch or in none"
                )
            self._iterator, self.epoch = None, self.epoch + 1

    def share(self, processes: Processes, seed: int | None) -> "BatchStream":
        """The :class:`EveryNth` batches; itself for a single batch or a user's ``DistributedSampler``.

        :param seed: the common seed of their order; ``None`` for a single process.
        """
        is_shared = self.num_batches == 1 or isinstance(self._rows, DistributedSampler)
        if is_shared or seed is None:
            return self
        if self.num_batches < processes.size:
            raise ValueError(
                f"loader: expected at least one batch for each of {processes.size} processes, got "
                f"{self.num_batches}"
            )
        stream, loader = copy.copy(self), self._loader
        stream.all_batches, stream.processes = None, processes
        part = EveryNth(loader, self.num_batches, processes, seed)
        stream._loader = stream._rows = part
        is_loader = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
        if is_loader and self._batches is not None:  # loads only this process's rows
            part.batches = self._batches
            stream._loader = _with_batches(loader, part)
        stream.num_batches, stream.whole = math.ceil(self.num_batches / processes.size), self
        return stream

    def close(self) -> None:
        """Drops the current epoch and its worker processes."""
        self._iterator = None

    def one_pass(self, count: int) -> Iterator[Batch]:
        """At most ``count`` batches, spread over the first epoch; leaves stream and generators unchanged."""
        count = min(count, self.num_batches)
        wanted = {(2 * k + 1) * self.num_batches // (2 * count) for k in range(count)}
        if isinstance(self._rows, _SHUFFLED):
            wanted = set(range(count))
        with self._generators_at(self._origin):
            iterator, states = self._iterate(0), self._states()
        for k in range(max(wanted) + 1):
            with self._generators_at(states):
                batch, states = next(iterator, _END), self._states()
            if batch is _END and k == 0:
                raise ValueError("loader: expected at least one batch, got none")
            if batch is _END:
                return
            if k in wanted:
                yield self._arguments(batch)

    def one_pass_with_rows(self) -> Iterator[tuple[Batch, Sequence[int] | None]]:
        """All batches of an epoch with their row indices in all data, or ``None`` if these are unknown."""
        stream, loader, order = copy.copy(self), self._loader, None
        batches = self._batches
        if type(loader) is DataLoader and type(batches) is BatchSampler:
            with self._generators_at(self._states()):
                order = [*batches]
            stream._loader = _with_batches(loader, order)
        for k, batch in enumerate(stream.one_pass(self.num_batches)):
            yield batch, None if order is None else order[k]

    def place(self, num_steps: int | None) -> tuple[str, str]:
        """The current epoch and batch in words; ``num_steps`` is the total, if known."""
        total = self.num_batches
        epochs = "" if num_steps is None else f"/{math.ceil(num_steps / total)}"
        return f"epoch {self.epoch + 1}{epochs}", f"batch {self.position}/{total}"

    def _iterate(self, epoch: int) -> Iterator[object]:
        if isinstance(self._rows, (DistributedSampler, EveryNth)):  # their order depends on it
            self._rows.set_epoch(epoch)
        return iter(self._loader)

    def _arguments(self, batch: object) -> Batch:
        if not isinstance(batch, (tuple, list, Mapping, Tensor)):
            raise TypeError(
                "loader: expected batches that are a tuple or list (positional arguments of the model), a "
                f"mapping (its keyword arguments) or a tensor, got {type(batch).__name__}"
            )
        named = batch if isinstance(batch, Mapping) else {}
        args = (batch,) if isinstance(batch, Tensor) else () if named else tuple(batch)
        parts = *args, *named.values()
        rows = [len(part) for part in parts if isinstance(part, Tensor) and part.dim()]
        if rows and not any(rows):
            raise ValueError("loader: expected batches with rows, got an empty one: remove it")
        for name in named.keys() & self._kwargs.keys():
            raise ValueError(
                f"loader: expected batches without '{name}', since {name}= is also passed to fit"
            )
        return Batch(args, {**self._kwargs, **named})

    def _count(self) -> int:
        try:
            return len(self._loader)  # type: ignore[arg-type]  # any iterable may lack a length
        except TypeError:
            most = 100_000
            with self._generators_at(self._origin):
                count = sum(1 for _ in islice(self._loader, most + 1))
            if count > most:
                raise ValueError(
                    f"loader: expected a finite epoch, got {most} batches and no end: give the iterable a "
                    "length (__len__), or let it end"
                ) from None
            return count

    @property
    def is_partition(self) -> bool:
        """Whether an epoch is known to have each row once; a subset chosen by the user counts as all rows."""
        loader, batches, rows = self._loader, self._batches, self._rows
        is_drawn = isinstance(rows, WeightedRandomSampler) or getattr(rows, "replacement", False)
        if is_drawn or not isinstance(rows, _KNOWN):
            return False
        if not isinstance(loader, DataLoader) or batches is None or not isinstance(rows, Sized):
            return True
        data, is_subset = loader.dataset, isinstance(rows, SubsetRandomSampler)
        if not is_subset and isinstance(data, Sized) and len(rows) < len(data):
            return False
        if isinstance(batches, BatchSampler) and batches.drop_last:
            return len(rows) % batches.batch_size == 0
        return True

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    @contextmanager
    def _generators_at(self, states: Sequence[Tensor]) -> Iterator[None]:
        """Sets the generators to given states, and restores them at the end."""
        before = self._states()
        try:
            for generator, state in zip(self._generators, states):
                generator.set_state(state)
            yield
        finally:
            for generator, state in zip(self._generators, before):
                generator.set_state(state)


class _RowsOfTensors(Dataset[list[Tensor]]):
    """Rows of tensors that are indexed once for a batch, in place of once for each row."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitems__(self, rows: list[int]) -> list[Tensor]:
        return [tensor[rows] for tensor in self._tensors]


def _by_batch(loader: Iterable[object]) -> Iterable[object]:
    """The same batches, but those of a plain ``TensorDataset`` without the collation of single rows."""
    if type(loader) is not DataLoader or type(loader.dataset) is not TensorDataset:
        return loader
    if loader.batch_sampler is None or loader.collate_fn is not default_collate:
        return loader
    data = _RowsOfTensors(loader.dataset.tensors)
    return _with_batches(loader, loader.batch_sampler, data, collate_fn=list)


def _with_batches(
    loader: Any, batches: Iterable[list[int]], data: Any = None, **others: Any
) -> DataLoader[Any]:
    """A loader of the same data, or of other data, with other batches and options."""
    options = {name: getattr(loader, name) for name in _OPTIONS} | others
    data = loader.dataset if data is None else data
    return DataLoader(data, batch_sampler=batches, **options)


def check_use(stream: BatchStream, guide: object, log_joint: LogJoint, first: Batch) -> None:
    """Checks that a guide, after a call, knows the elements of a batch, and that the model scales it up."""
    if stream.whole.is_all_data:
        return
    structure = log_joint.structure(*first)
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    subsampled = structure.subsampled_latents
    creates_plates = isinstance(guide, AutoGuide) and guide.create_plates is not None
    draws_indices = bool(subsampled) and not creates_plates and all(map(_is_stock, parts))
    if draws_indices or any(isinstance(p, MinibatchGuide) and p.needs_indices for p in parts):
        of = f" (as '{subsampled[0]}')" if subsampled else ""
        raise ValueError(
            f"loader: the guide {type(guide).__name__} has parameters for the elements of a plate{of}, and "
            "draws their indices itself, which are not those of the rows of a batch. Expected "
            "guide=AutoAmortized(model, encoder), whose encoder reads the batch, or create_plates=, a "
            "function of a batch that returns the plate with the indices of its rows (subsample=)"
        )
    common = structure.global_latents
    if all(isinstance(part, FlowGuide) or _is_stock(part) for part in parts):
        common = list(structure.shapes)  # these guides have the same latents for all arguments
    if common and not structure.is_scaled:
        raise ValueError(
            f"loader: the latent '{common[0]}' is shared by all batches, but the model does not scale the "
            "likelihood of a batch up to all data. Expected the rows in pyro.plate(name, number of all rows, "
            "subsample_size=len(batch)), or poutine.scale"
        )


def _is_stock(guide: object) -> bool:
    """Whether a guide is one of Pyro's, with parameters for each element of a plate."""
    if isinstance(guide, AutoCallable):  # a user's function in an AutoGuideList
        return False
    is_pyros = type(guide).__module__.startswith("pyro.infer.autoguide")
    return is_pyros and not (isinstance(guide, AutoMessenger) and guide.amortized_plates)
