# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits by batches of whole schools with their classes, and draws for schools that were not in the data."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.utils.data import DataLoader

from pyro_artransform import AutoAmortized
from pyro_artransform.posterior import predict
from tests.inference.conftest import quick_fit as fit

SCHOOLS, CLASSES, STUDENTS = 24, 2, 4
WITHIN = 0.25 + 1 / STUDENTS  # variance of the mean of a class given its school


def model(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", max(SCHOOLS, len(y)), subsample_size=len(y), dim=-3):
        u = pyro.sample("u", dist.Normal(mean, 0.7))
        with pyro.plate("classes", CLASSES, dim=-2):
            v = pyro.sample("v", dist.Normal(u, 0.5))
            with pyro.plate("students", STUDENTS, dim=-1):
                pyro.sample("y", dist.Normal(v, 1.0), obs=y)


def encoder(y):
    return {"schools": y.mean((1, 2))[:, None], "classes": y.mean(2)[..., None]}


@pytest.fixture(scope="module")
def fitted():
    y = 1 + torch.randn(SCHOOLS, CLASSES, STUDENTS, generator=torch.Generator().manual_seed(0))
    guide = AutoAmortized(model, encoder, flow=None, local_flow=None)
    loader = DataLoader(y, batch_size=8, shuffle=True)
    options = {"num_steps": 120, "num_particles": 8, "seed": 0, "progress": False}
    return y, fit(model, guide=guide, loader=loader, **options)


@pytest.mark.slow
def test_classes_in_schools(fitted):
    y, result = fitted
    assert result.trusted, result
    elements = result.elements["schools"]
    assert torch.equal(elements.index, torch.arange(SCHOOLS))
    assert elements.gap.max() < 0.02
    sizes = SCHOOLS, CLASSES, STUDENTS
    school = torch.arange(SCHOOLS).repeat_interleave(CLASSES * STUDENTS)
    room = torch.arange(SCHOOLS * CLASSES).repeat_interleave(STUDENTS)
    covariance = torch.eye(y.numel()) + 4.0
    covariance += 0.49 * (school[:, None] == school) + 0.25 * (room[:, None] == room)
    data = y.reshape(sizes).flatten()
    evidence = dist.MultivariateNormal(torch.zeros(len(data)), covariance).log_prob(data).item()
    assert result.log_evidence == pytest.approx(evidence, abs=0.1)


@pytest.mark.slow
def test_schools_that_were_not_in_the_data(fitted):
    """Given the mean, the posterior of a school is known; the encoder was never shown its data."""
    _, result = fitted
    new = fitted[0][:2] + torch.tensor([1.0, -0.5])[:, None, None]
    torch.manual_seed(0)
    draws = result.guide.sample_posterior(2_000, new)
    assert draws["v"].shape == (2_000, 2, CLASSES, 1)
    precision = 1 / 0.49 + CLASSES / WITHIN
    by_classes = new.mean(2).sum(1) / WITHIN
    exact = (draws["mean"][:, None] / 0.49 + by_classes) / precision
    sd = (1 / precision + exact.var(0)).sqrt()
    u = draws["u"].reshape(2_000, 2)
    assert ((u.mean(0) - exact.mean(0)).abs() < 0.15 * sd).all()
    assert ((u.std(0) / sd - 1).abs() < 0.1).all()
    predicted = predict(model, draws, new)["y"]
    assert predicted.shape == (2_000, *new.shape)
