# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The processes that share a fit: one alone, or those of ``torch.distributed``.

Each process takes its own draws and mini-batches. Gradients are averaged, so that parameters are
equal to the bit in all of them; decisions rest on averaged or gathered numbers. What cannot be
shared is done by the first process, and broadcast.

**References**

1. PyTorch Distributed: Experiences on Accelerating Data Parallel Training (Li, Zhao, Varma and
   others, 2020), https://arxiv.org/abs/2006.15704
"""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from io import BytesIO
from typing import Any, TypeVar, cast

import pyro
import torch
from torch import Tensor, distributed, nn

from ..joint.protocols import ScaledSteps
from .optimization.objective import Objective

T = TypeVar("T")
Gradients = Sequence[Tensor | None]

_SEEDS = 2**31


class Processes:
    """One process alone: it has nothing to share, and nothing of it costs anything."""

    rank, size = 0, 1  #: which process this is, from 0, and of how many

    def seed(self, seed: int | None) -> int | None:
        """The seed that all processes have."""
        return seed

    def draw_apart(self) -> None:
        """From now on the draws of each process are others."""

    def quiet(self) -> AbstractContextManager[None]:
        """A context in which only the first process warns."""
        return nullcontext()

    def shared(self, objective: Objective) -> Objective:
        """An objective of which each process takes a part of the draws."""
        return objective

    def scales(self, guide: ScaledSteps | None) -> ScaledSteps | None:
        """The scales of steps that a guide gives, the same in all processes."""
        return guide

    def share(self, num_draws: int) -> int:
        """The part of a number of draws that is each process's, rounded up."""
        return num_draws

    def first(self, function: Callable[[], T]) -> T:
        """What a function returns in the first process, which alone calls it; its error is all's."""
        return function()

    def check_same(self, content: Callable[[], Mapping[str, object]]) -> None:
        """Checks that something is the same in all processes.

        :param content: returns it by name.
        :raises ValueError: if it is not.
        """

    def align(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Gives tensors the values of the first process.

        :param tensors: returns them by name.
        :raises ValueError: if those of another process have other names or shapes.
        """

    def mean(
        self, loss: float, gradients: Gradients | None, parameters: Sequence[Tensor]
    ) -> tuple[float, Gradients | None]:
        """The mean loss, and the mean gradient.

        :param gradients: one for each parameter, ``None`` where the loss does not depend on it;
            ``None`` for all of them if the loss is not finite.
        :return: the same for all processes: one loss that is not finite makes the mean so.
        """
        return loss, gradients

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set somewhere."""
        return flags

    def gather(self, values: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, along the first dimension, by rank."""
        return values

    def gather_objects(self, own: T) -> list[T]:
        """The objects of all processes, by rank."""
        return [own]

    def broadcast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors with the values that they have in the first process; they change in place."""
        return tensors


ALONE = Processes()


class ManyProcesses(Processes):
    """The processes of the default group of ``torch.distributed``.

    Each method is called by all of them, in the same order. One that has ended, or does not answer
    within the timeout of the group, is a ``torch.distributed.DistError`` in the others.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        #: the types of devices whose tensors can be sent: "cuda" alone where there is NCCL alone
        self._types = re.findall(r"(\w+):", distributed.get_backend_config())

    def seed(self, seed: int | None) -> int:
        return self.first(lambda: _new_seed() if seed is None else seed)

    def draw_apart(self) -> None:
        pyro.set_rng_seed(self.first(_new_seed) + self.rank)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        if self.rank == 0:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def shared(self, objective: Objective) -> Objective:
        return SharedObjective(objective, self)

    def scales(self, guide: ScaledSteps | None) -> ScaledSteps | None:
        return None if guide is None else ScalesOfFirst(guide, self)

    def share(self, num_draws: int) -> int:
        return math.ceil(num_draws / self.size)

    def first(self, function: Callable[[], T]) -> T:
        value, error, content = None, None, [b""]
        if self.rank == 0:
            try:
                value = function()
                content = [_packed((value, None))]
            except Exception as raised:
                error, content = raised, [_packed((None, _sendable(raised)))]
        with self._named_failures():
            distributed.broadcast_object_list(content, src=0)
        if self.rank > 0:
            value, error = _unpacked(content[0])
        if error is not None:
            raise error
        return cast(T, value)

    def check_same(self, content: Callable[[], Mapping[str, object]]) -> None:
        found = self.gather_objects(content())
        for name in found[0]:
            values = [part.get(name) for part in found]
            if values.count(values[0]) < len(values):
                raise ValueError(f"fit: expected the same {name} in all processes, got {values}")

    def align(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        found = tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        self.check_same(lambda: {"parameters": list(shapes), **shapes})
        self.broadcast(*found.values())

    def mean(
        self, loss: float, gradients: Gradients | None, parameters: Sequence[Tensor]
    ) -> tuple[float, Gradients | None]:
        gradients = [None] * len(parameters) if gradients is None else gradients
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        head = [loss, *(float(g is not None) for g in gradients)]
        place: dict[str, Any] = {"dtype": dtype, "device": self._place_of(parameters[0].device)}
        parts = [torch.tensor(head, **place)]
        for parameter, gradient in zip(parameters, gradients):
            part = torch.zeros_like(parameter) if gradient is None else gradient
            parts.append(part.reshape(-1).to(**place))
        bucket = torch.cat(parts)
        with self._named_failures():
            distributed.all_reduce(bucket)
        bucket /= self.size
        loss, *present = bucket[: len(head)].tolist()
        if not math.isfinite(loss):
            return loss, None
        averaged = list[Tensor | None]()
        sizes = [*map(Tensor.numel, parameters)]
        for parameter, part, share in zip(parameters, bucket[len(head) :].split(sizes), present):
            averaged.append(part.view_as(parameter).to(parameter) if share else None)
        return loss, averaged

    def any(self, *flags: bool) -> tuple[bool, ...]:
        found = torch.tensor(flags, dtype=torch.uint8, device=self._place_of("cpu"))
        with self._named_failures():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return tuple(map(bool, found.tolist()))

    def gather(self, values: Tensor) -> Tensor:
        if not values.numel():
            return values
        own = self._carried(values)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._named_failures():
            distributed.all_gather(parts, own)
        return torch.cat(parts).to(values.device)

    def gather_objects(self, own: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self._named_failures():
            distributed.all_gather_object(found, _packed(own))
        return [*map(_unpacked, found)]

    @torch.no_grad()
    def broadcast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        kinds: dict[object, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            bucket = self._carried(torch.cat([tensor.reshape(-1) for tensor in alike]))
            with self._named_failures():
                distributed.broadcast(bucket, src=0)
            for tensor, part in zip(alike, bucket.split([*map(Tensor.numel, alike)])):
                tensor.copy_(part.view_as(tensor))
        return tensors

    def _place_of(self, device: torch.device | str) -> torch.device:
        """From where to send what is on a device."""
        device = torch.device(device)
        if device.type in self._types:
            return device
        return torch.device("cpu" if "cpu" in self._types else self._types[0])

    def _carried(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._place_of(tensor.device)).contiguous()

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise distributed.DistError(
                f"fit, in process {self.rank} of {self.size} (from 0): another process has ended, or "
                "has not answered in time; what it printed says why. Begin all of them again: a "
                f"checkpoint, if the fit has one, is good to resume from ({error})"
            ) from error


@dataclass
class SharedObjective(Objective):
    """An objective of which each process takes its share of the draws.

    A loss is that of the own draws: its gradient is averaged afterwards. Draws of the ELBO are those of
    all processes, the same for each, so that what is decided by them is decided alike.

    :param objective: the objective for any number of draws.
    :param processes: those that share it.
    """

    objective: Objective
    processes: Processes

    def __post_init__(self) -> None:
        self.has_weights = self.objective.has_weights

    def loss(self, num_particles: int) -> Tensor:
        return self.objective.loss(self.processes.share(num_particles))

    def tail_loss(self, num_particles: int) -> Tensor:
        return self.objective.tail_loss(self.processes.share(num_particles))

    def parameters(self) -> dict[str, Tensor]:
        return self.objective.parameters()

    def is_guide_alone(self) -> bool:
        return self.objective.is_guide_alone()

    def elbo_draws(self, count: int) -> Tensor:
        return self.processes.gather(self.objective.elbo_draws(self.processes.share(count)))

    def nonfinite_sites(self) -> list[str]:
        found = self.processes.gather_objects(self.objective.nonfinite_sites())
        return list(dict.fromkeys(name for names in found for name in names))


@dataclass
class ScalesOfFirst(ScaledSteps):
    """The scales of steps that a guide gives in the first process: its mini-batch may be a short one.

    :param guide: the guide.
    :param processes: those that train it.
    """

    guide: ScaledSteps
    processes: Processes

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        own = self.guide.step_scales()
        return dict(zip(own, self.processes.broadcast(*map(torch.clone, own.values()))))


def _new_seed() -> int:
    return int(torch.randint(_SEEDS, (), dtype=torch.int64, device="cpu"))


def _sendable(error: Exception) -> Exception:
    """An error, or one of the same words where it cannot be sent."""
    try:
        _unpacked(_packed(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _packed(value: object) -> bytes:
    """Tensors and other objects as bytes."""
    file = BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(content: bytes) -> Any:
    """What :func:`_packed` packed; tensors of a GPU are then on the one of this process."""
    own_gpu = {f"cuda:{k}": "cuda" for k in range(torch.cuda.device_count())}
    # from another process of this very fit
    return torch.load(BytesIO(content), map_location=own_gpu, weights_only=False)


def checksum(tensors: Iterable[Tensor]) -> str:
    """A short checksum of tensors, their dtypes and their shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tensor.shape)).encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:8]
