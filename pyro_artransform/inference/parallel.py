# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""One fit in many processes, started by ``torchrun`` or in a process group of ``torch.distributed``.

Each process has its own draws and mini-batches, and gradients are averaged. The first process initializes
the guide, computes the verdict and writes files; if it needs a sum over all data, the others, which wait, add
their shares. All processes call the same methods in the same order.
"""

import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial, reduce
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

import pyro
import torch
from torch import Tensor, distributed, nn

from .._base.processes import OneProcess
from .optimization.optimizers import Scales

T = TypeVar("T")
Gradients = Sequence[Tensor | None]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 5.0  # seconds after which a waiting process logs a message
_FIRST_MEETING = timedelta(minutes=1)  # time limit for a rendezvous not launched by torchrun
_LATE = "Another process is late, hangs or has ended"
_groups = count()  # the number of process groups made so far, equal in all processes


@contextmanager
def open_parallel() -> "Iterator[Parallel]":
    """Joins the processes that share the fit.

    Under ``torchrun`` it creates a process group and destroys it at the end, unless one exists.
    """
    has_group = distributed.is_available() and distributed.is_initialized()
    is_launched = os.environ.get("WORLD_SIZE", "1") != "1" and all(map(os.environ.get, _LAUNCHED))
    is_made = distributed.is_available() and is_launched and not has_group
    if is_made:
        variables = ", ".join(f"{name}={os.environ[name]}" for name in _LAUNCHED)
        hint = f"The environment has {variables}. Unset WORLD_SIZE if this process is to fit alone"
        _wait_for("the other processes of this fit", _make_group, hint=hint)
    try:
        parallel = Parallel(has_group or is_made)
        with warnings.catch_warnings():
            if parallel.rank > 0:
                warnings.simplefilter("ignore")  # the first process warns
            yield parallel
        parallel.any(False)  # pending messages must arrive before the group is destroyed
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


class _Share(NamedTuple):
    """Stands for each process's own share in a request, by its position among all that are held."""

    position: int


