# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_artransform import AutoIAF, AutoMAF
from pyro_artransform.inference.loader import Batch, BatchStream
from pyro_artransform.inference.optimization import minibatches
from pyro_artransform.inference.optimization.minibatches import (
    NUM_VALIDATION,
    MinibatchObjective,
    _mean_and_error,
)
from pyro_artransform.inference.optimization.objective import PathObjective, PyroObjective
from pyro_artransform.model import LogJoint
from tests.inference import loaders, models
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


def test_parameters_of_guide_and_model():
    guide = small(models.with_param)
    objective = path(models.with_param, guide)
    found = objective.parameters()
    own = {f"guide.{name}" for name, _ in guide.named_parameters()}
    assert set(found) == own | {"noise"}
    assert all(p.requires_grad and p.is_leaf for p in found.values())
    assert len({id(p) for p in found.values()}) == len(found)
    # the same objects each time: an optimizer holds them
    assert all(p is found[name] for name, p in objective.parameters().items())
    assert gradients(objective, 4)[list(found).index("noise")].abs() > 0


def test_parameters_of_modules_and_functions():
    decoder = models.Decoder()
    for make, guide in ((path, small(decoder)), (by_pyro, AutoNormal(decoder))):
        objective = make(decoder, guide)
        names = set(objective.parameters())
        assert {"linear.weight", "linear.bias"} <= {name.split("$$$")[-1] for name in names}
        assert not objective.is_guide_alone()
    objective = by_pyro(models.regression, models.hand_written)
    assert set(objective.parameters()) == {"its_loc", "its_scale"}
    assert objective.is_guide_alone()


def test_enumerated_model():
    guide = AutoNormal(poutine.block(models.mixture, hide=["kind"]))
    for objective in (by_pyro(models.mixture, guide), path(models.mixture, small(models.mixture))):
        assert objective.parameters()
        assert objective.elbo_draws(64).isfinite().all()
        for count in (1, 8):
            assert all(g.isfinite().all() for g in gradients(objective, count) if g is not None)


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


