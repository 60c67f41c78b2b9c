# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam

from pyro_artransform.model import LogJoint
from pyro_artransform.posterior import log_likelihood
from pyro_artransform.posterior.pointwise import Likelihood
from tests.model.models import data

MASK = torch.tensor([True, True, False, True, False])
#: the strategy of a model, its means given a draw, and those given many
CASES = {
    "one plate": ("plate", lambda z: z, lambda z: z[:, None]),
    "sum over draws": ("vmap", lambda z: z.sum(), lambda z: z[:, None]),
    "branch": ("loop", lambda z: z if z > 0 else -2 * z, lambda z: z.maximum(-2 * z)[:, None]),
}


def model_of(name):
    def model(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(CASES[name][1](z), 2.0), obs=values)

    return model


plate = model_of("one plate")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [1, 1001])
def test_pointwise(name, n):
    model, (strategy, _, means_of) = model_of(name), CASES[name]
    z = torch.randn(n)
    draws = {"z": z, "y": torch.zeros(n, 5), "unknown": torch.zeros(n)}
    found = log_likelihood(model, draws, data())
    assert list(found) == ["y"]
    assert torch.allclose(found["y"], dist.Normal(means_of(z), 2.0).log_prob(data()))
    assert not found["y"].requires_grad
    if n > 1:
        assert LogJoint(model, (data(),)).strategy == strategy


def test_scales_are_left_out_and_masked_data_are_zero():
    def model(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("scaled", 5), poutine.scale(scale=3.0):
            pyro.sample("y", dist.Normal(z, 2.0), obs=values)
        with pyro.plate("masked", 5), poutine.mask(mask=MASK):
            pyro.sample("x", dist.Normal(z, 2.0), obs=values)
        with pyro.plate("part", 5):
            pyro.sample("w", dist.Normal(z, 2.0), obs=values, obs_mask=MASK)

    z = torch.randn(6)
    found = log_likelihood(model, {"z": z, "w_unobserved": torch.randn(6, 5)}, data())
    expected = dist.Normal(z[:, None], 2.0).log_prob(data())
    masked = torch.where(MASK, expected, 0.0)
    for name, terms in {"y": expected, "x": masked, "w_observed": masked}.items():
        assert torch.allclose(found.pop(name), terms)
    assert not found


def test_what_a_reparametrizer_leaves_is_no_data():
    """Under vmap; in a plate it is tested with ArviZ."""
    rows = torch.tensor([0, 1, 1])

    def model(values):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3), poutine.reparam(config={"local": LocScaleReparam(0.0)}):
            local = pyro.sample("local", dist.Normal(z, 2.0))[rows]
            pyro.sample("y", dist.Normal(local, 1.0), obs=values)

    draws = {"z": torch.randn(20), "local_decentered": torch.randn(20, 3)}
    found = log_likelihood(model, draws, data()[:3])
    assert list(found) == ["y"]
    local = (draws["z"][:, None] + 2 * draws["local_decentered"]).mT[rows].mT
    assert torch.allclose(found["y"], dist.Normal(local, 1.0).log_prob(data()[:3]))


def test_events_nested_plates_and_what_has_no_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", z**2)
        outer, inner = pyro.plate("outer", 4, dim=-1), pyro.plate("inner", 3, dim=-2)
        with outer:
            local = pyro.sample("local", dist.Normal(z, 1.0))
        with outer, inner:
            vectors = dist.Normal(local[..., None].expand(*local.shape, 2), 1.0).to_event(1)
            pyro.sample("vector", vectors, obs=torch.ones(3, 4, 2))
        pyro.sample("one", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        pyro.sample("unplated", dist.Normal(z, 2.0).expand([5]), obs=data())

    draws = {"z": torch.randn(6), "local": torch.randn(6, 4)}
    found = log_likelihood(model, draws)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "vector": (6, 3, 4),
        "one": (6,),
        "unplated": (6, 5),
    }
    each = dist.Normal(draws["local"], 1.0).log_prob(torch.ones(())) * 2
    assert torch.allclose(found["vector"], each[:, None].expand(6, 3, 4))
    assert torch.allclose(found["one"], dist.Normal(draws["z"], 1.0).log_prob(torch.tensor(0.0)))
    expected = dist.Normal(draws["z"][:, None], 2.0).log_prob(data())
    assert torch.allclose(found["unplated"], expected)