class _Request(NamedTuple):
    """A function whose sum over all processes the first one needs."""

    function: Callable[..., Tensor]
    args: list[object]


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class Parallel(OneProcess):
    """This process in the default group of ``torch.distributed``; the only one without a group."""

    def __init__(self, is_group: bool = False) -> None:
        #: the index of this process, from 0, and the number of processes
        self.rank = distributed.get_rank() if is_group else 0
        self.size = distributed.get_world_size() if is_group else 1
        self._held = list[object]()
        self._is_leading = False  # whether the others wait for requests of this process

    def share(self, num_draws: int) -> int:
        """The number of draws per process, rounded up."""
        return math.ceil(num_draws / self.size)

    def first(self, what: str, function: Callable[[], T]) -> T:
        """Calls a function in the first process only; returns its value, or raises its error, in all.

        Meanwhile the others compute their parts of the sums that the function needs, see :meth:`sum`.
        """
        if self.size == 1:
            return function()
        if self.rank > 0:
            value, failure = self._serve(f"{what} by the first process")
            if failure:
                raise RuntimeError(f"fit: the first process has failed: {failure}")
            return cast(T, value)
        found, failure, self._is_leading = None, "", True
        try:
            found = function()
            return found
        except BaseException as error:
            failure = _words(error)
            raise
        finally:
            self._is_leading = False
            self._broadcast(f"{what} by the first process", (found, failure))

    def _serve(self, what: str) -> tuple[object, str]:
        """Answers requests of the first process until it sends the value of its function, or an error."""
        while isinstance(message := self._broadcast(what), _Request):
            args = [self._held[a.position] if isinstance(a, _Share) else a for a in message.args]
            _, error = self._sum_of(partial(message.function, *args))
            if error is not None and not isinstance(error, Exception):
                raise error
        return cast(tuple[object, str], message)

    def hold(self, share: object) -> None:
        """Registers this process's share of an object; all processes hold the same in the same order."""
        self._held.append(share)

    def sum(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """The sum of a function over all processes, for the first one, inside of :meth:`first`.

        :param function: a function of a module, which returns tensors of the same shape in all processes.
        :param args: each object that processes :meth:`hold` stands for their own shares; others are sent,
            tensors to the CPU.
        :raises RuntimeError: if the function fails in another process.
        """
        if self.size == 1:
            return function(*args)
        if not self._is_leading:
            raise RuntimeError(
                "fit: a sum over all processes was requested while the others do not wait"
            )
        positions = {id(share): _Share(k) for k, share in enumerate(self._held)}
        on_cpu = (arg.to("cpu") if isinstance(arg, Tensor) else arg for arg in args)
        sent = [positions.get(id(arg), other) for arg, other in zip(args, on_cpu)]
        self._broadcast("the others", _Request(function, sent))
        total, error = self._sum_of(partial(function, *args))
        if error is not None:
            raise error
        return cast(Tensor, total)

    def _sum_of(self, function: Callable[[], Tensor]) -> tuple[Tensor | None, BaseException | None]:
        """The sum of a function's value over all processes, or the error of this one or of another."""
        value, error, failure = None, None, ""
        try:
            value = function()
        except BaseException as own:  # the others must not wait for this process
            error, failure = own, _words(own)
        words = max(self.gather_objects("the shares of all processes", failure))
        if value is None or words:
            return None, error or RuntimeError(f"fit: another process has failed: {words}")
        _wait_for("the sum of all processes", distributed.all_reduce, value)
        return value, None

    def _broadcast(self, what: str, value: object = None) -> object:
        """An object of the first process, in all."""
        sent = [value]
        _wait_for(what, distributed.broadcast_object_list, sent, 0)
        return sent[0]

    def seed(self, seed: int | None = None) -> int:
        """Broadcasts the seed of the first process, by default a new one."""
        value = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
        return self.gather_objects("a seed by the first process", value)[0]

    def seed_apart(self) -> None:
        """Seeds each of several processes differently."""
        if self.size > 1:
            pyro.set_rng_seed(self.seed() + self.rank)

    def gather_objects(self, what: str, own: T) -> list[T]:
        """The objects of all processes, by rank."""
        objects = [own] * self.size
        if self.size > 1:
            _wait_for(what, distributed.all_gather_object, objects, own)
        return objects

    def gather(self, draws: Tensor) -> Tensor:
        """The draws ``(n, ...)`` of all processes, by rank."""
        parts = self.gather_objects("the draws of all processes", draws.detach().to("cpu"))
        return torch.cat(parts).to(draws)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set in any process."""
        gathered = self.gather_objects("the end of a step in all processes", flags)
        return tuple(map(any, zip(*gathered)))

    @torch.no_grad()
    def copy_first(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Broadcasts the values of tensors from the first process, in place."""
        for tensor in tensors() if self.size > 1 else ():
            sent = tensor.detach().clone(memory_format=torch.contiguous_format)
            _wait_for("parameters of the first process", distributed.broadcast, sent, 0)
            tensor.copy_(sent)

    def scales_of_first(self, scales: Scales) -> dict[nn.Parameter, Tensor]:
        """The step scales of a guide in the first process; those of others may be of another mini-batch."""
        copied = {parameter: scale.clone() for parameter, scale in scales().items()}
        self.copy_first(copied.values)
        return copied

    def mean(
        self, loss: float, gradients: Gradients | None, parameters: Sequence[Tensor]
    ) -> tuple[float, Gradients | None]:
        """The mean loss and gradients; ``None`` for all gradients if any loss is not finite."""
        if self.size == 1:
            return loss, gradients
        gradients = gradients or [None] * len(parameters)
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        head = torch.tensor([loss, *(g is not None for g in gradients)], dtype=dtype, device="cpu")
        pairs = zip(parameters, gradients)
        parts = [head, *(torch.zeros_like(p) if g is None else g for p, g in pairs)]
        sums = torch.cat([part.reshape(-1).to(parameters[0].device, dtype) for part in parts])
        _wait_for("the gradients of all processes", distributed.all_reduce, sums)
        head, *means = (sums / self.size).split([part.numel() for part in parts])
        loss, *present = head.tolist()
        if not math.isfinite(loss):
            return loss, None
        triples = zip(means, parameters, present)
        return loss, [part.view_as(p).to(p) if share else None for part, p, share in triples]
