# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_artransform.inference.config import MinibatchConfig, OptimizationConfig
from pyro_artransform.inference.loader import Batch, BatchStream
from pyro_artransform.inference.optimization import minibatch_elbo
from pyro_artransform.inference.optimization.minibatch_elbo import (
    MinibatchObjective,
    validation_batches,
)
from pyro_artransform.inference.optimization.objective import PathObjective, PyroObjective
from pyro_artransform.joint import LogJoint
from tests.inference import loaders
from tests.inference.loaders import listed, rows, shuffled, small


def objectives(kind=small, make_loader=listed, **numbers):
    """The objective by batches, and that of all data."""
    config = MinibatchConfig(**numbers)
    x, y = rows()
    guide = kind(loaders.regression)
    guide(x, y)
    batches = BatchStream(make_loader(x, y))
    log_joint = LogJoint(loaders.regression, (x[:10], y[:10]))
    if kind is small:
        objective = PathObjective(log_joint, guide, OptimizationConfig())
    else:
        arguments = Batch((x, y), {})
        objective = PyroObjective(loaders.regression, guide, arguments, log_joint, 4)
    validation = validation_batches(batches, config)
    by_batch = MinibatchObjective(objective, batches, log_joint, validation, config)
    return by_batch, objective.with_arguments(Batch((x, y), {}))


def gradient(objective, guide_parameters):
    torch.manual_seed(0)
    found = torch.autograd.grad(objective.loss(4), guide_parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize(
    ("kind", "make_loader"), [(small, loaders.with_generator), (AutoNormal, listed)]
)
def test_the_steps_of_an_epoch_add_up(kind, make_loader):
    """To the gradient of all data, which those of scaled batches would not, since the last is short."""
    by_batch, objective = objectives(kind, make_loader)
    parameters = list(objective.parameters().values())
    found = sum(gradient(by_batch, parameters) for _ in range(5)) * 10 / 43
    assert torch.allclose(found, gradient(objective, parameters), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_comparisons_see_the_same_batches(kind):
    by_batch, _ = objectives(kind, shuffled)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(by_batch.elbo_draws(200))
        by_batch.loss(2)
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_comparisons_go_on_the_log_weights_of_all_data():
    by_batch, objective = objectives()
    torch.manual_seed(1)
    found = by_batch.elbo_draws(400)
    torch.manual_seed(1)
    assert torch.allclose(found, objective.elbo_draws(20), rtol=1e-9)


def test_the_initial_guide_is_found_in_the_mean_density():
    by_batch, objective = objectives()
    z = torch.randn(6, 3)
    assert torch.allclose(by_batch.mean_log_joint()(z), objective.log_density(z), rtol=1e-9)
    by_batch, _ = objectives(num_for_start=2)
    assert not torch.allclose(by_batch.mean_log_joint()(z), objective.log_density(z), rtol=1e-3)


def test_a_pass_over_all_data():
    by_batch, objective = objectives(make_loader=shuffled)
    torch.manual_seed(1)
    found = by_batch.over_a_pass()
    torch.manual_seed(1)
    expected = objective.elbo_draws(1000)
    assert torch.allclose(found.log_weights, expected, rtol=1e-9)
    assert math.isclose(found.elbo, expected.mean(), rel_tol=1e-9)
    assert math.isclose(found.elbo_se, expected.std() / 1000**0.5, rel_tol=1e-6)
    assert (found.num_draws, found.num_batches, found.share) == (1000, 5, 1.0)


def test_a_pass_over_batches_of_all_sizes():
    """One of them larger than all that candidates are compared on."""
    by_batch, objective = objectives(
        make_loader=lambda x, y: [*zip(x.split([3] * 11 + [10]), y.split([3] * 11 + [10]))],
        num_compared=3,
    )
    torch.manual_seed(1)
    found = by_batch.over_a_pass()
    torch.manual_seed(1)
    assert torch.allclose(found.log_weights, objective.elbo_draws(1000), rtol=1e-9)


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_the_error_of_a_part_of_a_pass(kind):
    """It covers what the batches that were left out may be."""
    whole = objectives(kind)[0].over_a_pass()
    part = objectives(kind, max_batches=3)[0].over_a_pass()
    assert part.num_batches == 3
    assert 0.5 < part.share < 0.7
    assert part.log_weights is None
    assert part.elbo_se > 2 * whole.elbo_se
    assert abs(part.elbo - whole.elbo) < 4 * part.elbo_se


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_a_loader_with_less_than_the_model_scales_to(kind):
    found = objectives(kind, lambda x, y: shuffled(x[:13], y[:13]))[0].over_a_pass()
    assert math.isclose(found.loader_share, 13 / loaders.SIZE)
    assert objectives(kind)[0].over_a_pass().loader_share == pytest.approx(1.0)
    assert objectives(kind, max_batches=3)[0].over_a_pass().loader_share == 1.0


@pytest.mark.parametrize("make_loader", [loaders.weighted, loaders.Unknown])
def test_what_is_no_partition_has_no_weights_of_all_data(make_loader):
    by_batch, _ = objectives(make_loader=make_loader)
    found = by_batch.over_a_pass()
    assert found.log_weights is None
    assert found.share == 0


def test_errors_of_a_weighted_mean():
    """By hand: weights 2 and 1, means 3 and 0, variances by draws 0.09 and 0."""
    found = minibatch_elbo._mean_and_error([3.0, 0.0], [0.09, 0.0], [2.0, 1.0], 1.0)
    assert found == pytest.approx((2.0, 0.2))
    expected = math.sqrt(0.04 + 0.5 * 2 * (4 / 9 * 1 + 1 / 9 * 4))
    found = minibatch_elbo._mean_and_error([3.0, 0.0], [0.09, 0.0], [2.0, 1.0], 0.5)
    assert found == pytest.approx((2.0, expected))
