# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models of mini-batches whose log density is a sum over rows, and others, which cannot be trusted."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import nn

from pyro_artransform import AutoAmortized, AutoIAF, fit
from pyro_artransform.inference.loader import Batch
from pyro_artransform.inference.minibatch_check import warn_of_no_sum
from tests.inference.conftest import quick_fit

N = 40
X = torch.linspace(-2.0, 3.0, N)
Y = 2 * X + 5 + torch.linspace(0.0, 7.0, N).sin()


def line(x, y, prepare=lambda x, y: (x, y)):
    slope, scale = (pyro.sample(name, dist.LogNormal(0.0, 1.0)) for name in ("slope", "scale"))
    x, y = prepare(x, y)
    with pyro.plate("rows", N, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(slope * x, scale), obs=y)


def centered(x, y):
    line(x, y, lambda x, y: (x, y - y.mean()))


def standardized(x, y):
    line(x, y, lambda x, y: ((x - x.mean()) / x.std(), y))


def improper(x, y):
    slope = pyro.sample("slope", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("rows", N, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def by_scale(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("known", dist.Normal(slope, 1.0), obs=torch.ones(()))
    with poutine.scale(scale=N / len(y)):
        pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


def factor_of_means(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=N / len(y)):
        pyro.factor("y", -len(y) * (y.mean() - slope * x.mean()) ** 2)


def latents_of_rows(x, y, decode=lambda z: z):
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(shared + decode(z).sum(-1), 1.0), obs=y)


def batch_norm(x, y):
    latents_of_rows(x, y, nn.BatchNorm1d(2, affine=False))


def dropout(x, y):
    latents_of_rows(x, y, nn.Dropout(0.5))


def prior_of_the_batch(x, y):
    with pyro.plate("rows", N, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(y.mean(), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def mixture(x, y):
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", N, subsample_size=len(y)):
        k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(3 * k, 1.0), obs=y)


def batches(size=10):
    return [Batch(pair, {}) for pair in zip(X.split(size), Y.split(size))]


def weights_of_the_batch(x, y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with (
        pyro.plate("rows", N, subsample_size=len(y)),
        poutine.scale(scale=x.exp() / x.exp().mean()),
    ):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def scale_of_the_batch(x, y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=1 / y.var()):
        pyro.sample("y", dist.Normal(loc + 0 * y, 1.0).to_event(1), obs=y)


def of_one_length(x, y):
    assert len(y) == 10
    centered(x, y)


def weighted(x, y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, subsample_size=len(y)), poutine.scale(scale=x.exp()):
        pyro.sample("y", dist.Delta(y, log_density=-((y - loc) ** 2)), obs=y)


def padded(x, y):
    is_row = x > -1
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scaled, masked = poutine.scale(scale=N / float(is_row.sum())), poutine.mask(mask=is_row)
    with pyro.plate("places", len(y)), scaled, masked:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


SUMS = line, improper, by_scale, latents_of_rows, mixture, weighted
OTHERS = (
    *(centered, standardized, factor_of_means, batch_norm, prior_of_the_batch),
    *(weights_of_the_batch, scale_of_the_batch, of_one_length),
)


@pytest.mark.parametrize("size", [1, 15])
@pytest.mark.parametrize("model", SUMS)
def test_sums_over_rows(model, size):
    assert warn_of_no_sum(model, batches(size)) == ()


def test_padded_rows_are_a_sum():
    assert warn_of_no_sum(padded, batches(20)) == ()


@pytest.mark.parametrize("model", OTHERS)
def test_what_is_no_sum_over_rows(model):
    state = torch.get_rng_state()
    with pytest.warns(
        UserWarning, match="not a sum over its rows.*Compute such statistics from all data"
    ):
        assert warn_of_no_sum(model, batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_mappings_and_nested_batches():
    def model(data, rows):
        line(data["x"], data["y"][0])
        assert rows == 10

    found = [
        Batch((), {"data": {"x": x, "y": [y]}, "rows": 10}) for x, y in (b.args for b in batches())
    ]
    assert warn_of_no_sum(model, found) == ()


@pytest.mark.parametrize("model", [dropout, lambda x, y: line(x.get(), y)])
def test_what_cannot_be_compared(model):
    """Random numbers of the model, or batches that cannot be joined."""

    class Rows:
        def __init__(self, x):
            self.get = lambda: x

    found = batches() if model is dropout else [Batch((Rows(x), y), {}) for (x, y), _ in batches()]
    assert warn_of_no_sum(model, found) is None


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("model", [centered, prior_of_the_batch])
def test_a_fit_warns_and_is_not_trusted(model):
    guide = AutoIAF(model, num_transforms=1, hidden_dims=4)
    if model is prior_of_the_batch:
        guide = AutoAmortized(model, lambda x, y: torch.stack([x, y], -1), coordinates="model")
    loader = [*zip(X.split(10), Y.split(10))]
    with pytest.warns(UserWarning, match="not a sum over its rows") as caught:
        result = fit(model, guide, loader=loader, num_steps=3, progress=False)
    assert caught[0].filename == __file__
    assert not result.trusted
    assert "not a sum over its rows" in result.verdict


@pytest.mark.parametrize("is_known", [True, False])
def test_a_trusted_fit_says_what_it_takes_for_granted(is_known):
    class Rows:
        def __init__(self, y):
            self.get = lambda: y

    def model(rows):
        y = rows if is_known else rows.get()
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", N, subsample_size=10):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    loader = Y.split(10) if is_known else [(Rows(y),) for y in Y.split(10)]
    result = quick_fit(model, loader=loader, numbers={}, progress=False, seed=0)
    assert result.trusted
    assert ("could not be checked" in result.verdict) == (not is_known)


def test_batches_half_of_an_epoch_apart_are_compared():
    """In the order of a file neighbours may have the same weights, whose mean is then the same."""
    weights = torch.where(torch.arange(N) < N // 2, 1.9, 0.1)

    def model(w, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N, subsample_size=len(y)):
            pyro.factor("y", -w / w.mean() * (y - loc) ** 2)

    found = [Batch(pair, {}) for pair in zip(weights.split(5), Y.split(5))]
    with pytest.warns(UserWarning, match="not a sum over its rows"):
        assert warn_of_no_sum(model, found)
