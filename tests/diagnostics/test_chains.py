# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
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
from pyro_artransform.diagnostics import base_space, chains
from pyro_artransform.diagnostics.chains import CHAINS_BY_LOOP, GOOD_RHAT, GuideChains
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.joint.coordinates import non_centered
from pyro_artransform.time_limit import TimeLimit
from tests.diagnostics import conjugate
from tests.diagnostics.conjugate import PathGuide, path


def chains_of(model, guide, *args, **options):
    return GuideChains(ModelAndGuide.of(model, guide, args, {}), **options)


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
    subject = ModelAndGuide.of(_model, guide, (), {})
    _, to_latent, start, _ = base_space.base_space(subject, 7)
    assert start.shape == (7, 3)
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
    found = base_space._affine(transform, x)
    assert (found is not None) == is_affine
    if found is not None:
        assert all(torch.allclose(*pair) for pair in zip(found(x), transform(x)))


def hand_written():
    pyro.sample("b", dist.Normal(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 3.0])).to_event(1))
    pyro.sample("a", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    "guide", [hand_written, AutoNormal(_model), AutoLowRankMultivariateNormal(_model)]
)
def test_a_guide_without_a_transform_is_taken_by_its_means_and_sds(guide):
    subject = ModelAndGuide.of(_model, guide, (), {})
    _, to_latent, start, _ = base_space.base_space(subject, 2000)
    # of 10,000 draws: within five standard errors
    assert start.mean(0).abs().max() < 5 / 2000**0.5
    assert (start.std(0) - 1).abs().max() < 5 / 4000**0.5
    latent, ladj = to_latent(start)
    if guide is hand_written:
        expected = torch.tensor([1.0, 0.5, 3.0])
        assert torch.allclose(latent.std(0), expected, rtol=0.1)
        assert torch.allclose(ladj, expected.log().sum(), atol=0.1)


def test_numbers_of_chains():
    assert chains_of(_model, AutoNormal(_model)).num_chains == 64
    assert chains_of(_model, AutoNormal(_model), num_chains=5).num_chains == 5

    def branching():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample(
            "y", dist.Normal(z, 1.0 if float(z.detach()) > 0 else 2.0), obs=torch.tensor(0.3)
        )

    assert chains_of(branching, AutoNormal(branching)).num_chains == CHAINS_BY_LOOP


def test_chains_go_on_until_there_are_enough_draws():
    guide = AutoNormal(_model, init_scale=0.3)
    found = chains_of(_model, guide)
    convergence = found.run(1000)
    assert convergence.is_enough(1000)
    assert min(convergence.bulk.min(), convergence.tail.min()) > 500
    assert float(convergence.rhat.max()) <= GOOD_RHAT
    count, size, dim = found.draws.shape
    assert (count, dim) == (64, 3)
    # in a base space that is three times too narrow masses are learned: a few trajectories a draw
    assert size < 200
    flat = found.draws.flatten(0, 1)
    assert (flat.mean(0).abs() < 5 / convergence.bulk.sqrt()).all()
    assert ((flat.std(0) - 1).abs() < 5 / (2 * convergence.tail).sqrt()).all()
    more = found.run(3000)
    assert more.is_enough(3000)
    assert found.draws.shape[1] > size


def test_proposals_of_a_guide_forget_the_guide_first():
    """The variance of its own draws is 0.77: the first draws that are kept have more."""
    found = chains_of(_model, AutoNormal(_model, init_scale=0.88), num_chains=4000)
    assert found._by_guide
    found.warm_up()
    found.extend(1)
    # 12,000 values: within five standard errors
    assert abs(found.draws.var() - 1) < 5 * (2 / 12_000) ** 0.5


