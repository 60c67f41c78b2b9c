# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Chains in the base space of a guide."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)

from pyro_artransform import AutoAmortized, AutoIAF, AutoStructuredFlow
from pyro_artransform.diagnostics.base_space import _affine, base_space, ensemble_of
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.joint.coordinates import non_centered
from pyro_artransform.sampling import End
from tests.diagnostics import conjugate
from tests.diagnostics.conjugate import PathGuide, path
from tests.sampling.densities import moments_are, nowhere, subsampled


def subject_of(model, guide):
    return ModelAndGuide.of(model, guide, (), {})


def _model():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    "make",
    [
        AutoIAF,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        partial(AutoIAF, coordinates="model"),
    ],
)
def test_the_base_space_is_that_of_the_guide(make):
    """The density that a transform gives is the guide's, an affine one as a matrix too."""
    guide = make(_model, init_scale=0.5)
    _, to_latent = base_space(subject_of(_model, guide))
    start = torch.randn(7, 3)
    latent, ladj = to_latent(start)
    expected = guide.get_posterior().log_prob(latent)
    assert torch.allclose(dist.Normal(0.0, 1.0).log_prob(start).sum(-1) - ladj, expected)


@pytest.mark.parametrize("is_affine", [True, False])
def test_an_affine_transform_becomes_a_matrix(is_affine):
    matrix, loc = torch.randn(3, 3), torch.randn(3)

    def transform(x):
        y = x if is_affine else x + 1e-3 * x**2
        ladj = torch.linalg.slogdet(matrix)[1].expand(len(x))
        return loc + y @ matrix, ladj

    x = torch.randn(5, 3)
    found = _affine(transform, x)
    assert (found is not None) == is_affine
    if found is not None:
        assert all(torch.allclose(*pair) for pair in zip(found(x), transform(x)))


def hand_written():
    pyro.sample("b", dist.Normal(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 3.0])).to_event(1))
    pyro.sample("a", dist.Normal(0.0, 1.0))


def test_a_guide_without_a_transform_is_taken_by_its_means_and_sds():
    _, to_latent = base_space(subject_of(_model, hand_written))
    latent, ladj = to_latent(torch.tensor([[0.0] * 3, [1.0] * 3]))
    # of 10,000 draws: within five standard errors
    expected = torch.tensor([1.0, 0.5, 3.0])
    assert ((latent[0] - torch.tensor([0.0, 0.0, 1.0])).abs() < 0.05 * expected).all()
    assert torch.allclose(latent[1] - latent[0], expected, rtol=0.05)
    assert torch.allclose(ladj, expected.log().sum(), atol=0.1)


@pytest.mark.parametrize(
    "make", [AutoIAF, AutoLowRankMultivariateNormal, AutoIAFNormal, lambda _: hand_written]
)
def test_chains_from_any_guide(make):
    found = ensemble_of(subject_of(_model, make(_model)), 400)
    assert found.run(400).is_enough(400)
    moments_are(found, torch.zeros(3), torch.ones(3))


def test_a_correlated_path_of_useless_weights():
    """The sds of a guide are all 30 % off, of which k-hat is beyond 1: chains need a few blocks."""
    found = ensemble_of(subject_of(partial(path, 100), PathGuide(100, 0.7)), 400)
    assert found.run(400).is_enough(400)
    assert found.num_trajectories < 300
    moments_are(found, torch.zeros(100), torch.ones(100))


def _rounded(model):
    """A guide so far away that round-off makes all its draws one: chains at it would agree."""
    return AutoNormal(
        model,
        init_loc_fn=init_to_value(values={"a": torch.tensor(0.0), "b": torch.full((2,), 1e20)}),
    )


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        (subsampled, AutoNormal, "one that sees all its data"),
        (conjugate.local_normals, AutoDelta, "got the same value of mean in all"),
        (_model, _rounded, "got the same value of b"),
        (
            nowhere,
            AutoDiagonalNormal,
            "at least 2 starting points with finite density and gradient, got 0",
        ),
    ],
)
def test_what_is_refused(model, guide, words):
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=words):
        ensemble_of(subject_of(model, guide(model))).run(1)


@pytest.mark.parametrize("make", [AutoIAF, AutoStructuredFlow, AutoAmortized])
def test_chains_keep_the_coordinates_of_the_model_where_the_user_wants_them(make, tmp_path):
    """Those of a guide from a file, too."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        with pyro.plate("elements", 8):
            pyro.sample("z", dist.Normal(torch.zeros(8), v.exp()))

    guide = make(model, coordinates="model")
    guide()
    guide.save(tmp_path / "guide")
    for each in (guide, make.load(tmp_path / "guide", model)):
        kept = ensemble_of(subject_of(model, each)).log_joint
        assert kept.coordinates is None
        assert non_centered(kept) is kept
    free = ensemble_of(subject_of(model, make(model))).log_joint
    assert non_centered(free.with_coordinates(None)).coordinates is not None


def test_a_funnel_from_a_gaussian_guide_is_in_units_of_the_prior():
    """A place and a scale, and no coordinates: the scale of z is exp(v), and of v one datum tells."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("z", dist.Normal(torch.zeros(8), v.exp()[..., None]).to_event(1))
        pyro.sample("y", dist.Normal(v, 2.0), obs=torch.tensor(-3.0))

    found = ensemble_of(subject_of(model, AutoNormal(model)), 400)
    assert found.run(400).is_enough(400)
    assert found.end is End.ENOUGH
    assert found.log_joint.coordinates.centered[0] == 1
    assert found.log_joint.coordinates.centered[1:].max() < 0.1
    v, precision = found.draws[..., 0], 1 / 9 + 1 / 4
    # 400 effective draws: 0.05 sd, and 4 % of an sd; three of each
    assert abs(v.mean() + 0.75 / precision) < 0.15 / precision**0.5
    assert abs(v.std() * precision**0.5 - 1) < 0.12
