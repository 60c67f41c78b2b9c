# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_artransform.inference.loader import Batch, BatchStream
from pyro_artransform.inference.optimization import minibatches
from pyro_artransform.inference.optimization.minibatches import NUM_VALIDATION, MinibatchObjective
from pyro_artransform.inference.optimization.objective import PathObjective, PyroObjective
from pyro_artransform.model import LogJoint
from tests.inference import loaders


def objectives(kind=loaders.small, make_loader=loaders.listed, num_compared=NUM_VALIDATION):
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
    called._replayed = lambda loss, batch, num_particles: loss(batch)
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
    ((_, captured),) = by_batch._captured.values()
    assert len(captured._replays) == 2  # batches of 10 rows and the last one of 3
    assert by_batch.num_compared >= 4


def by_batches(model, batches):
    guide = loaders.small(model)
    guide(*batches[0])
    log_joint, stream = LogJoint(model, batches[0]), BatchStream(batches)
    objective = PathObjective(log_joint, guide)
    return MinibatchObjective(objective, stream, log_joint, [*stream.one_pass(2)])


def test_arguments_that_are_no_tensors_are_not_replayed():
    """A list or an array of numbers may change, and a replay would not see it."""
    x, y = loaders.rows()
    batches = [(x[:20], y[:20].numpy()), (x[20:40], y[20:40].numpy())]
    by_batch = by_batches(lambda x, y: loaders.regression(x, torch.as_tensor(y)), batches)
    assert len({by_batch.loss(4).item() for _ in range(4)}) == 4
    assert not by_batch._captured


def with_numbers(number):
    """An objective on batches of two sizes with a number each, and those that the model saw."""
    x, y = loaders.rows()
    seen = []

    def model(x, y, number):
        seen.append(number)
        loaders.regression(x, y)

    batches = [(x[k::10], y[k::10], number(k, len(x[k::10]))) for k in range(10)]
    return by_batches(model, batches), seen


def test_a_number_that_changes_is_no_constant_of_a_capture():
    """Captures of each number would grow without end, and each would keep its first batch."""
    by_batch, seen = with_numbers(lambda k, size: k)
    for _ in range(10):
        by_batch.loss(4)
    seen.clear()
    for _ in range(30):
        by_batch.loss(4)
    assert len(by_batch._captured) == 1
    assert {*seen} == {*range(10)}


def test_a_number_that_depends_on_the_shape_is_a_constant():
    by_batch, seen = with_numbers(lambda k, size: size)
    for _ in range(50):
        by_batch.loss(4)
    seen.clear()
    for _ in range(10):
        by_batch.loss(4)
    assert len(seen) < 5  # a comparison runs the model
    assert by_batch.num_compared
    first = next(iter(by_batch._captured.values()))[0]
    assert {*map(str, first.values())} == {"[None, None, 4]", "[None, None, 5]"}


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


def other_sizes(x, y):
    """One batch is larger than all that candidates are compared on."""
    return [*zip(x.split([3] * 11 + [10]), y.split([3] * 11 + [10]))]


@pytest.mark.parametrize(
    ("make_loader", "num_compared", "num_batches"),
    [(loaders.shuffled, NUM_VALIDATION, 5), (other_sizes, 3, 12)],
)
def test_a_pass_over_all_data(make_loader, num_compared, num_batches):
    by_batch, objective = objectives(make_loader=make_loader, num_compared=num_compared)
    torch.manual_seed(1)
    found = by_batch.over_a_pass()
    torch.manual_seed(1)
    expected = objective.elbo_draws(400)
    torch.manual_seed(1)
    assert torch.allclose(by_batch.elbo_draws(400), expected, rtol=1e-9)
    assert math.isclose(found.elbo, expected.mean(), rel_tol=1e-9)
    assert math.isclose(found.elbo_se, expected.std() / 400**0.5, rel_tol=1e-6)
    assert (found.num_draws, found.num_batches, found.share) == (400, num_batches, 1.0)


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
