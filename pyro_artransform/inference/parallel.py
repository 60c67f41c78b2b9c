# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""One fit by many processes: those of ``torchrun``, or of a group of ``torch.distributed``.

Each process takes its own draws and mini-batches, and gradients are averaged. The first one finds the
start, judges the end and writes the files. All of them call the same methods in the same order.
"""

import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache, reduce
from itertools import count
from typing import Any, TypeVar, cast

import pyro
import torch
from torch import Tensor, distributed, nn

from .optimization.optimizers import Scales

T = TypeVar("T")
Gradients = Sequence[Tensor | None]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 5.0  # seconds of waiting after which a process logs it
_TIMEOUT = timedelta(minutes=30)  # PyTorch's for gloo
_FIRST_MEETING = timedelta(minutes=1)  # of processes that nothing but the environment speaks of
_groups = count()  # made so far, as many in all processes


@contextmanager
def open_parallel() -> "Iterator[Parallel]":
    """The processes that share the fit, of which this is one.

    A process group is made and destroyed in the environment of ``torchrun``, unless there is one.
    """
    is_launched = os.environ.get("WORLD_SIZE", "1") != "1" and all(map(os.environ.get, _LAUNCHED))
    is_made = distributed.is_available() and is_launched and not distributed.is_initialized()
    if is_made:
        _make_group()
    try:
        parallel = Parallel(distributed.is_available() and distributed.is_initialized())
        with warnings.catch_warnings() if parallel.rank > 0 else nullcontext():
            if parallel.rank > 0:
                warnings.simplefilter("ignore")  # the first process warns
            yield parallel
        parallel.any(False)  # what was sent has to arrive before the group ends
    finally:
        if is_made:
            distributed.destroy_process_group()


def _make_group() -> None:
    """A group in which NCCL carries what is on GPUs, where there are any, and gloo all else."""
    # torch.func imports it anyway, in the first steps. The group that is open then becomes the default of
    # its functions, lives until Python ends, and its threads, which may ask for Python then, abort
    import torch.distributed.nn.functional

    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    told = ", ".join(f"{name}={os.environ[name]}" for name in _LAUNCHED)
    hint = f"The environment has {told}. Unset WORLD_SIZE if this process is to fit alone"
    with _waiting("the other processes of this fit", hint):
        store, rank, size = _rendezvous()
        # torchrun's store outlives the processes that it starts again: each group needs keys of its own
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"pyro_artransform {attempt}.{next(_groups)}", store)
        place: dict[str, Any] = {"store": store, "rank": rank, "world_size": size}
        distributed.init_process_group(backend, timeout=_TIMEOUT, **place)


@cache
def _rendezvous() -> "tuple[distributed.Store, int, int]":
    """The store by which all processes find each other, the rank and their number."""
    timeout = _TIMEOUT if distributed.is_torchelastic_launched() else _FIRST_MEETING
    return cast(Any, next(distributed.rendezvous("env://", timeout=timeout)))


@contextmanager
def _waiting(
    what: str, hint: str = "Another process is late, hangs or has ended"
) -> Iterator[None]:
    """Logs what is waited for after some seconds, and names it in errors of PyTorch."""
    words = f"fit has waited {_PATIENCE:.0f} s for {what}. {hint}"
    timer = threading.Timer(_PATIENCE, logging.getLogger(__name__).warning, [words])
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"fit: expected {what}, and waited in vain. {hint} (PyTorch: {error})"
        ) from error
    finally:
        timer.cancel()


class Parallel:
    """One of the processes of the default group of ``torch.distributed``; alone without a group."""

    def __init__(self, is_group: bool = False) -> None:
        #: which process this is, from 0, and of how many
        self.rank, self.size = 0, 1
        if is_group:
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            self._device = "cpu" if "cpu" in distributed.get_backend_config() else "cuda"

    def share(self, num_draws: int) -> int:
        """The part of a number of draws that each process takes, rounded up."""
        return math.ceil(num_draws / self.size)

    def first(self, what: str, function: Callable[[], T]) -> T:
        """What a function returns, or raises, in the first process, which alone calls it."""
        if self.size == 1:
            return function()
        content = list[Any]([None, ""])
        try:
            if self.rank == 0:
                content[0] = function()
        except BaseException as error:
            content[1] = f"{type(error).__name__}: {error}"
            raise
        finally:
            with _waiting(f"{what} by the first process"):
                distributed.broadcast_object_list(content, src=0)
        if content[1]:
            raise RuntimeError(f"fit: the first process has failed: {content[1]}")
        return cast(T, content[0])

    def seed(self, seed: int | None = None) -> int:
        """The seed of the first process, or a new one."""
        return self.first(
            "a seed", lambda: int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        )

    def seed_apart(self) -> None:
        """Gives each of several processes random numbers of its own."""
        if self.size > 1:
            pyro.set_rng_seed(self.seed() + self.rank)

    def gather_objects(self, what: str, own: T) -> list[T]:
        """The objects of all processes, by rank."""
        if self.size == 1:
            return [own]
        found: list[Any] = [None] * self.size
        with _waiting(f"{what} of all processes"):
            distributed.all_gather_object(found, own)
        return found

    def gather(self, draws: Tensor) -> Tensor:
        """The draws ``(n, ...)`` of all processes, by rank."""
        if self.size == 1:
            return draws
        own = draws.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with _waiting("the draws of all processes"):
            distributed.all_gather(parts, own)
        return torch.cat(parts)

    def check_same(self, content: Mapping[str, object]) -> None:
        """Checks that each of these, by name, is the same in all processes."""
        found = self.gather_objects("the options", content)
        for name, value in found[0].items():
            values = [part[name] for part in found]
            if values.count(value) < self.size:
                raise ValueError(f"fit: expected the same {name} in all processes, got {values}")

    @torch.no_grad()
    def copy_first(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Gives tensors the values that they have in the first process."""
        for tensor in tensors() if self.size > 1 else ():
            sent = tensor.detach().clone(memory_format=torch.contiguous_format)
            with _waiting("parameters of the first process"):
                distributed.broadcast(sent, src=0)
            tensor.copy_(sent)

    def scales_of_first(self, scales: Scales) -> dict[nn.Parameter, Tensor]:
        """The scales of a guide's steps in the first process, whose mini-batch may be another."""
        found = {parameter: scale.clone() for parameter, scale in scales().items()}
        self.copy_first(found.values)
        return found

    def mean(
        self, loss: float, gradients: Gradients | None, parameters: Sequence[Tensor]
    ) -> tuple[float, Gradients | None]:
        """The mean loss and gradients; ``None`` instead of all of these where a loss is not finite."""
        if self.size == 1:
            return loss, gradients
        gradients = gradients or [None] * len(parameters)
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        head = [loss, *(float(gradient is not None) for gradient in gradients)]
        parts = [torch.tensor(head, dtype=dtype, device=parameters[0].device)]
        for parameter, gradient in zip(parameters, gradients):
            part = torch.zeros_like(parameter) if gradient is None else gradient
            parts.append(part.reshape(-1).to(parts[0]))
        sums = torch.cat(parts)
        with _waiting("the gradients of all processes"):
            distributed.all_reduce(sums)
        means = (sums / self.size).split([len(head), *map(Tensor.numel, parameters)])
        loss, *present = means[0].tolist()
        if not math.isfinite(loss):
            return loss, None
        parts = [part.view_as(p).to(p) for part, p in zip(means[1:], parameters)]
        return loss, [part if share else None for part, share in zip(parts, present)]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set in some process."""
        if self.size == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.uint8, device=self._device)
        with _waiting("the end of a step in all processes"):
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return tuple(map(bool, found.tolist()))
