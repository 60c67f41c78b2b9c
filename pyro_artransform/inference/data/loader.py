# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The stream of mini-batches that a loader gives, epoch after epoch, from any place in it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

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

_END = object()
_FIXED = (list, tuple, range, SequentialSampler, DistributedSampler)
_SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Batch(NamedTuple):
    """The arguments of model and guide for a step."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class BatchStream:
    """The mini-batches of a loader as arguments of a model, one epoch after the other.

    :param loader: a ``torch.utils.data.DataLoader`` or another iterable that begins anew each time.
        A tuple or list of it is the positional arguments, a mapping the keyword arguments, and a
        tensor the only argument.
    :param kwargs: keyword arguments that all batches have.
    :raises TypeError: if the loader can be iterated over once only, or not at all, or is itself data.
    :raises ValueError: if it is empty.
    """

    def __init__(
        self, loader: Iterable[object], kwargs: Mapping[str, object] | None = None
    ) -> None:
        self._loader, self._kwargs = _checked(loader), dict(kwargs or {})
        self._iterator: Iterator[object] | None = None
        self._origin = self._random_state()
        self._epoch_start = self._origin
        #: how many epochs are over, and how many batches of the present one
        self.epoch, self.position = 0, 0
        #: batches in an epoch
        self.num_batches = self._count()
        if not self.num_batches:
            raise ValueError("loader: expected at least one batch, got none")

    def next(self) -> Batch:
        """The next batch, of the next epoch where this one is over.

        :raises ValueError: if the loader has nothing left, as one that can be read once only.
        :raises TypeError: if a batch is of a kind that cannot be arguments.
        """
        batch = next(self._iterator or self._begin_epoch(), _END)
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

    def restart(self) -> None:
        """Goes back to the beginning; what is left to torch's own generator is drawn from there."""
        self.close()
        self._set_own(self._origin["own"])
        self.epoch, self.position = 0, 0

    def close(self) -> None:
        """Lets go of the present epoch, and of the processes that load it."""
        iterator, self._iterator = self._iterator, None
        _close(iterator)

    def one_pass(self, count: int) -> Iterator[Batch]:
        """At most so many batches of one epoch, spread over it; the same ones each time.

        It leaves the stream and the generators as they were. The order is that of the first epoch,
        as far as it follows torch's generators.

        :param count: how many.
        """
        wanted = self._spread(min(count, self.num_batches))
        own, inside, iterator = self._own_states(), self._origin["torch"], None
        self._set_own(self._origin["own"])
        try:
            for k in range(max(wanted) + 1):
                outside = torch.get_rng_state()
                torch.set_rng_state(inside)
                iterator = iter(self._loader) if iterator is None else iterator
                batch = next(iterator, _END)
                inside = torch.get_rng_state()
                torch.set_rng_state(outside)
                if batch is _END:
                    return
                if k in wanted:
                    yield self._arguments(batch)
        finally:
            _close(iterator)
            self._set_own(own)

    def _spread(self, count: int) -> set[int]:
        if isinstance(self._samplers()[1], _SHUFFLED):
            return set(range(count))
        return {(2 * k + 1) * self.num_batches // (2 * count) for k in range(count)}

    def _count(self) -> int:
        try:
            return len(self._loader)  # type: ignore[arg-type]  # any iterable may lack a length
        except TypeError:
            own, state = self._own_states(), torch.get_rng_state()
            count = sum(1 for _ in self._loader)
            self._set_own(own)
            torch.set_rng_state(state)
            return count

    def _arguments(self, batch: object) -> Batch:
        if isinstance(batch, Tensor):
            return Batch((batch,), self._kwargs)
        if isinstance(batch, Mapping):
            clash = sorted(map(str, batch.keys() & self._kwargs.keys()))
            if clash:
                raise ValueError(
                    f"loader: expected batches without '{clash[0]}', which is a keyword argument of "
                    "fit already"
                )
            return Batch((), {**self._kwargs, **batch})
        if isinstance(batch, (tuple, list)):
            return Batch(tuple(batch), self._kwargs)
        raise TypeError(
            "loader: expected batches that are a tuple or list (positional arguments of the model), "
            f"a mapping (its keyword arguments) or a tensor, got {type(batch).__name__}"
        )

    def place(self, num_steps: int | None) -> tuple[str, str]:
        """The epoch, and the batch in it, in words.

        :param num_steps: the number of steps in all, if it is known.
        """
        total = self.num_batches
        epochs = "" if num_steps is None else f"/{math.ceil(num_steps / total)}"
        return f"epoch {self.epoch + 1}{epochs}", f"batch {self.position}/{total}"

    # Where the order comes from

    def _samplers(self) -> tuple[object, object]:
        """What draws the batches, and what draws the rows in them, as far as they are known."""
        loader = self._loader
        if not isinstance(loader, DataLoader):
            return None, loader
        batches: object = loader.batch_sampler
        rows = batches.sampler if isinstance(batches, BatchSampler) else batches or loader.sampler
        return batches, rows

    @property
    def can_go_on(self) -> bool:
        """Whether the order follows torch's generators, or is fixed: then any place in it is known."""
        return isinstance(self._samplers()[1], _FIXED + _SHUFFLED)

    @property
    def is_partition(self) -> bool:
        """Whether an epoch is known to have each of its rows once."""
        _, rows = self._samplers()
        is_drawn = isinstance(rows, WeightedRandomSampler)
        is_drawn = is_drawn or (isinstance(rows, RandomSampler) and rows.replacement)
        return self.can_go_on and not (is_drawn or self._leaves_rows_out())

    def _leaves_rows_out(self) -> bool:
        """Whether some rows of the data are in no batch; a subset that the user chose is the data."""
        batches, rows = self._samplers()
        if (
            batches is None
            or not isinstance(self._loader, DataLoader)
            or not isinstance(rows, Sized)
        ):
            return False
        data = self._loader.dataset
        is_subset = isinstance(rows, SubsetRandomSampler)
        if not is_subset and isinstance(data, Sized) and len(rows) < len(data):
            return True
        if not isinstance(batches, BatchSampler):
            return False
        return batches.drop_last and len(rows) % batches.batch_size > 0

    def _generators(self) -> list[torch.Generator]:
        """The loader's own ones, by the name that PyTorch's loaders and samplers give them."""
        owners = [self._loader, *self._samplers()]
        if isinstance(self._loader, DataLoader):
            owners.append(self._loader.sampler)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _own_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _random_state(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "own": self._own_states()}

    def _set_own(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators(), states):
            generator.set_state(state)

    def _begin_epoch(self) -> Iterator[object]:
        self.close()
        self._epoch_start = self._random_state()
        self._iterator, self.position = iter(self._loader), 0
        return self._iterator

    # What a checkpoint holds

    def state(self) -> dict[str, Any]:
        """Where the stream is, in tensors and plain data."""
        return {
            "num_batches": self.num_batches,
            "epoch": self.epoch,
            "position": self.position,
            "origin": self._origin,
            "epoch_start": self._epoch_start,
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Goes to where another stream of the same loader was, which leaves torch's generator anywhere.

        :param state: what :meth:`state` returned.
        :return: whether that was possible; where the order of the loader is not known, the stream
            is at the beginning of the next epoch.
        :raises ValueError: if it is of another loader.
        """
        expected, got = state["num_batches"], self.num_batches
        if expected != got:
            raise ValueError(
                f"resume: expected a loader of {expected} batches, as before, got {got}"
            )
        if len(state["origin"]["own"]) != len(self._generators()):
            raise ValueError("resume: expected a loader with its own generator where it had one")
        self.close()
        self._origin = state["origin"]
        self._set_own(self._origin["own"])
        self.epoch, self.position = state["epoch"], 0
        if not state["position"]:
            return True
        if not self.can_go_on:
            self.epoch += 1
            return bool(state["position"] >= self.num_batches)
        self._set_own(state["epoch_start"]["own"])
        torch.set_rng_state(state["epoch_start"]["torch"])
        skipped = islice(self._begin_epoch(), state["position"])
        self.position = sum(1 for _ in skipped)
        return True


def _close(iterator: object) -> None:
    if isinstance(iterator, _Closable):
        iterator.close()


def _checked(loader: object) -> Iterable[object]:
    if isinstance(loader, (Tensor, Mapping, str, bytes)):
        raise TypeError(
            "loader: expected a DataLoader or another iterable of batches, got data of type "
            f"{type(loader).__name__}. A list of batches will do, as [(x, y)], or x.split(100)"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            "loader: expected an iterable that begins anew in each epoch, such as a DataLoader or a "
            f"list of batches, got an iterator ({type(loader).__name__}), which ends with the first"
        )
    if not isinstance(loader, Iterable):
        raise TypeError(
            "loader: expected a DataLoader or another iterable of batches, got "
            f"{type(loader).__name__}"
        )
    return loader
