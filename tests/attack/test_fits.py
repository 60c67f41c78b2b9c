# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Short fits with random options, stopped by anything at any time, on loaders of every kind."""

import math
import signal
import time
import warnings
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import strategies as st
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_artransform import AutoMAF
from pyro_artransform.inference.optimization.training import FitError
from tests.attack.effort import attack
from tests.inference import loaders, models
from tests.inference.conftest import QUICK, quick_fit

GUIDES = {
    "iaf": models.small,
    "maf": partial(AutoMAF, num_transforms=1, hidden_dims=4),
    "stock": AutoNormal,
}


def parameters():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def fitted(guide, model=models.regression, **options):
    """A fit in an empty store, as in a new process."""
    pyro.clear_param_store()
    options = {"num_particles": 4, "progress": False, "numbers": QUICK, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quick_fit(model, GUIDES[guide](model), **options)


@cache
def uninterrupted(guide, num_steps, seed):
    began = time.perf_counter()
    result = fitted(guide, num_steps=num_steps, seed=seed)
    return result, parameters(), time.perf_counter() - began


every_guide = st.sampled_from(sorted(GUIDES))
steps = st.integers(5, 40)


class Stop(Exception):
    pass


@attack(
    few=2,
    guide=every_guide,
    num_steps=steps,
    at=st.integers(1, 40),
    how=st.sampled_from(["raise", "stop", "interrupt"]),
)
def test_callbacks_that_do_anything(guide, num_steps, at, how):
    whole, *_ = uninterrupted(guide, num_steps, 0)

    def callback(step, elbo):
        if step != at:
            return None
        if how == "raise":
            raise Stop
        if how == "interrupt":
            signal.raise_signal(signal.SIGINT)
        return how == "stop"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    options = {"num_steps": num_steps, "seed": 0, "callback": callback}
    try:
        if how == "raise" and at <= num_steps:
            with pytest.raises(Stop):
                fitted(guide, **options)
        else:
            result = fitted(guide, **options)
            assert result.history == whole.history[: len(result.history)]
            assert result.num_steps == min(at, num_steps)
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(p.isfinite().all() for p in parameters().values())


class Faulty:
    """A model that is NaN in some of its runs."""

    def __init__(self, at):
        self.at, self.runs = at, 0

    def __call__(self):
        self.runs += 1
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 6):
            bad = torch.nan if self.runs in self.at else 0.0
            pyro.sample("y", dist.Normal(loc + bad, scale, validate_args=False), obs=models.data())


@attack(
    few=2,
    guide=every_guide,
    at=st.sets(st.integers(20, 120), max_size=30),
    num_steps=st.integers(30, 60),
)
def test_nan_at_any_run(guide, at, num_steps):
    """Parameters stay finite, and what was skipped is counted and has no ELBO in the history."""
    try:
        result = fitted(guide, model=Faulty(at), num_steps=num_steps, seed=0)
    except FitError:
        return
    except ValueError as error:  # all of its starts met NaN
        assert "finite log density near the initial values" in str(error)  # noqa: PT017
        return
    assert all(p.isfinite().all() for p in parameters().values())
    assert sum(map(math.isnan, result.history)) == result.num_skipped
    assert result.num_steps == num_steps == len(result.history)
    if result.trusted:
        assert math.isfinite(result.elbo)
        assert result.num_skipped <= 0.1 * num_steps


class Rows(IterableDataset):
    def __init__(self, *tensors):
        self.tensors = tensors

    def __iter__(self):
        return iter(zip(*self.tensors))


class Bare:
    """Begins anew, and has neither a length nor anything else."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def as_dicts(x, y):
    return [{"x": a, "y": b} for a, b in loaders.listed(x, y)]


LOADERS = {
    **loaders.KNOWN,
    "iterable data set": lambda *t: DataLoader(Rows(*t), batch_size=10),
    "bare": lambda *t: Bare(loaders.listed(*t)),
    "unknown": loaders.Unknown,
    "mappings": as_dicts,
    "drop last": lambda *t: loaders.shuffled(*t, drop_last=True),
    "one batch": lambda *t: DataLoader(TensorDataset(*t), batch_size=loaders.SIZE),
    "empty": lambda *t: [],
    "empty data": lambda *t: DataLoader(Rows(*(v[:0] for v in t)), batch_size=10),
}


@attack(
    few=2,
    kind=st.sampled_from(sorted(LOADERS)),
    guide=every_guide,
    epochs=st.integers(1, 6),
    at=st.one_of(st.none(), st.integers(1, 25)),
)
def test_loaders(kind, guide, epochs, at):
    """The same steps twice, also if a callback ends the second fit."""

    def run(**options):
        return fitted(
            guide, model=loaders.regression, loader=LOADERS[kind](*loaders.rows()), **options
        )

    if kind.startswith("empty"):
        with pytest.raises(ValueError, match="at least one batch"):
            run(epochs=epochs)
        return
    whole = run(epochs=epochs, seed=1)
    assert not whole.trusted or kind in (*loaders.KNOWN, "one batch")
    length = len(loaders.listed(*loaders.rows()))
    counts = {"one batch": 1, "drop last": length - 1}
    assert whole.num_steps == epochs * counts.get(kind, length)
    part = run(epochs=epochs, seed=1, callback=lambda step, _: step == at)
    assert part.num_steps == min(at or whole.num_steps, whole.num_steps)
    assert part.history == whole.history[: part.num_steps]