def test_a_correlated_path_of_useless_weights():
    """The sds of a guide are all 30 % off, of which k-hat is beyond 1: chains need a few blocks."""
    found = chains_of(partial(path, 100), PathGuide(100, 0.7))
    convergence = found.run(400)
    assert convergence.is_enough(400)
    flat = found.draws.flatten(0, 1)
    assert (flat.mean(0).abs() < 5 / convergence.bulk.sqrt()).all()
    assert ((flat.std(0) - 1).abs() < 5 / (2 * convergence.tail).sqrt()).all()
    assert found.draws.shape[1] < 150


def two_modes(dim):
    """Six units from the origin in each coordinate."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
    locs = 6 * torch.tensor([[-1.0], [1.0]]).expand(2, dim)
    parts = dist.Normal(locs, 1.0).to_event(1).log_prob(z.unsqueeze(-2))
    pyro.factor("target", parts.logsumexp(-1))


def between(dim):
    pyro.sample("z", dist.Normal(0.0, torch.full((dim,), 6.0)).to_event(1))


def test_chains_change_between_modes_that_the_guide_covers():
    """By its draws, which are proposals: no trajectory gets from one to the other."""
    found = chains_of(two_modes, between, 1, num_chains=16)
    convergence = found.run(400)
    assert convergence.is_enough(400)
    # of 400 effective draws half are on each side, within four standard errors
    assert abs(float((found.draws > 0).double().mean()) - 0.5) < 0.1


def test_chains_that_do_not_agree_end_all_the_same():
    """In eight dimensions no draw of the guide is accepted."""
    found = chains_of(two_modes, between, 8, num_chains=16)
    convergence = found.run(100, most=150)
    assert not convergence.is_enough(100)
    assert float(convergence.rhat.max()) > 1.5
    assert found.stay_apart()
    # what was learned anew, and what was kept
    assert found.draws.shape[1] <= 150


def test_is_over():
    """Nothing is enough, but there is a draw of each chain, of which nothing is known."""
    found = chains_of(_model, AutoNormal(_model))
    with TimeLimit() as limit:
        limit.interrupt()
        convergence = found.run(100)
    assert found.draws.shape == (64, 1, 3)
    assert not convergence.is_enough(1)
    assert (convergence.rhat == math.inf).all()


def test_starts_without_a_density_are_those_of_other_chains():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("wall", torch.where(z[..., 0] > 0, torch.nan, 0.0))

    located = init_to_value(values={"z": -0.5 * torch.ones(2)})
    with pyro.validation_enabled(False):
        found = chains_of(model, AutoNormal(model, init_loc_fn=located, init_scale=0.5))
        convergence = found.run(400)
    assert convergence.is_enough(400)
    flat = found.draws.flatten(0, 1)
    assert (flat[:, 0] <= 0).all()
    mean = -((2 / math.pi) ** 0.5)
    assert abs(flat[:, 0].mean() - mean) < 5 * (1 - mean**2) ** 0.5 / convergence.bulk[0] ** 0.5


def _subsampled():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=2) as indices:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(10)[indices])


def _nowhere():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("wall", torch.where(z[..., 0] > -9, torch.nan, 0.0))


def _rounded(model):
    """A guide so far away that round-off makes all its draws one: chains at it would agree."""
    return AutoNormal(
        model,
        init_loc_fn=init_to_value(values={"a": torch.tensor(0.0), "b": torch.full((2,), 1e20)}),
    )


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        (_subsampled, AutoNormal, "one that sees all its data"),
        (conjugate.local_normals, AutoDelta, "one value of mean in all"),
        (_model, _rounded, "one value of b"),
        (_nowhere, AutoDiagonalNormal, "at least 64 draws of finite density"),
    ],
)
def test_what_is_refused(model, guide, words):
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=words):
        chains_of(model, guide(model))


def test_flows_of_pyro():
    """Their transform, in whose base space the posterior is no Gaussian."""
    guide = AutoIAFNormal(_model, hidden_dim=[8])
    assert chains_of(_model, guide).run(400).is_enough(400)


@pytest.mark.parametrize(
    ("num_samples", "num_chains"), [(50, 16), (400, 33), (1000, 64), (math.inf, 64)]
)
def test_few_draws_are_of_few_chains(num_samples, num_chains):
    """Each needs so many draws that chains agree, whatever their number is."""
    found = chains_of(_model, AutoNormal(_model), num_samples=num_samples)
    assert found.num_chains == num_chains


@pytest.mark.parametrize(
    ("by_length", "length"),
    [
        ({1: 3.0, 4: 1.0}, 4),  # longer ones agree
        ({1: 3.0, 4: 5.0}, 1),  # are slower: back to shorter ones, which learn once more
        ({1: 1.2}, 1),  # agree after some more of them
    ],
    ids=["longer", "not longer", "patience"],
)
def test_slow_chains_take_longer_trajectories(by_length, length, monkeypatch):
    """R-hat of a first block is given, and falls as it does for chains that mix."""
    slow = chains_of(_model, AutoNormal(_model), num_chains=4)
    slow._by_guide = False

    def rhat(draws):
        excess = by_length[slow._chains.length] ** 2 - 1
        value = (1 + excess * 96 / max(draws.shape[1], 96)) ** 0.5
        return torch.full(draws.shape[-1:], value)

    monkeypatch.setattr(chains, "plain_rhat", rhat)
    slow.run(10)
    assert slow._chains.length == length
    # those that are no better end long before the others would
    assert slow.num_trajectories <= (1000 if by_length[1] > 2 else 2000)
    assert (float(rhat(slow.draws).max()) <= GOOD_RHAT) == (min(by_length.values()) < 2)


def _funnel():
    """The scale of z is exp(v); one datum says how large v is."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("z", dist.Normal(torch.zeros(8), v.exp()[..., None]).to_event(1))
    pyro.sample("y", dist.Normal(v, 2.0), obs=torch.tensor(-3.0))


