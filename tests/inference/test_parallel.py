# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What processes offer to a fit: one alone, and a group of one; ``test_fit_processes`` has two."""

import math
import warnings

import pytest
import torch
from torch import distributed

from pyro_artransform.inference.parallel import ALONE, SharedObjective


@pytest.fixture(params=["alone", "group"])
def processes(request):
    """What does nothing, and what sends everything to itself: they are the same."""
    return ALONE if request.param == "alone" else request.getfixturevalue("group")


class Halves:
    """The first of two processes, of which the other always does the same."""

    rank, size = 0, 2

    def share(self, num_draws):
        return -(-num_draws // 2)

    def gather(self, values):
        return torch.cat([values, values])

    def gather_objects(self, own):
        return [own, [*own, "other"]]


class Counted:
    """An objective that counts its draws."""

    has_weights = True

    def loss(self, num_particles):
        return torch.tensor(float(num_particles))

    def tail_loss(self, num_particles):
        return torch.tensor(10.0 * num_particles)

    def parameters(self):
        return {"x": torch.zeros(2)}

    def is_guide_alone(self):
        return True

    def elbo_draws(self, count):
        return torch.full((count,), float(count))

    def nonfinite_sites(self):
        return ["y"]


# What is averaged and gathered


def test_mean(processes):
    """Gradients of other shapes and dtypes, and one that is missing."""
    parameters = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.float32), torch.zeros(())]
    gradients = [torch.randn(3, 2).T, None, torch.tensor(2.0)]
    loss, found = processes.mean(1.5, gradients, parameters)
    assert loss == 1.5
    assert found[1] is None
    for expected, got in zip(gradients[::2], found[::2]):
        assert torch.equal(expected, got)
        assert got.dtype == expected.dtype


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_mean_of_a_loss_that_is_not_finite(processes, value):
    loss, found = processes.mean(value, None, [torch.zeros(2)])
    assert not math.isfinite(loss)
    assert found is None


def test_mean_of_a_gradient_that_is_not_finite(processes):
    _, (found,) = processes.mean(1.0, [torch.tensor([1.0, math.nan])], [torch.zeros(2)])
    assert found[0] == 1
    assert found[1].isnan()


def test_flags(processes):
    assert processes.any(True, False) == (True, False)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (2, 3)])
def test_gathered_tensors(processes, shape):
    values = torch.randn(shape)
    assert torch.equal(processes.gather(values), values)


def test_gathered_objects_and_what_the_first_returns(processes):
    content = {"a": [torch.ones(2), "b", None]}
    for found in (processes.gather_objects(content)[0], processes.first(lambda: content)):
        assert torch.equal(found["a"][0], torch.ones(2))
        assert found["a"][1:] == ["b", None]


def test_errors_of_the_first(processes):
    class Unsendable(ValueError):
        """It cannot be pickled, as no class inside of a function can."""

    for error in (ValueError("expected this"), Unsendable("expected that")):
        with pytest.raises(ValueError, match="expected") as caught:
            processes.first(lambda error=error: (_ for _ in ()).throw(error))
        assert caught.value is error


def test_values_of_the_first(processes):
    x = torch.randn(2, 3).T
    before = x.clone()
    (found,) = processes.broadcast(x)
    assert found is x
    assert torch.equal(x, before)
    processes.align(lambda: {"x": x})
    assert torch.equal(x, before)
    processes.check_same(lambda: {"num_steps": 3})


def test_draws(processes):
    assert processes.share(7) == 7
    assert processes.seed(3) == 3
    processes.draw_apart()
    with warnings.catch_warnings(record=True) as caught, processes.quiet():
        warnings.simplefilter("always")
        warnings.warn("it is the first", stacklevel=1)
    assert caught


def test_a_new_seed_is_drawn_in_a_group(group):
    torch.manual_seed(0)
    first, second = group.seed(None), group.seed(None)
    assert isinstance(first, int)
    assert first != second


def test_a_shared_objective():
    objective = SharedObjective(Counted(), Halves())
    assert objective.has_weights
    assert objective.loss(10) == 5
    assert objective.tail_loss(9) == 50
    assert objective.elbo_draws(5).tolist() == [3.0] * 6
    assert objective.nonfinite_sites() == ["y", "other"]
    assert objective.parameters().keys() == {"x"}
    assert objective.is_guide_alone()
    counted = Counted()
    assert ALONE.shared(counted) is counted


def test_scales_of_steps(processes):
    class Scaled:
        def step_scales(self):
            return {parameter: scale}

    parameter, scale = torch.zeros(3), torch.rand(1).expand(3)
    found = processes.scales(Scaled()).step_scales()
    assert torch.equal(found[parameter], scale)
    assert processes.scales(None) is None


def test_an_objective_is_shared_in_a_group(group):
    objective = group.shared(Counted())
    assert objective.elbo_draws(3).tolist() == [3.0] * 3


def test_a_failure_says_what_to_do(group, monkeypatch):
    def fail(*args):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed, "all_reduce", fail)
    with pytest.raises(distributed.DistError, match=r"another process has ended.*checkpoint.*peer"):
        group.any(True)
