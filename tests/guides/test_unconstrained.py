# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A guide from two hooks, as in docs/extending.md."""

import copy

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

from pyro_artransform import AutoIAF, iaf
from pyro_artransform.guides import UnconstrainedGuide
from tests.guides import models
from tests.guides.test_contract import check_guide
from tests.guides.training import particles_agree, trains
from tests.inference.conftest import quick_fit


class LowRank(nn.Module):
    def __init__(self, loc, rank):
        super().__init__()
        self.loc = nn.Parameter(loc)
        self.log_scale = nn.Parameter(torch.full_like(loc, -2.0))
        self.factor = nn.Parameter(0.01 * torch.randn(len(loc), rank).to(loc))


class AutoLowRank(UnconstrainedGuide):
    def __init__(self, model, *, rank=2, **options):
        super().__init__(model, rank=rank, **options)

    def build(self, latents, start):
        return LowRank(start, self.arguments["rank"])

    def normal(self):
        q = self.transform
        return dist.LowRankMultivariateNormal(q.loc, q.factor, (2 * q.log_scale).exp())

    def draw(self, n, path=False):
        z = self.normal().rsample((n,))
        return z, self.log_density(z)

    def log_density(self, z):
        return self.normal().log_prob(z)


class AutoFlow(UnconstrainedGuide):
    """The module is a transform, from which draws and densities follow."""

    def build(self, latents, start):
        return iaf(latents.latent_dim, 1, 8).to(start)


def test_it_has_what_guides_have(tmp_path):
    guide, other = AutoLowRank(models.regression, rank=1), AutoLowRank(models.regression)
    trains(guide)
    trains(other, [guide])
    assert other._pyro_name == "AutoLowRank_1"
    particles_agree(models.regression, guide, models.data())
    assert guide.log_prob(guide.sample_posterior(5)).shape == (5,)
    guide.save(tmp_path / "guide")
    loaded = AutoLowRank.load(tmp_path / "guide")
    assert loaded.arguments["rank"] == 1
    for twin in (loaded, copy.deepcopy(guide)):
        pyro.set_rng_seed(0)
        expected = guide.rsample_and_log_prob(3)
        pyro.set_rng_seed(0)
        assert all(map(torch.equal, twin.rsample_and_log_prob(3), expected))
    draws = AutoLowRank(models.shapes).sample_posterior(4, models.data())
    assert {name: tuple(draws[name].shape[1:]) for name in models.SHAPES} == models.SHAPES


def test_hooks_that_are_missing():
    class DrawsOnly(AutoLowRank):
        log_density = UnconstrainedGuide.log_density

        def draw(self, n, path=False):
            z = self.normal().rsample((n,))
            return z, self.normal().log_prob(z)

    guide = DrawsOnly(models.regression)
    draws = guide.sample_posterior(5, models.data())
    with pytest.raises(NotImplementedError, match=r"DrawsOnly has no log_density\(z\)"):
        guide.log_prob(draws)
    with pytest.raises(NotImplementedError, match=r"UnconstrainedGuide has no build\("):
        UnconstrainedGuide(models.regression)(models.data())


def test_of_a_transform():
    check_guide(AutoFlow, models.regression, models.data())


def test_a_fit_trains_it():
    guide, other = AutoLowRank(models.regression), AutoIAF(models.regression)
    found = quick_fit(models.regression, guide, models.data(), num_steps=400, progress=False)
    expected = quick_fit(models.regression, other, models.data(), num_steps=400, progress=False)
    assert abs(found.log_evidence - expected.log_evidence) < 1.0


def test_draws_that_were_edited_have_the_density_of_their_values():
    guide = AutoFlow(models.regression)
    guide(models.data())
    name = f"_{guide._pyro_name}_latent"
    node = pyro.poutine.trace(guide).get_trace(models.data()).nodes[name]
    z, log_q = node["value"], node["fn"].log_prob(node["value"])
    assert torch.allclose(log_q, guide.log_density(z.clone()))
    with torch.no_grad():
        z += 1
        assert torch.allclose(node["fn"].log_prob(z), guide.log_density(z))


def test_a_module_that_cannot_draw_is_refused():
    class Network(UnconstrainedGuide):
        def build(self, latents, start):
            return torch.nn.Linear(1, len(start)).to(start)

    with pytest.raises(
        TypeError, match=r"Network: expected build to return a FlowModule, or .*draw"
    ):
        Network(models.regression)(models.data())