def test_chains_that_do_not_agree_go_on_in_units_of_the_prior():
    """Chains of a funnel as it is written do not enter its neck; v is normal, whatever z is."""
    stuck = chains_of(_funnel, AutoIAF(_funnel, coordinates={"z": 1.0}), num_chains=32)
    stuck._by_guide = False
    found = stuck.run(400)
    assert stuck.log_joint.coordinates.centered.tolist() == [1.0] + [0.0] * 8
    assert found.is_enough(400)
    v = stuck.draws[..., 0]
    precision = 1 / 9 + 1 / 4
    # 400 effective draws: 0.05 sd, and 4 % of an sd; three of each
    assert abs(v.mean() + 0.75 / precision) < 0.15 / precision**0.5
    assert abs(v.std() * precision**0.5 - 1) < 0.12
    # they are there now
    assert not stuck._move_to_units_of_prior()


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
        kept = chains_of(model, each, num_chains=4)
        assert kept.log_joint.coordinates is None
        assert non_centered(kept.log_joint) is kept.log_joint
    free = chains_of(model, make(model), num_chains=4)
    assert non_centered(free.log_joint.with_coordinates(None)).coordinates is not None


def test_chains_go_back_from_units_of_the_prior_that_are_no_better(monkeypatch):
    """R-hat of chains as the model is written is bad, and in units of the prior worse."""
    slow = chains_of(_funnel, AutoIAF(_funnel, coordinates={"z": 1.0}), num_chains=4)
    slow._by_guide, seen = False, []
    before = slow.log_joint

    def rhat(draws):
        seen.append(slow.log_joint is not before)
        return torch.full(draws.shape[-1:], 20.0 if seen[-1] else 5.0)

    monkeypatch.setattr(chains, "plain_rhat", rhat)
    slow.run(10, most=1000)
    assert any(seen)
    assert slow.log_joint is before
    # those of the units of the prior count as well
    assert slow.target.num_gradients > 4 * slow.num_trajectories
