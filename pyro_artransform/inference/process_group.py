# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Where the processes of a fit come from: a process group of ``torch.distributed``, or nowhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count

import torch
from torch import distributed

from .parallel import ALONE, ManyProcesses, Processes

if distributed.is_available():
    # torch.func imports it anyway, in the first steps. The group that is open then becomes the default of
    # its functions, lives until Python ends, and its threads, which may ask for Python then, abort
    import torch.distributed.nn.functional

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# the others wait while the first process looks for a start, or judges: PyTorch's default for gloo
_TIMEOUT = timedelta(minutes=30)
_groups = count()  # made so far, as many in all processes


@contextmanager
def open_processes() -> Iterator[Processes]:
    """The processes that a fit is run by.

    Those of ``torch.distributed`` if it is initialized, and if the environment is that of
    ``torchrun``: then a process group is made, and destroyed at the end. Otherwise one alone.
    """
    if not distributed.is_available():
        yield ALONE
        return
    is_made = not distributed.is_initialized() and _is_launched()
    if is_made:
        _make_group()
    try:
        is_shared = distributed.is_initialized() and distributed.get_world_size() > 1
        processes = ManyProcesses() if is_shared else ALONE
        yield processes
        processes.any(False)  # nobody goes while others still wait for something
    finally:
        if is_made:
            distributed.destroy_process_group()


def _is_launched() -> bool:
    """Whether the environment says how to reach the other processes."""
    return all(os.environ.get(name) for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def _make_group() -> None:
    """A group in which NCCL carries what is on GPUs, where there are any, and gloo all else."""
    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    # a store forgets nothing, and that of torchrun outlives the processes that it restarts: each group
    # needs keys of its own
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, size = _rendezvous()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=distributed.PrefixStore(f"pyro_artransform.fit {attempt}.{next(_groups)}", store),
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
    )


@cache
def _rendezvous() -> "tuple[distributed.Store, int, int]":
    """The store by which all processes find each other, the rank and their number."""
    found: tuple[distributed.Store, int, int] = next(
        distributed.rendezvous("env://", timeout=_TIMEOUT)
    )
    return found
