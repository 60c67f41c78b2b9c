# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The latent vector of values that a user gives."""

import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to

from pyro_artransform.joint import Latents
from tests.guides import models


@pytest.fixture
def latents():
    return Latents.from_trace(poutine.trace(models.shapes).get_trace(models.data()))


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_there_and_back(latents, batch):
    latent = torch.randn(*batch, latents.latent_dim)
    values = latents.constrain(latent)
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        name: batch + shape for name, shape in models.SHAPES.items()
    }
    for name, value in values.items():
        assert latents.sites[name].support.check(value).all()
    back, ladj = latents.unconstrain_with_ladj(values)
    assert torch.allclose(back, latent)
    assert ladj.shape == batch


def test_log_determinant(latents):
    latent = torch.randn(latents.latent_dim)
    total = 0.0
    for name, z in latents.split(latent).items():
        bijection = biject_to(latents.sites[name].support)
        total = total + bijection.log_abs_det_jacobian(z, bijection(z)).sum()
    _, ladj = latents.unconstrain_with_ladj(latents.constrain(latent))
    assert torch.allclose(ladj, total)


def test_bad_values(latents):
    values = latents.constrain(torch.zeros(5, latents.latent_dim))
    with pytest.raises(ValueError, match=r"expected the sites .*'unit'.* got"):
        latents.unconstrain_with_ladj({k: v for k, v in values.items() if k != "unit"})
    with pytest.raises(ValueError, match=r"expected 'row' of shape \(5, 4\), got \(3, 4\)"):
        latents.unconstrain_with_ladj({**values, "row": values["row"][:3]})
    with pytest.raises(ValueError, match=r"expected 'probs' of shape \(3,\), got \(2,\)"):
        latents.unconstrain_with_ladj({**values, "probs": values["probs"][0, :2]})


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_arrays_and_lists(latents, convert):
    values = latents.constrain(torch.randn(5, latents.latent_dim))
    expected = latents.unconstrain_with_ladj(values)
    got = latents.unconstrain_with_ladj({k: convert(v) for k, v in values.items()})
    assert all(map(torch.equal, got, expected))
    for bad in ("high", [[1.0], [1.0, 2.0]]):
        with pytest.raises(
            ValueError, match=r"values\['unit'\]: expected an array of numbers, got"
        ):
            latents.unconstrain_with_ladj({**values, "unit": bad})


@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
def test_no_draws(latents, batch):
    values = latents.constrain(torch.zeros(*batch, latents.latent_dim))
    latent, ladj = latents.unconstrain_with_ladj(values)
    assert latent.shape == (*batch, latents.latent_dim)
    assert ladj.shape == batch


def test_values_outside_the_support(latents):
    values = latents.constrain(torch.zeros(5, latents.latent_dim))
    outside = {**values, "cell": values["cell"].clone()}
    outside["cell"][3, 1, 2] = 1.5
    message = r"expected 'cell' inside its support Interval\(.*\), got 1.5"
    with pytest.raises(ValueError, match=message):
        latents.unconstrain_with_ladj(outside)
    pyro.enable_validation(False)
    assert latents.unconstrain_with_ladj(outside)[1].shape == (5,)
