# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Draws, densities and summaries of an amortized guide, by element."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import NESTED, Encoder, SubsamplingEncoder, data, redraw


def test_shapes_dtypes_and_supports(monkeypatch):
    guide = AutoAmortized(hierarchies.nested)
    guide()
    redraw(guide)
    # in chunks of two draws
    monkeypatch.setattr("pyro_artransform.guides.amortized.amortized_guide._CHUNK", 50)
    draws = guide.sample_posterior(7)
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == NESTED
    assert list(draws) == list(guide.prototype_trace.nodes)
    for name, site in guide.prototype_trace.nodes.items():
        assert len(draws[name]) == 7
        assert site["fn"].support.check(draws[name]).all()
    assert len(draws["cell"][:, 0, 0].unique()) == 7
    assert guide.log_prob(draws).shape == (7,)
    for name, value in guide.quantiles([0.1, 0.9], num_samples=30).items():
        assert value.shape == (2, *NESTED[name])


def test_density_by_quadrature():
    """The density of a global and an element integrates to one."""

    def model():
        pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("items", 1):
            pyro.sample("unit", dist.Beta(2.0, 2.0))

    guide = AutoAmortized(model, init_scale=1.0)
    guide()
    redraw(guide)
    rate, unit = torch.linspace(-9, 9, 181).exp(), torch.linspace(-12, 12, 241).sigmoid()
    grid = torch.cartesian_prod(rate, unit)
    with torch.no_grad():
        log_q = guide.log_prob({"rate": grid[:, 0], "unit": grid[:, 1:]})
    jacobian = grid[:, 0] * grid[:, 1] * (1 - grid[:, 1])
    assert abs((log_q.exp() * jacobian).sum() * 0.1 * 0.1 - 1) < 2e-3


def test_elements_with_an_encoder_are_those_of_the_arguments():
    guide = AutoAmortized(hierarchies.batched, Encoder())
    guide(data(4))
    redraw(guide)
    for size in (4, 9):
        draws = guide.sample_posterior(3, data(size))
        assert draws["z"].shape == (3, size)
        assert guide.log_prob(draws, data(size)).shape == (3,)
    with pytest.raises(ValueError, match=r"values: expected 'z' of shape \(3, 4\), got \(3, 9\)"):
        guide.log_prob(draws, data(4))


def test_elements_with_an_encoder_of_the_mini_batch_are_all():
    y = data()
    guide = AutoAmortized(hierarchies.minibatch, SubsamplingEncoder())
    guide(y)
    with torch.no_grad():
        guide.transform.locals[0].affine.linear.weight[:, 0] = 2.0
    medians = guide.median(y, num_samples=2_000)["z"]
    assert medians.shape == (12,)
    again = guide.median(y.flip(0), num_samples=2_000)["z"]
    assert (medians - again.flip(0)).abs().max() < 0.02 < medians.std()


def test_locals_depend_on_globals_and_on_their_parents():
    guide = AutoAmortized(hierarchies.nested)
    guide()
    # the context of a cell is its embedding, three globals, and the three latents of its parent
    weight = guide.transform.locals[2].affine.linear.weight
    assert weight.shape == (1, 8 + 3 + 3)
    for columns, sees_globals in ((slice(8, 11), True), (slice(11, 14), False)):
        with torch.no_grad():
            weight.zero_()
            weight[:, columns] = 2.0
        draws = guide.sample_posterior(4_000)
        rates = draws["rate"].log()
        cell = ((draws["cell"] + 1) / 3).logit()[:, 0, 0]
        others = [draws["scale"].log(), rates[:, 0], rates[:, 1]]
        found = torch.stack([cell, *others]).corrcoef()[0, 1:].abs()
        assert (found > 0.3).tolist() == [sees_globals, not sees_globals, False]
        assert (found < 0.1).tolist() == [not sees_globals, sees_globals, True]


def test_each_element_can_have_any_place_and_width():
    guide = AutoAmortized(hierarchies.groups)
    guide(data())
    places, widths = torch.linspace(-100.0, 100.0, 12), torch.logspace(-4, 3, 12)
    with torch.no_grad():
        local = guide.transform.locals[0]
        local.table[:, -2] = places - local.affine.loc
        local.table[:, -1] = (widths / 0.1).log()
    z = guide.sample_posterior(5_000)["z"]
    # five standard errors
    assert ((z.mean(0) - places) / widths).abs().max() < 5 / 5_000**0.5
    assert (z.std(0) / widths - 1).abs().max() < 5 / 10_000**0.5


@pytest.mark.parametrize(
    ("mean", "z", "message"),
    [
        ((3,), None, r"expected the sites \['mean', 'z'\], got \['mean'\]"),
        ((3,), (3, 5), r"'z' of shape \(3, 12\), got \(3, 5\)"),
        ((2,), (3, 12), r"'z' of shape \(2, 12\), got \(3, 12\)"),
        ((), (12,), r"'mean' of shape \(n,\) \+ site shape"),
    ],
)
def test_values_that_do_not_fit(mean, z, message):
    guide = AutoAmortized(hierarchies.groups)
    guide(data())
    values = {"mean": torch.zeros(mean)}
    if z is not None:
        values["z"] = torch.zeros(z)
    with pytest.raises(ValueError, match=message):
        guide.log_prob(values)
    with pytest.raises(ValueError, match="n: expected a positive integer, got 0"):
        guide.sample_posterior(0)
