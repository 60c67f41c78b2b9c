# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Guides with flows of Pyro that have no inverse, and with flows of Zuko."""

import copy
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import nn

from pyro_artransform import AutoAutoregressive, affine_autoregressive, fit, iaf
from tests.flows.transforms.test_foreign import WITHOUT_INVERSE, zuko_flow
from tests.guides import models
from tests.guides.test_contract import check_guide
from tests.guides.training import train, trains

ZUKO = {
    **{name: partial(zuko_flow, name) for name in ("MAF", "NSF", "RealNVP")},
    "transform": lambda d: zuko_flow("MAF", d).transform,
}


@pytest.mark.parametrize("flow", ZUKO.values(), ids=ZUKO)
def test_flows_of_zuko(flow):
    check_guide(lambda model: AutoAutoregressive(model, flow=flow), models.gaussian, models.data())


@pytest.mark.parametrize("flow", WITHOUT_INVERSE.values(), ids=WITHOUT_INVERSE)
def test_flows_without_an_inverse(flow):
    """They train, also by path gradients, and only the density of given values needs what they lack."""
    guide = AutoAutoregressive(models.gaussian, flow=flow)
    guide(models.data())
    values = guide.sample_posterior(4)
    torch.manual_seed(0)
    latent, log_q = guide.rsample_and_log_prob(5)
    torch.manual_seed(0)
    same, path = guide.rsample_and_log_prob(5, path=True)
    torch.testing.assert_close((same, path), (latent, log_q))
    assert all(g is not None for g in torch.autograd.grad(path.sum(), same, retain_graph=True))
    losses = train(copy.deepcopy(guide), 200, models.gaussian)
    assert sum(losses[-50:]) < sum(losses[:50])
    with pytest.raises(NotImplementedError, match="has no inverse, so only the densities"):
        guide.log_prob(values)


@pytest.mark.parametrize(
    "flow", [transforms.block_autoregressive, partial(zuko_flow, "MAF")], ids=["Pyro's", "Zuko's"]
)
def test_a_fit_is_as_good_as_with_a_flow_of_this_package(flow):
    evidence = []
    for make in (flow, partial(iaf, hidden_dims=8)):
        guide = AutoAutoregressive(models.regression, flow=make)
        result = fit(models.regression, guide, models.data(), seed=0, progress=False)
        evidence.append(result.log_evidence)
        # without hinges, far tails are too light with one seed in three, and k-hat is above 0.7
        assert result.marginals_trusted
        assert -0.01 <= result.log_evidence - result.elbo <= 0.03
    assert evidence[0] == pytest.approx(evidence[1], abs=0.02)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda d: affine_autoregressive(d + 1), r"expected shape \(\*, 3\), got"),
        (lambda d: transforms.planar(d + 1), "expected a flow of 2 coordinates.* fails there"),
        (lambda d: pytest.importorskip("zuko").flows.MAF(d, 2), "without a context.* fails there"),
        (lambda d: pytest.importorskip("zuko").flows.MAF(d + 1, 0), "expected a flow of 2 coord"),
    ],
    ids=["own dimension", "dimension", "context", "Zuko's dimension"],
)
def test_a_flow_that_does_not_fit_the_model(flow, message):
    with pytest.raises(ValueError, match=message):
        AutoAutoregressive(models.regression, flow=flow)(models.data())


def test_a_mixture_of_zuko_is_no_flow():
    flow = partial(zuko_flow, "GMM")
    with pytest.raises(TypeError, match="a transform that is a module, or a flow of Zuko, got GMM"):
        AutoAutoregressive(models.regression, flow=flow)(models.data())


class NotItsInverse(nn.Module):
    """A module that makes a transform whose inverse saturates, as some of Zuko's that bisect."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self):
        affine = dist.transforms.AffineTransform(0.0, self.scale)
        affine._inverse = lambda y: (y / self.scale).clamp(-2, 2)
        return affine


@pytest.mark.parametrize("name", ["NCSF", "GF"])
def test_flows_of_zuko_that_miss_normal_draws(name):
    """One is for angles, one searches an interval for its inverse."""
    guide = AutoAutoregressive(models.gaussian, flow=partial(zuko_flow, name))
    with pytest.warns(UserWarning, match=f"the two directions of {name} do not undo each other"):
        guide(models.data())


def test_two_directions_that_do_not_undo_each_other():
    guide = AutoAutoregressive(models.regression, flow=NotItsInverse)
    with pytest.warns(UserWarning, match=r"NotItsInverse do not undo each other: .* off by 0\.\d+"):
        guide(models.data())
    trains(guide)