@pytest.mark.parametrize("make", [path, by_pyro])
def test_nonfinite_sites(make):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("fine", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        pyro.factor("broken", torch.where(z > 0, z, torch.nan))

    with pyro.validation_enabled(False):
        objective = make(model, small(model))
    while objective.loss(16).isfinite():
        pass
    assert objective.nonfinite_sites() == ["broken"]
    objective = make(models.regression, small(models.regression))
    objective.loss(4)
    assert objective.nonfinite_sites() == []


def test_draws_that_are_not_finite_are_the_guides_own_fault():
    guide = small(models.regression)
    objective = path(models.regression, guide)
    with torch.no_grad():
        guide.transform.transforms[1].loc.fill_(torch.nan)
    objective.loss(4)
    assert objective.nonfinite_sites() == ["the guide's own draws"]


def test_leaves_nothing_behind(caplog):
    """No line in a log, no site for a handler around it, no validation switched off."""
    guide, log_joint = AutoNormal(models.regression), LogJoint(models.regression)
    guide()
    with poutine.trace() as traced:
        objective = PyroObjective(models.regression, guide, Batch((), {}), log_joint)
        objective.loss(4)
        objective.parameters()
    assert "sample" not in {node["type"] for node in traced.trace.nodes.values()}
    assert pyro.distributions.is_validation_enabled()
    assert not caplog.records


# Mini-batches


def objectives(kind=loaders.small, make_loader=loaders.listed, num_compared=NUM_VALIDATION):
    """The objective by batches, and that of all data."""
    x, y = loaders.rows()
    guide = kind(loaders.regression)
    guide(x, y)
    batches = BatchStream(make_loader(x, y))
    log_joint = LogJoint(loaders.regression, (x[:10], y[:10]))
    if kind is loaders.small:
        objective = PathObjective(log_joint, guide)
    else:
        arguments = Batch((x, y), {})
        objective = PyroObjective(loaders.regression, guide, arguments, log_joint)
    validation = list(batches.one_pass(num_compared))
    by_batch = MinibatchObjective(objective, batches, log_joint, validation)
    return by_batch, objective.with_arguments(Batch((x, y), {}))


def gradient_of(objective, guide_parameters):
    torch.manual_seed(0)
    found = torch.autograd.grad(objective.loss(4), guide_parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize(
    ("kind", "make_loader"), [(loaders.small, loaders.with_generator), (AutoNormal, loaders.listed)]
)
def test_the_steps_of_an_epoch_add_up(kind, make_loader):
    """To the gradient of all data, which those of scaled batches would not, since the last is short."""
    by_batch, objective = objectives(kind, make_loader)
    parameters = list(objective.parameters().values())
    found = sum(gradient_of(by_batch, parameters) for _ in range(5)) * 10 / 43
    assert torch.allclose(found, gradient_of(objective, parameters), rtol=1e-9, atol=1e-9)


def test_losses_of_batches_are_replayed():
    """With other batches and at other parameters, also for a short one, they are those of calls."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(objectives(make_loader=loaders.shuffled)[0])
    by_batch, called = pair
    called._replayed = lambda loss, batch: loss(batch)
    losses, gradients = [], []
    for k in range(30):
        for objective in pair:
            parameters = list(objective.parameters().values())
            torch.manual_seed(k)
            losses.append(objective.loss(4))
            gradients.append(torch.autograd.grad(losses[-1], parameters, allow_unused=True))
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients[-1]):
                    parameter -= 0 if gradient is None else 1e-3 * gradient
    assert len({loss.item() for loss in losses[::2]}) == 30
    assert torch.allclose(torch.stack(losses[::2]), torch.stack(losses[1::2]), rtol=1e-6)
    (captured,) = by_batch._captured.values()
    assert len(captured._replays) == 2  # batches of 10 rows and the last one of 3
    assert by_batch.num_compared >= 4


def test_arguments_that_are_no_tensors_are_not_replayed():
    """A list or an array of numbers may change, and a replay would not see it."""
    x, y = loaders.rows()
    batches = [(x[:20], y[:20].numpy()), (x[20:40], y[20:40].numpy())]

    def model(x, y):
        loaders.regression(x, torch.as_tensor(y))

    guide = loaders.small(model)
    guide(*batches[0])
    log_joint = LogJoint(model, batches[0])
    stream = BatchStream(batches)
    objective = PathObjective(log_joint, guide)
    by_batch = MinibatchObjective(objective, stream, log_joint, [*stream.one_pass(2)])
    assert len({by_batch.loss(4).item() for _ in range(4)}) == 4
    assert not by_batch._captured


@pytest.mark.parametrize("kind", [loaders.small, AutoNormal])
def test_comparisons_see_the_same_batches(kind):
    by_batch, _ = objectives(kind, loaders.shuffled)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(by_batch.elbo_draws(200))
        by_batch.loss(2)
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_the_initial_guide_is_found_in_the_mean_density(monkeypatch):
    by_batch, objective = objectives()
    z = torch.randn(6, 3)
    assert torch.allclose(by_batch.mean_log_joint()(z), objective.log_joint(z), rtol=1e-9)
    monkeypatch.setattr(minibatches, "_NUM_FOR_START", 2)
    assert not torch.allclose(by_batch.mean_log_joint()(z), objective.log_joint(z), rtol=1e-3)


def test_a_pass_over_all_data():
    by_batch, objective = objectives(make_loader=loaders.shuffled)
    torch.manual_seed(1)
    found = by_batch.over_a_pass()
    torch.manual_seed(1)
    expected = objective.elbo_draws(400)
    torch.manual_seed(1)
    assert torch.allclose(by_batch.elbo_draws(400), expected, rtol=1e-9)
    assert math.isclose(found.elbo, expected.mean(), rel_tol=1e-9)
    assert math.isclose(found.elbo_se, expected.std() / 400**0.5, rel_tol=1e-6)
    assert (found.num_draws, found.num_batches, found.share) == (400, 5, 1.0)


def test_a_pass_over_batches_of_all_sizes():
    """One of them larger than all that candidates are compared on."""
    by_batch, objective = objectives(
        make_loader=lambda x, y: [*zip(x.split([3] * 11 + [10]), y.split([3] * 11 + [10]))],
        num_compared=3,
    )
    torch.manual_seed(1)
    found = by_batch.elbo_draws(1000)
    torch.manual_seed(1)
    assert torch.allclose(found, objective.elbo_draws(1000), rtol=1e-9)


@pytest.mark.parametrize("kind", [loaders.small, AutoNormal])
def test_the_error_of_a_part_of_a_pass(kind, monkeypatch):
    """It covers what the batches that were left out may be."""
    whole = objectives(kind)[0].over_a_pass()
    monkeypatch.setattr(minibatches, "_MAX_BATCHES", 3)
    part = objectives(kind)[0].over_a_pass()
    assert part.num_batches == 3
    assert 0.5 < part.share < 0.7
    assert part.elbo_se > 2 * whole.elbo_se
    assert abs(part.elbo - whole.elbo) < 4 * part.elbo_se


@pytest.mark.parametrize("kind", [loaders.small, AutoNormal])
def test_a_loader_with_less_than_the_model_scales_to(kind, monkeypatch):
    found = objectives(kind, lambda x, y: loaders.shuffled(x[:13], y[:13]))[0].over_a_pass()
    assert math.isclose(found.loader_share, 13 / loaders.SIZE)
    assert objectives(kind)[0].over_a_pass().loader_share == pytest.approx(1.0)
    monkeypatch.setattr(minibatches, "_MAX_BATCHES", 3)
    assert objectives(kind)[0].over_a_pass().loader_share == 1.0


@pytest.mark.parametrize("make_loader", [loaders.weighted, loaders.Unknown])
def test_what_is_no_partition_has_no_weights_of_all_data(make_loader):
    by_batch, _ = objectives(make_loader=make_loader)
    found = by_batch.over_a_pass()
    assert by_batch.whole is None
    assert found.share == 0


def test_errors_of_a_weighted_mean():
    """By hand: weights 2 and 1, means 3 and 0, variances by draws 0.09 and 0."""
    found = _mean_and_error([3.0, 0.0], [0.09, 0.0], [2.0, 1.0], 1.0)
    assert found == pytest.approx((2.0, 0.2))
    expected = math.sqrt(0.04 + 0.5 * 2 * (4 / 9 * 1 + 1 / 9 * 4))
    found = _mean_and_error([3.0, 0.0], [0.09, 0.0], [2.0, 1.0], 0.5)
    assert found == pytest.approx((2.0, expected))


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
    loss = objective._terms.robust(5)
    assert loss.item() == pytest.approx(20.4)
    (weights,) = torch.autograd.grad(loss, terms)
    torch.testing.assert_close(5 * weights, torch.tensor([1.0, 1.0, 1.0, 1.0, 3 / 99]))
    # near the optimum no draw is far out
    terms = (0.004 * terms.detach()).requires_grad_()
    (weights,) = torch.autograd.grad(objective._terms.robust(5), terms)
    torch.testing.assert_close(5 * weights, torch.ones(5))
