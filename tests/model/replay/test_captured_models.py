# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Gradients of many models by captures, beside those of calls: the same, or never replayed."""

import itertools
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_artransform._base.comparison import agree, of_reordered_sums
from pyro_artransform.model import LogJoint
from pyro_artransform.model.graphs.dependencies import value_and_gradient
from pyro_artransform.model.replay.capture import Captured

_NUM_CALLS = 40

Family = Callable[[Tensor], dist.TorchDistribution]
#: what a datum has, given a latent of any sign
LIKELIHOODS: dict[str, Family] = {
    "normal": lambda z: dist.Normal(z, 0.7),
    "poisson": lambda z: dist.Poisson(z.clamp(max=3.0).exp()),
    "student": lambda z: dist.StudentT(4.0, z, 1.0),
    "bernoulli": lambda z: dist.Bernoulli(logits=z),
    "gamma": lambda z: dist.Gamma(2.0, (-z).exp()),
}


def hierarchy(family: Family) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", 4):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", family(z), obs=torch.tensor([1.0, 1.0, 0.5, 1.0]).round())


def test_priors_that_were_made_before():
    """With checks of values, which read them, as the priors of ``PyroSample`` are."""
    pyro.enable_validation(True)
    prior = dist.Normal(0.0, 1.0).expand([3]).to_event(1)

    def model():
        pyro.sample("y", dist.Normal(pyro.sample("z", prior).sum(-1), 1.0), obs=torch.tensor(1.0))

    log_joint = LogJoint(model)
    captured = Captured(partial(value_and_gradient, log_joint))
    for _ in range(4):
        captured(torch.randn(5, 3))
    assert captured.can_replay
    assert captured.num_compared > 0
    assert prior._validate_args


def heavy_tails(family: Family) -> None:
    z = pyro.sample("z", dist.Cauchy(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", family(z.sum(-1)), obs=torch.tensor(1.0))


def random_walk(family: Family) -> None:
    z = pyro.sample("z0", dist.Normal(0.0, 1.0))
    for t in range(1, 6):
        z = pyro.sample(f"z{t}", dist.Normal(0.9 * z, 0.5))
        pyro.sample(f"y{t}", family(z), obs=torch.tensor(1.0))


def gaussian_process(family: Family) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))[..., None, None]
    x = torch.linspace(0.0, 1.0, 4)
    covariance = torch.exp(-((x - x[:, None]) ** 2) / length**2) + 0.1 * torch.eye(4)
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(4), covariance))
    pyro.sample("y", family(z.mean(-1)), obs=torch.tensor(1.0))


def mixture(family: Family) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    law = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 0.5))
    pyro.sample("x", law, obs=torch.tensor(0.3))
    pyro.sample("y", family(loc[..., 0]), obs=torch.tensor(1.0))


def regression(family: Family) -> None:
    rows = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.2, 0.1]])
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    eta = (rows @ b[..., None])[..., 0]
    pyro.sample("y", family(torch.where(eta > 0, eta, 0.1 * eta)).to_event(1), obs=torch.ones(3))


def enumerated(family: Family) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    pyro.sample("y", family(z + k), obs=torch.tensor(1.0))


def covariance(family: Family) -> None:
    tril = pyro.sample("tril", dist.LKJCholesky(3, 2.0))
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=torch.ones(3))
    pyro.sample("y", family(tril[..., 1, 0]), obs=torch.tensor(1.0))


SMOOTH = [
    *(hierarchy, heavy_tails, random_walk, gaussian_process, mixture),
    *(regression, enumerated, covariance),
]
CASES = {
    f"{model.__name__}, {family}": (model, family)
    for family, model in itertools.product(LIKELIHOODS, SMOOTH)
}
QUICK = [*itertools.islice(CASES, 0, None, 6)]


def check(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    model, family = CASES[name]
    log_joint = LogJoint(lambda: model(LIKELIHOODS[family]))
    calls = list[int]()

    def gradient(points: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return value_and_gradient(log_joint, points)

    captured = Captured(gradient)
    for _ in range(_NUM_CALLS):
        points = torch.randn(6, log_joint.latents.latent_dim)
        expected = value_and_gradient(log_joint, points)
        assert agree(captured(points), expected, 0.0, of_reordered_sums)
    assert captured.can_replay
    assert len(calls) < _NUM_CALLS


@pytest.mark.parametrize("name", QUICK)
def test_a_captured_gradient_is_that_of_calls(name: str) -> None:
    check(name, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_all_captured_gradients_are_those_of_calls(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)
