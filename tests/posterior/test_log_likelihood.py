# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform.inference import log_likelihood
from pyro_artransform.posterior.log_likelihood import Likelihood

DATA = (1.3, 0.2, 2.9, -0.4, 1.7)
MASK = (True, True, False, True, False)


def data():
    return torch.tensor(DATA)


def plate(values):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(z, 2.0), obs=values)


X = torch.linspace(-1.0, 1.0, 10, dtype=torch.float64).reshape(5, 2)


def product(values):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(X @ z, 2.0), obs=values)


def branch(values):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(z if z > 0 else -2 * z, 2.0), obs=values)


def sums_over_draws(values):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(z.sum(), 2.0), obs=values)


MEANS = {
    plate: ("plate", lambda z: z[:, None]),
    product: ("vmap", lambda z: z @ X.T),
    branch: ("loop", lambda z: torch.where(z > 0, z, -2 * z)[:, None]),
    sums_over_draws: ("vmap", lambda z: z[:, None]),
}


@pytest.mark.parametrize("model", MEANS)
@pytest.mark.parametrize("n", [1, 7, 1001])
def test_pointwise(model, n):
    z = torch.randn(n, 2) if model is product else torch.randn(n)
    draws = {"z": z, "y": torch.zeros(n, 5), "unknown": torch.zeros(n)}
    found = log_likelihood(model, draws, data())
    strategy, mean_of = MEANS[model]
    assert list(found) == ["y"]
    assert torch.allclose(found["y"], dist.Normal(mean_of(z), 2.0).log_prob(data()))
    assert not found["y"].requires_grad
    if n > 1:
        assert Likelihood(model, (data(),), {}).strategy(draws) == strategy


def test_scales_are_left_out_and_masked_data_are_zero():
    def model(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("scaled", 5), poutine.scale(scale=3.0):
            pyro.sample("y", dist.Normal(z, 2.0), obs=values)
        with pyro.plate("masked", 5), poutine.mask(mask=torch.tensor(MASK)):
            pyro.sample("x", dist.Normal(z, 2.0), obs=values)
        with pyro.plate("part", 5):
            pyro.sample("w", dist.Normal(z, 2.0), obs=values, obs_mask=torch.tensor(MASK))

    z = torch.randn(6)
    found = log_likelihood(model, {"z": z, "w_unobserved": torch.randn(6, 5)}, data())
    expected = dist.Normal(z[:, None], 2.0).log_prob(data())
    masked = torch.where(torch.tensor(MASK), expected, 0.0)
    for name, terms in {"y": expected, "x": masked, "w_observed": masked}.items():
        assert torch.allclose(found.pop(name), terms)
    assert not found


@pytest.mark.parametrize("strategy", ["plate", "vmap", "loop"])
def test_what_a_reparametrizer_leaves_is_no_data(strategy):
    """However many draws are evaluated at once."""
    groups = torch.tensor([0, 1, 1])

    def model(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.reparam(config={"local": LocScaleReparam(0.0)}):
            local = pyro.sample("local", dist.Normal(z, 2.0))
            if strategy == "vmap":
                local = local[groups]
            elif strategy == "loop" and z > 0:
                local = -local
            pyro.sample("y", dist.Normal(local, 1.0), obs=values)

    draws = {"z": torch.randn(20), "local_decentered": torch.randn(20, 3)}
    likelihood = Likelihood(model, (data()[:3],), {})
    assert likelihood.strategy(draws) == strategy
    found = likelihood(draws)
    assert list(found) == ["y"]
    local = draws["z"][:, None] + 2 * draws["local_decentered"]
    if strategy == "vmap":
        local = local[:, groups]
    elif strategy == "loop":
        local = torch.where(draws["z"][:, None] > 0, -local, local)
    assert torch.allclose(found["y"], dist.Normal(local, 1.0).log_prob(data()[:3]))


def test_events_nested_plates_and_what_has_no_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("factor", -(z**2))
        pyro.deterministic("square", z**2)
        outer, inner = pyro.plate("outer", 4, dim=-1), pyro.plate("inner", 3, dim=-2)
        with outer:
            local = pyro.sample("local", dist.Normal(z, 1.0))
        with outer, inner:
            vectors = dist.Normal(local[..., None].expand(*local.shape, 2), 1.0).to_event(1)
            pyro.sample("vector", vectors, obs=torch.ones(3, 4, 2))
        pyro.sample("one", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    draws = {"z": torch.randn(6), "local": torch.randn(6, 4)}
    found = log_likelihood(model, draws)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "vector": (6, 3, 4),
        "one": (6,),
    }
    each = dist.Normal(draws["local"], 1.0).log_prob(torch.ones(())) * 2
    assert torch.allclose(found["vector"], each[:, None].expand(6, 3, 4))
    assert torch.allclose(found["one"], dist.Normal(draws["z"], 1.0).log_prob(torch.tensor(0.0)))


def test_batch_dimensions_without_a_plate():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 2.0).expand([5]), obs=data())

    z = torch.randn(6)
    expected = dist.Normal(z[:, None], 2.0).log_prob(data())
    assert torch.allclose(log_likelihood(model, {"z": z})["y"], expected)


def test_bad_input():
    @config_enumerate
    def mixture(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z + kind, 1.0), obs=values)

    def minibatch(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample_size=2) as indices:
            pyro.sample("y", dist.Normal(z, 1.0), obs=values[indices])

    z = torch.randn(6)
    with pytest.raises(ValueError, match=r"expected those of all latents, got none of \['z'\]"):
        log_likelihood(plate, {}, data())
    with pytest.raises(ValueError, match=r"expected those of all latents, got none of \['kind'\]"):
        log_likelihood(mixture, {"z": z}, data())
    with pytest.raises(
        ValueError, match=r"expected all data, got the sub-sampled plate 'data' \(2"
    ):
        log_likelihood(minibatch, {"z": z}, data())
    with pytest.raises(ValueError, match=r"expected 'z' of shape \(6,\), got \(6, 2\)"):
        log_likelihood(plate, {"z": torch.randn(6, 2)}, data())
    with pytest.raises(ValueError, match=r"expected 'z' of shape \(1,\), got \(\)"):
        log_likelihood(plate, {"z": torch.tensor(0.0)}, data())
    kinds = {"z": z, "kind": torch.ones(6, 5)}
    found = log_likelihood(mixture, kinds, data())["y"]
    assert torch.allclose(found, dist.Normal(z[:, None] + 1, 1.0).log_prob(data()))


def test_handlers_around_it_see_nothing():
    with poutine.trace() as traced:
        log_likelihood(plate, {"z": torch.randn(6)}, data())
    assert set(traced.trace.nodes) <= {"_INPUT", "_RETURN"}


@pytest.mark.parametrize("bound", [-1.5, 1.5])
def test_a_branch_on_one_of_many_coordinates(bound):
    """Whether few draws take it or most, the others are not mixed up with them."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        scale = 100.0 if (z[..., 3] > bound).any() else 1.0
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(z[..., 0], scale), obs=torch.tensor([0.5, 1.0]))

    z = torch.randn(200, 20)
    scale = torch.where(z[:, 3:4] > bound, 100.0, 1.0)
    expected = dist.Normal(z[:, :1], scale).log_prob(torch.tensor([0.5, 1.0]))
    assert torch.allclose(log_likelihood(model, {"z": z})["y"], expected)
