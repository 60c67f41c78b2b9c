# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""One run of a model or guide, for what its trace tells: the only place that runs one for that."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from .handlers import hidden_sites
from .sites import initial_value


@torch.no_grad()
def run_once(
    model: Callable[..., object],
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    at: Mapping[str, Tensor] | None = None,
    observed: bool = True,
    replayed: Any = None,
    init_loc_fn: Callable[[Any], Tensor] | None = None,
    validated: bool = False,
) -> Any:
    """The trace of one run, hidden from outer handlers.

    :param at: values of latents by site, which become observed. By default latents are drawn.
    :param observed: whether data keep their values; otherwise they are drawn.
    :param replayed: a trace with values of sites, which stay latent.
    :param init_loc_fn: Pyro's initialization of the other latents, in place of draws.
    :param validated: whether Pyro's validation applies, if the user has it on.
    """
    model = model if observed else poutine.uncondition(model)
    model = model if at is None else poutine.condition(model, dict(at))
    model = model if replayed is None else poutine.replay(model, trace=replayed)
    init = InitMessenger(partial(initial_value, init_loc_fn)) if init_loc_fn else nullcontext()
    unchecked = nullcontext() if validated else pyro.validation_enabled(False)
    with unchecked, poutine.block(), init:
        return poutine.trace(model).get_trace(*args, **(kwargs or {}))


@contextmanager
def quietly(warning: str = "") -> Iterator[None]:
    """Hides sites from outer handlers; without Pyro's validation, and warnings that begin so."""
    with hidden_sites(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=warning)
        yield


@contextmanager
def aside() -> Iterator[None]:
    """Evaluates a model :func:`quietly`, without gradients, and preserves the random state."""
    devices = range(torch.cuda.device_count())
    with quietly(), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield
