# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to

from pyro_artransform.guides.sites import packing
from pyro_artransform.guides.sites.records import is_hidden, latent_sites, slim_trace
from tests.guides import models


@pytest.fixture
def prototype():
    trace = poutine.trace(poutine.block(models.shapes, is_hidden)).get_trace(models.data())
    return slim_trace(trace, torch.clone)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_there_and_back(prototype, batch):
    sites = latent_sites(prototype)
    latent = torch.randn(*batch, _size(prototype))
    values = packing.constrain(prototype, latent)
    assert {name: tuple(v.shape) for name, v in values.items()} == {
        name: batch + shape for name, shape in models.SHAPES.items()
    }
    for name, value in values.items():
        assert sites[name]["fn"].support.check(value).all()
    back, ladj = packing.unconstrain(prototype, values)
    assert torch.allclose(back, latent)
    assert ladj.shape == batch


def test_log_determinant(prototype):
    latent = torch.randn(_size(prototype))
    total = 0.0
    for site, z in packing.split(prototype, latent):
        bijection = biject_to(site["fn"].support)
        total = total + bijection.log_abs_det_jacobian(z, bijection(z)).sum()
    _, ladj = packing.unconstrain(prototype, packing.constrain(prototype, latent))
    assert torch.allclose(ladj, total)


def test_bad_values(prototype):
    values = packing.constrain(prototype, torch.zeros(5, _size(prototype)))
    with pytest.raises(ValueError, match=r"expected the sites .*'unit'.* got"):
        packing.unconstrain(prototype, {k: v for k, v in values.items() if k != "unit"})
    with pytest.raises(ValueError, match=r"expected 'row' of shape \(5, 4\), got \(3, 4\)"):
        packing.unconstrain(prototype, {**values, "row": values["row"][:3]})
    with pytest.raises(ValueError, match=r"expected 'probs' of shape \(3,\), got \(2,\)"):
        packing.unconstrain(prototype, {**values, "probs": values["probs"][0, :2]})


def _size(prototype):
    return sum(packing.unconstrained_shape(s).numel() for s in latent_sites(prototype).values())


def test_quantiles_by_columns(monkeypatch):
    draws = torch.randn(1001, 3, 4)
    levels = torch.tensor([0.0, 0.3, 1.0])
    expected = torch.quantile(draws, levels, dim=0)
    for numbers in (2**23, 2500, 10):
        monkeypatch.setattr(packing, "_QUANTILE_NUMBERS", numbers)
        assert torch.equal(packing.quantiles_of(draws, levels), expected)
    assert packing.quantiles_of(draws[:, 0, 0], levels).shape == (3,)


@pytest.mark.parametrize("levels", [[-0.1], [0.5, 1.1], [float("nan")], []])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match="expected numbers between 0 and 1, got"):
        packing.check_levels(levels, torch.zeros(()))


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_arrays_and_lists(prototype, convert):
    values = packing.constrain(prototype, torch.randn(5, _size(prototype)))
    expected = packing.unconstrain(prototype, values)
    got = packing.unconstrain(prototype, {k: convert(v) for k, v in values.items()})
    assert all(map(torch.equal, got, expected))
    for bad in ("high", [[1.0], [1.0, 2.0]]):
        with pytest.raises(
            ValueError, match=r"values\['unit'\]: expected an array of numbers, got"
        ):
            packing.unconstrain(prototype, {**values, "unit": bad})


@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
def test_no_draws(prototype, batch):
    values = packing.constrain(prototype, torch.zeros(*batch, _size(prototype)))
    latent, ladj = packing.unconstrain(prototype, values)
    assert latent.shape == (*batch, _size(prototype))
    assert ladj.shape == batch


def test_values_outside_the_support(prototype):
    values = packing.constrain(prototype, torch.zeros(5, _size(prototype)))
    outside = {**values, "cell": values["cell"].clone()}
    outside["cell"][3, 1, 2] = 1.5
    message = r"expected 'cell' inside its support Interval\(.*\), got 1.5"
    with pytest.raises(ValueError, match=message):
        packing.unconstrain(prototype, outside)
    pyro.enable_validation(False)
    assert packing.unconstrain(prototype, outside)[1].shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quantiles_in_half_precision(dtype):
    draws = torch.randn(1001, 3).to(dtype)
    levels = packing.check_levels([0.05, 0.95], draws)
    assert torch.equal(levels, torch.tensor([0.05, 0.95], dtype=torch.float32))
    found = packing.quantiles_of(draws, levels)
    assert found.dtype == dtype
    assert torch.equal(found, torch.quantile(draws.float(), levels, dim=0).to(dtype))
