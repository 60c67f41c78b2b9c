# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Log joint densities of other arguments, and their mean."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine

from pyro_artransform.model import FullDataDensity, LogJoint
from pyro_artransform.model.full_data_density import Anchor
from tests.model.models import SIZE, Y, by_trace, of_batch


def branching(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", SIZE, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(z if z > 0 else -z, 1.0), obs=y)


@pytest.mark.parametrize("function", [of_batch, branching])
def test_at_other_arguments(function):
    log_joint = LogJoint(function, (Y[:3],))
    z = torch.randn(5, log_joint.latents.latent_dim)
    before = log_joint(z)
    for part in (Y[3:6], Y[6:], Y, Y[:3] + 1):
        other = log_joint.with_arguments((part,))
        assert other.strategy == log_joint.strategy
        assert torch.allclose(other(z), LogJoint(function, (part,))(z))
    assert torch.equal(log_joint(z), before)
    assert not torch.allclose(log_joint.with_arguments((Y[3:6],))(z), before)


def test_keyword_arguments():
    log_joint, z = LogJoint(of_batch, (), {"y": Y[:3]}), torch.randn(5, 2)
    expected = torch.stack([by_trace(lambda: of_batch(Y[3:6], 2.0), row) for row in z])
    assert torch.allclose(log_joint.with_arguments((), {"y": Y[3:6], "scale": 2.0})(z), expected)


def test_the_model_is_run_for_new_shapes_only():
    runs = []

    def watched(y):
        runs.append(len(y))
        of_batch(y)

    log_joint = LogJoint(watched, (Y[:3],))
    runs.clear()
    state = torch.get_rng_state()
    for size in (3, 2, 3, 2, 1):
        log_joint.with_arguments((Y[:size],))
    assert runs == [3, 2, 1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [float, torch.as_tensor])
def test_scales_by_values_of_the_data(kind):
    """Batches of one shape, whose scale is that of all weights relative to their own; 1 of the first."""

    def weighted(y, weights):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=kind(100 / weights.sum())), pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    log_joint = LogJoint(weighted, (Y[:4], torch.full((4,), 2.5)))
    for total in (100.0, 10.0, 50.0, 20.0):
        batch = Y[:4], torch.full((4,), total / 4)
        assert log_joint.structure(batch).scale == 100 / total
        assert LogJoint(weighted, batch).structure(batch).scale == 100 / total