def censored(values, mask=MASK):
    """Where the mask is false the datum is a lower bound; a factor of each kind of plate."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    log_scale = pyro.sample("log_scale", dist.Normal(0.0, 0.2))
    outer, inner = pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 5, dim=-1)
    law = dist.LogNormal(z, log_scale.exp())
    with outer, inner:
        pyro.sample("y", law.mask(mask), obs=values.exp().expand(3, 5))
        pyro.factor("longer", torch.where(mask, 0.0, (1 - law.cdf(values.exp())).log()))
        pyro.factor("same", z)
    with inner:
        pyro.sample("x", dist.Normal(z, 1.0), obs=values)
    pyro.sample("one", dist.Normal(z, 1.0), obs=values[0])


def branching(values):
    """Only runs of one draw at a time, or vmap, can evaluate it."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = z if z > 0 else 2 * z
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(loc, 1.0).mask(MASK), obs=values)
        pyro.factor("longer", torch.where(MASK, 0.0, loc - values))


@pytest.mark.parametrize("model", [censored, branching])
def test_terms_and_priors_add_up_to_the_log_joint(model):
    likelihood = Likelihood(lambda: model(data()))
    draws = {name: torch.randn(7) for name in likelihood.latents}
    terms = log_likelihood(model, draws, data())
    assert terms["y"].shape[1:] == likelihood.observed["y"].shape
    if model is branching:  # each datum has its own
        loc = torch.where(draws["z"] > 0, draws["z"], 2 * draws["z"])[:, None]
        expected = torch.where(MASK, dist.Normal(loc, 1.0).log_prob(data()), loc - data())
        assert torch.allclose(terms["y"], expected)
    for i in range(7):
        given = poutine.condition(model, {name: value[i] for name, value in draws.items()})
        trace = poutine.trace(given).get_trace(data())
        trace.compute_log_prob()
        priors = sum(trace.nodes[name]["log_prob_sum"] for name in draws)
        total = sum(term[i].sum() for term in terms.values())
        assert torch.allclose(total + priors, trace.log_prob_sum())


def outside_of_plates(values):
    plate(values)
    pyro.factor("soft", -(pyro.sample("w", dist.Normal(0.0, 1.0)) ** 2))


def of_two_sites(values):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("x", dist.Normal(z, 2.0), obs=values)
        pyro.sample("y", dist.Normal(z, 2.0), obs=values)
        pyro.factor("soft", -(z**2))


def in_another_plate(values):
    plate(values)
    with pyro.plate("others", 5):
        pyro.factor("soft", -(pyro.sample("w", dist.Normal(0.0, 1.0)) ** 2))


FACTORS = [outside_of_plates, of_two_sites, in_another_plate]


@pytest.mark.parametrize("model", FACTORS)
def test_a_factor_that_belongs_to_no_datum(model):
    shape = (6, 5) if model is in_another_plate else (6,)
    draws = {"z": torch.randn(6), "w": torch.randn(shape)}
    words = "each datum, got the factor 'soft', .* prior, leave it out by poutine.block"
    with pytest.raises(ValueError, match=words):
        log_likelihood(model, draws, data())
    found = log_likelihood(poutine.block(model, hide=["soft"]), draws, data())
    expected = dist.Normal(draws["z"][:, None], 2.0).log_prob(data())
    assert torch.allclose(found["y"], expected)


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
    for model, draws, message in (
        (plate, {}, r"expected those of all latents, got none of \['z'\]"),
        (mixture, {"z": z}, r"expected those of all latents, got none of \['kind'\]"),
        (minibatch, {"z": z}, r"expected all data, got the subsampled plate 'data' \(2"),
        (plate, {"z": torch.randn(6, 2)}, r"expected 'z' of shape \(6,\), got \(6, 2\)"),
        (plate, {"z": torch.tensor(0.0)}, r"expected 'z' of shape \(1,\), got \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            log_likelihood(model, draws, data())
    kinds = {"z": z, "kind": torch.ones(6, 5)}
    found = log_likelihood(mixture, kinds, data())["y"]
    assert torch.allclose(found, dist.Normal(z[:, None] + 1, 1.0).log_prob(data()))


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
