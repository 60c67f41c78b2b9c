# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0


import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_artransform import AutoIAF, AutoMAF
from pyro_artransform.inference.loader import Batch
from pyro_artransform.inference.optimization.objective import (
    PathObjective,
    PyroObjective,
    _robust_weights,
)
from pyro_artransform.model import LogJoint
from tests.inference import models
from tests.inference.models import small


def path(model, guide):
    guide.set_up()
    return PathObjective(LogJoint(model), guide)


def by_pyro(model, guide):
    guide()
    return PyroObjective(model, guide, Batch((), {}), LogJoint(model))


def gradients(objective, count):
    loss = objective.loss(count)
    return torch.autograd.grad(loss, list(objective.parameters().values()), allow_unused=True)


@pytest.mark.parametrize("kind", [AutoIAF, AutoMAF])
def test_gradient_vanishes_at_the_posterior(kind):
    """Draw by draw, where that of Pyro's ELBO has the noise of the score."""
    guide = kind(models.gaussian)
    objective = path(models.gaussian, guide)
    guide.start_at(torch.ones(3), torch.tensor(models.SCALE_TRIL))
    found = gradients(objective, 4)
    assert max(g.abs().max() for g in found if g is not None) < 1e-8
    noisy = gradients(by_pyro(models.gaussian, guide), 4)
    assert max(g.abs().max() for g in noisy if g is not None) > 1e-2


def test_gradient_away_from_the_posterior_is_that_of_pyro():
    guide = small(models.regression)
    ours, theirs = path(models.regression, guide), by_pyro(models.regression, guide)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    shift = guide.transform.transforms[1].loc
    sums = []
    for objective in (ours, theirs):
        draws = [torch.autograd.grad(objective.loss(200), shift)[0] for _ in range(40)]
        sums.append((torch.stack(draws).mean(0), torch.stack(draws).std(0) / 40**0.5))
    (a, a_se), (b, b_se) = sums
    assert ((a - b).abs() < 4 * (a_se + b_se)).all()
    assert a.abs().max() > 10 * a_se.max()


@pytest.mark.parametrize(
    ("name", "make"),
    [("regression", path), ("scaled", by_pyro), ("scaled", path), ("masked", by_pyro)],
)
def test_loss_is_the_negative_elbo(name, make):
    model = getattr(models, name)
    guide = small(model)
    objective = make(model, guide)
    elbo = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        expected = torch.tensor([elbo.loss(model, guide) for _ in range(10)])
        found = torch.stack([objective.loss(500).detach() for _ in range(10)])
    noise = (expected.var() + found.var()).sqrt() / 10**0.5
    assert abs(expected.mean() - found.mean()) < 4 * noise
    draws = objective.elbo_draws(5000)
    assert len(draws) > 1
    assert abs(draws.mean() + expected.mean()) < 4 * noise + 4 * draws.std() / len(draws) ** 0.5
    assert not draws.requires_grad


def test_masked_latents_do_not_run_away():
    """Elements without a density have their prior, for Pyro's ELBO too: it has a maximum."""
    guide = AutoNormal(models.partly_observed)
    objective = by_pyro(models.partly_observed, guide)
    named = objective.parameters().items()
    (scale,) = [p for name, p in named if "scales" in name and "unobserved" in name]
    losses = []
    for _ in range(3):
        losses.append(-objective.elbo_draws(640).mean())
        with torch.no_grad():
            scale[models.data() > 0] += 5.0  # what is observed, and so stands for nothing here
    assert losses[0] < losses[1] < losses[2]


def _mixes_draws():
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.3))


def _guide_that_mixes_draws():
    loc = pyro.param("its_loc", torch.tensor(3.0))
    first = pyro.sample("loc", dist.Normal(loc, 0.1))
    pyro.sample("scale", dist.LogNormal(first.sum(), 1.0))


def _fails_for_some_draws():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("root", (z + 0.02).sqrt())


@pytest.mark.parametrize(
    ("model", "guide", "expected"),
    [
        (models.regression, None, True),
        (_fails_for_some_draws, None, True),
        (models.branching, None, False),
        (_mixes_draws, None, False),
        (models.regression, _guide_that_mixes_draws, False),
    ],
)
def test_vectorized_where_model_and_guide_allow(model, guide, expected):
    with pyro.validation_enabled(False):
        assert by_pyro(model, guide or AutoNormal(model)).is_vectorized == expected


def test_draws_that_are_not_finite_are_the_guides_own_fault():
    guide = small(models.regression)
    objective = path(models.regression, guide)
    with torch.no_grad():
        guide.transform.transforms[1].loc.fill_(torch.nan)
    objective.loss(4)
    assert objective.nonfinite_sites() == ["the guide's own draws"]


def test_loss_for_the_tails():
    """The value is the negative ELBO, the gradient vanishes at the posterior, and only there."""
    guide = small(models.gaussian)
    objective = path(models.gaussian, guide)
    assert objective.tail_loss(8)[1] == 16
    guide.start_at(torch.ones(3), torch.tensor(models.SCALE_TRIL))
    trained = list(objective.parameters().values())
    found = torch.autograd.grad(objective.tail_loss(16)[0], trained, allow_unused=True)
    assert max(g.abs().max() for g in found if g is not None) < 1e-8
    guide.start_at(torch.ones(3), 0.7 * torch.tensor(models.SCALE_TRIL))
    state = torch.get_rng_state()
    losses = torch.stack([objective.tail_loss(16)[0].detach() for _ in range(50)])
    torch.set_rng_state(state)
    assert torch.allclose(losses.mean(), objective.loss(50 * 32).detach(), atol=0.1)
    scale = guide.transform.transforms[1].log_scale
    (pulled,) = torch.autograd.grad(objective.tail_loss(1000)[0], scale)
    (plain,) = torch.autograd.grad(objective.loss(2000), scale)
    assert (pulled < 1.2 * plain).all()
    assert (plain < 0).all()


def test_robust_loss(monkeypatch):
    """The value is the negative ELBO; the gradient vanishes at the posterior, draws far out count less."""
    guide = small(models.gaussian)
    objective = path(models.gaussian, guide)
    guide.start_at(torch.ones(3), torch.tensor(models.SCALE_TRIL))
    trained = list(objective.parameters().values())
    found = torch.autograd.grad(objective.robust_loss(16), trained, allow_unused=True)
    assert max(g.abs().max() for g in found if g is not None) < 1e-8
    guide.start_at(torch.ones(3), 0.7 * torch.tensor(models.SCALE_TRIL))
    (pulled,) = torch.autograd.grad(
        objective.robust_loss(1000), guide.transform.transforms[1].log_scale
    )
    assert (pulled < 0).all()
    # distances 2, 1, 0, 1 and 99 from the median, whose median is 1
    terms = torch.tensor([-1.0, 0.0, 1.0, 2.0, 100.0], requires_grad=True)
    monkeypatch.setattr(type(objective._terms), "__call__", lambda *_: terms)
    loss = objective._terms.mean(5, _robust_weights)
    assert loss.item() == pytest.approx(20.4)
    (weights,) = torch.autograd.grad(loss, terms)
    torch.testing.assert_close(5 * weights, torch.tensor([1.0, 1.0, 1.0, 1.0, 3 / 99]))
    # near the optimum no draw is far out
    terms = (0.004 * terms.detach()).requires_grad_()
    (weights,) = torch.autograd.grad(objective._terms.mean(5, _robust_weights), terms)
    torch.testing.assert_close(5 * weights, torch.ones(5))