def test_other_latents():
    def rows(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    log_joint = LogJoint(rows, (Y[:3],))
    log_joint.with_arguments((Y[3:6],))
    message = r"expected .*'z': \(3,\).*got .*'z': \(2,\).*AutoAmortized"
    with pytest.raises(ValueError, match=message):
        log_joint.with_arguments((Y[:2],))


def test_mean_of_a_partition_is_that_of_all_data():
    log_joint = LogJoint(of_batch, (Y[:3],))
    mean = FullDataDensity(log_joint, [((Y[:3],), {}), ((Y[3:5],), {}), ((Y[5:],), {})])
    assert mean.is_of_all_data
    z = torch.randn(5, 2, requires_grad=True)
    found, expected = mean(z), LogJoint(of_batch, (Y,))(z)
    assert torch.allclose(found, expected)
    gradients = [torch.autograd.grad(value.sum(), z)[0] for value in (found, expected)]
    assert torch.allclose(*gradients)
    assert (mean.latents.latent_dim, mean.strategy) == (2, log_joint.strategy)
    mean = FullDataDensity(log_joint, [((Y[:3],), {}), ((Y[:3] / 0,), {})])
    assert not mean.is_of_all_data
    assert mean.nonfinite_sites(torch.zeros(1, 2)) == ["y"]


def test_the_mean_at_the_arguments_of_a_batch_is_that_batch():
    """Its largest batch, whose state it has, too."""
    batches = [((Y[:3],), {}), ((Y[3:5],), {}), ((Y[5:],), {})]
    log_joint, z = LogJoint(of_batch, (Y[:3],)), torch.randn(5, 2)
    mean = FullDataDensity(log_joint, batches)
    for args, kwargs in batches:
        expected = log_joint.with_arguments(args, kwargs)
        for part in (mean.with_arguments(args, kwargs), mean.bound_to(args, kwargs)):
            assert torch.allclose(part(z), expected(z))
        part = mean.with_arguments(args, kwargs)
        assert part.is_random == expected.is_random
        # without the indices of all rows that a plate draws
        assert part.chunk_size >= expected.chunk_size


def test_a_view_of_a_density_of_batches_is_a_view_of_each_and_changes_no_other():
    runs = []

    def model(y):
        runs.append(y)
        of_batch(y)

    log_joint, z = LogJoint(model, (Y[:3],)), torch.randn(5, 2)
    mean = FullDataDensity(log_joint, [((Y[:3],), {}), ((Y[3:],), {})])
    anchor = Anchor.of(mean, torch.zeros(2), torch.ones(2))
    for density in (mean, mean.estimate((Y[:3],), {}, anchor, 100)):
        by_loop, strategy, before = density.by_strategy("loop"), density.strategy, density(z)
        runs.clear()
        torch.testing.assert_close(by_loop(z), before)
        assert len(runs) >= len(z)  # one a draw
        assert (density.strategy, log_joint.strategy) == (strategy, strategy) != ("loop", "loop")
    assert mean.by_strategy("loop").bound_to((Y[:3],), {}).strategy == "loop"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_in_double_precision_with_the_gradient_of_draws(dtype):
    z = torch.randn(5, 2, dtype=dtype, requires_grad=True)
    y = Y.to(dtype)
    mean = FullDataDensity(LogJoint(of_batch, (y[:3],)), [((y[:3],), {}), ((y[3:],), {})])
    found = mean(z)
    assert found.dtype == torch.float64
    (gradient,) = torch.autograd.grad(found.sum(), z, create_graph=True)
    assert gradient.dtype == dtype
    again = torch.autograd.grad(gradient.square().sum(), z)[0]
    whole = LogJoint(of_batch, (y,))
    (slope,) = torch.autograd.grad(whole(z).sum(), z, create_graph=True)
    expected = torch.autograd.grad(slope.square().sum(), z)[0]
    assert torch.allclose(again, expected, rtol=1e-3)
    with torch.no_grad():
        assert torch.allclose(mean.checked(z, found)[0], whole(z).double(), rtol=1e-5)


def test_data_of_two_plates_are_not_known_to_be_all():
    """A batch has a fifth of the rows, and half of the others: no weight suits both."""

    def two(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("some", 15, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        with pyro.plate("others", 6, subsample_size=len(y)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=y)

    parts = [((Y[:3],), {})] * 5
    assert not FullDataDensity(LogJoint(two, (Y[:3],)), parts).is_of_all_data


def test_no_permutations_of_a_million_rows(monkeypatch):
    """Of indices that the model does not ask for."""
    mean = FullDataDensity(LogJoint(of_batch, (Y[:3],)), [((Y[:3],), {}), ((Y[3:],), {})])
    expected = mean(torch.zeros(2, 2))

    def refused(*args, **kwargs):
        raise AssertionError("indices were drawn")

    monkeypatch.setattr(torch, "randperm", refused)
    assert torch.equal(mean(torch.zeros(2, 2)), expected)


def test_an_anchor_makes_batches_alike():
    batches = [((Y[:3],), {}), ((Y[3:5],), {}), ((Y[5:],), {})]
    log_joint = LogJoint(of_batch, (Y[:3],))
    whole = FullDataDensity(log_joint, batches)
    anchor = Anchor.of(whole, torch.tensor([0.3, -0.2]), torch.tensor([1.0, 2.0]))
    near = anchor.point + 0.02 * torch.randn(6, 2)
    plain = [log_joint.with_arguments(*batch) for batch in batches]
    anchored = [whole.estimate(*batch, anchor, 100) for batch in batches]
    shares = torch.tensor([3.0, 2.0, SIZE - 5.0])[:, None] / SIZE
    found, noisy = (torch.stack([part(near) for part in parts]) for parts in (anchored, plain))
    assert torch.allclose((shares * found).sum(0), whole(near).to(found), atol=1e-4)
    assert (found - whole(near)).abs().max() < 0.1 * (noisy - whole(near)).abs().max()
    far = 10 * torch.randn(
        6, 2
    )  # the corrections have mean zero, and are those at the edge of the reach
    found, noisy = (torch.stack([part(far) for part in parts]) for parts in (anchored, plain))
    assert torch.allclose((shares * found).sum(0), whole(far).to(found), rtol=1e-4)
    edge = anchor.point + anchor.reach * (far - anchor.point).sign()
    beyond = (far - anchor.point).abs() > anchor.reach
    at_edge = torch.stack([one(edge) - two(edge) for one, two in zip(anchored, plain)])
    assert torch.allclose((found - noisy)[:, beyond.all(1)], at_edge[:, beyond.all(1)], atol=1e-3)


@pytest.mark.parametrize("columns", [(), (4,)])
def test_draws_of_much_data_are_evaluated_in_parts(columns, monkeypatch):
    """Rows times draws, or the entries of the arguments times draws, are bounded, whoever asks."""
    monkeypatch.setattr("pyro_artransform.model.vectorization._MAX_VALUES", 8_000)
    counts = []

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        counts.append(loc.numel())
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=x.reshape(len(x), -1)[:, 0])

    x, z = torch.zeros(1_000, *columns), torch.linspace(-1.0, 1.0, 20)
    log_joint, of_few = LogJoint(model, (x,)), LogJoint(model, (x[:1],))
    for density in (log_joint, of_few.with_arguments((x,))):
        assert density.strategy == "plate"
        counts.clear()
        with torch.no_grad():
            found = density(z[:, None])
        assert found.shape == (20,)
        assert max(counts) * x.numel() < 1e4
        assert torch.allclose(found[3:4], density(z[3:4, None]))
