# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""One fit in many processes, started by ``torchrun`` or in a process group of ``torch.distributed``.

Each process has its own draws and mini-batches, and gradients are averaged. The first process initializes
the guide and computes the verdict; if it needs a sum over all data, the others, which wait, add their shares.
All processes call the same methods in the same order. With one process, these do nothing.
"""

import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, reduce
from itertools import chain, count, islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

T = TypeVar("T")
Gradients = Sequence[Tensor | None]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 5.0  # seconds after which a waiting process logs a message
_FIRST_MEETING = timedelta(minutes=1)  # time limit for a rendezvous not launched by torchrun
_LATE = "Another process is late, hangs or has ended"
_groups = count()  # the number of process groups made so far, equal in all processes


class Processes:
    """The processes of a fit, as one of them sees them; by default it is the only one."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size  #: the index of this process, and the number of processes
        self._held = list[object]()

    def gather(self, what: str, own: T) -> list[T]:
        """The objects of all processes, by rank; ``what`` they are is logged if others are late."""
        objects = [own] * self.size
        if self.size > 1:
            _wait_for(what, distributed.all_gather_object, objects, _on_cpu(own))
        return objects

    def share(self, num_draws: int) -> int:
        """The number of draws per process, rounded up."""
        return math.ceil(num_draws / self.size)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set in any process."""
        return tuple(map(any, zip(*self.gather("the end of a step in all processes", flags))))

    def first(self, what: str, function: Callable[[], T]) -> T:
        """Calls a function in the first process only; returns its value, or raises its error, in all.

        Meanwhile the others compute their parts of the sums that the function needs, see :meth:`sum`.
        """
        if self.size == 1:
            return function()
        what, answer = f"{what} by the first process", cast(Any, (None, "the process has ended"))
        if self.rank == 0:
            try:
                answer = function(), ""
            except BaseException as error:
                answer = None, f"{type(error).__name__}: {error}"
                raise
            finally:
                self.gather(what, (None, answer))
        else:
            while (message := self.gather(what, cast(Any, None))[0])[0] is not None:
                with suppress(Exception):  # the first process has it, too
                    self._sum(*message)
            answer = message[1]
        found, failure = answer
        if failure:
            raise RuntimeError(f"fit: the first process has failed: {failure}")
        return cast(T, found)

    def hold(self, share: object) -> None:
        """Registers this process's share of an object; all processes hold the same in the same order."""
        self._held.append(share)

    def sum(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """The sum of a function of a module over all processes, for the first one, inside of :meth:`first`.

        :param args: each object that processes :meth:`hold` stands for their own shares; others are sent.
        :raises RuntimeError: if the function fails in another process.
        """
        if self.size == 1:
            return function(*args)
        places = {id(share): k for k, share in enumerate(self._held)}
        sent = [(places.get(id(arg)), None if id(arg) in places else _on_cpu(arg)) for arg in args]
        self.gather("the others", (function, sent))
        return self._sum(function, sent)

    def _sum(
        self, function: Callable[..., Tensor], sent: Sequence[tuple[int | None, object]]
    ) -> Tensor:
        """The sum of a function's value over all processes, or the error of this one or of another."""
        own: object = "has ended"
        try:
            own = function(*(arg if place is None else self._held[place] for place, arg in sent))
        except BaseException as error:
            own = f"{type(error).__name__}: {error}"
            raise
        finally:  # the others must not wait for this process
            found: list[Any] = self.gather("the shares of all processes", own)
        if failures := [share for share in found if isinstance(share, str)]:
            raise RuntimeError(f"fit: another process has failed: {failures[0]}")
        return cast(Tensor, sum(found))

    def mean(
        self, loss: float, gradients: Gradients | None, parameters: Sequence[Tensor]
    ) -> tuple[float, Gradients | None]:
        """The mean loss and gradients; ``None`` for all gradients if any loss is not finite."""
        if self.size == 1:
            return loss, gradients
        own = gradients or [None] * len(parameters)
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        head = torch.tensor([loss, *(g is not None for g in own)], dtype=dtype, device="cpu")
        parts = [head, *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own))]
        sums = torch.cat([part.reshape(-1).to(parameters[0].device, dtype) for part in parts])
        _wait_for("the gradients of all processes", distributed.all_reduce, sums)
        head, *means = (sums / self.size).split([part.numel() for part in parts])
        loss, *present = head.tolist()
        triples = zip(means, parameters, present)
        found = [part.view_as(p).to(p) if share else None for part, p, share in triples]
        return loss, found if math.isfinite(loss) else None

    @torch.no_grad()
    def copy_first(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Copies the values of tensors from the first process, in place."""
        for tensor in tensors() if self.size > 1 else ():
            sent = tensor.detach().clone(memory_format=torch.contiguous_format)
            _wait_for("parameters of the first process", distributed.broadcast, sent, 0)
            tensor.copy_(sent)

    def check_same(self, **values: object) -> None:
        """Raises a ``ValueError`` if options or data differ between processes."""
        for name, value in values.items():
            found = self.gather(f"{name} of all processes", value)
            if found.count(value) < len(found):
                raise ValueError(f"fit: expected the same {name} in all processes, got {found}")

    def seed(self, seed: int | None = None) -> int | None:
        """The seed of the first process for all, by default a new one if there are several."""
        if self.size > 1:
            seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        return self.gather("a seed by the first process", seed)[0]


def _on_cpu(value: object) -> object:
    """What is sent of an object."""
    return value.detach().to("cpu") if isinstance(value, Tensor) else value


@dataclass
class EveryNth:
    """One process's share of the batches of a loader, or of its sampler: every n-th one of n processes.

    The order is drawn from the common seed plus the epoch. Each batch is used once per epoch: if n does not
    divide ``num_batches``, some processes are one epoch ahead in the last step.
    """

    batches: Iterable[Any]
    num_batches: int
    processes: Processes
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed + self.epoch)
            iterator = iter(self.batches)
            # samplers draw their order, or its seed, with the first batch
            first = [*islice(iterator, 1)]
        rank, size = self.processes.rank, self.processes.size
        start = (rank - self.epoch * self.num_batches) % size
        yield from islice(chain(first, iterator), start, None, size)


@contextmanager
def open_processes() -> "Iterator[Processes]":
    """Joins the processes that share the fit.

    Under ``torchrun`` it creates a process group and destroys it at the end, unless one exists.
    """
    is_available, is_made = distributed.is_available(), False
    has_group = is_available and distributed.is_initialized()
    is_launched = os.environ.get("WORLD_SIZE", "1") != "1" and all(map(os.environ.get, _LAUNCHED))
    if is_available and is_launched and not has_group:
        variables = ", ".join(f"{name}={os.environ[name]}" for name in _LAUNCHED)
        hint = f"The environment has {variables}. Unset WORLD_SIZE if this process is to fit alone"
        _wait_for("the other processes of this fit", _make_group, hint=hint)
        is_made = True
    processes = Processes()
    if has_group or is_made:
        processes = Processes(distributed.get_rank(), distributed.get_world_size())
    try:
        with warnings.catch_warnings():
            if processes.rank > 0:
                warnings.simplefilter("ignore")  # the first process warns
            yield processes
        processes.any(False)  # pending messages must arrive before the group is destroyed
    finally:
        if is_made:
            distributed.destroy_process_group()


def _make_group() -> None:
    """Creates a process group with NCCL for tensors on GPUs, if available, and gloo for all others."""
    # if it is first imported while a group is open, as torch.func does, it keeps the group alive until
    # the interpreter exits, when the group's threads may need the interpreter and abort
    import torch.distributed.nn.functional

    store, rank, size = _rendezvous()
    # torchrun's store outlives restarted processes, so that each group needs its own keys
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"pyro_artransform {attempt}.{next(_groups)}", store)
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


@cache
def _rendezvous() -> "tuple[distributed.Store, int, int]":
    """The store of the rendezvous, the rank of this process and the number of processes."""
    is_launched = distributed.is_torchelastic_launched()
    timeout = distributed.constants.default_pg_timeout if is_launched else _FIRST_MEETING
    return cast(Any, next(distributed.rendezvous("env://", timeout=timeout)))


def _wait_for(what: str, function: Callable[..., object], *args: object, hint: str = _LATE) -> None:
    """Calls a blocking function of PyTorch; ``what`` it waits for is logged after some time and in errors."""
    words = f"fit has waited {_PATIENCE:.0f} s for {what}. {hint}"
    timer = threading.Timer(_PATIENCE, logging.getLogger(__name__).warning, [words])
    timer.start()
    try:
        function(*args)
    except RuntimeError as error:
        words = f"fit: expected {what}, got none in time. {hint} (PyTorch: {error})"
        raise RuntimeError(words) from error
    finally:
        timer.cancel()
