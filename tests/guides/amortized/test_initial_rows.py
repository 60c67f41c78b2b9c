# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Initial values by row: each element with an embedding starts at its own."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_mean, init_to_median, init_to_value

from pyro_artransform import AutoAmortized, fit
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import SIZE, data

ROWS = torch.linspace(-3.0, 9.0, SIZE)


def centers(guide, *args):
    """The mean of the guide's draws, by site; exact but for the noise of narrow draws."""
    return {k: v.mean(0) for k, v in guide.sample_posterior(200, *args).items()}


def new(model, values, **options):
    start = init_to_value(values=values, fallback=init_to_mean)
    return AutoAmortized(model, init_loc_fn=start, init_scale=1e-3, **options)


@pytest.mark.parametrize("coordinates", ["model", "prior", {"z": 0.0}, {"z": 0.7}])
@pytest.mark.parametrize("model", [hierarchies.groups, hierarchies.minibatch])
def test_each_element_starts_at_its_value(model, coordinates):
    """The whole plate has values, also if the model subsamples it."""
    guide = new(model, {"mean": torch.tensor(2.0), "z": ROWS}, coordinates=coordinates)
    found = centers(guide, data())
    assert (found["z"] - ROWS).abs().max() < 0.01
    assert abs(found["mean"] - 2.0) < 0.01


def test_another_start_of_coordinates_keeps_the_rows():
    guide = new(hierarchies.minibatch, {"mean": torch.tensor(2.0), "z": ROWS})
    guide(data())
    density = guide.log_joint_of(hierarchies.minibatch, (data(),), {})
    change = guide.center_at(torch.randn(20, 5), density, 1 / 3)
    assert change > 0
    assert (centers(guide)["z"] - ROWS).abs().max() < 0.01


def test_nested_plates_and_supports():
    """Sites in one plate with values and without, and of constrained values."""
    cell = torch.linspace(-0.9, 1.9, 24).reshape(4, 6)
    probs = torch.eye(3).repeat(2, 1) * 0.7 + 0.1
    guide = new(hierarchies.nested, {"cell": cell, "probs": probs})
    found = centers(guide)
    assert (found["cell"] - cell).abs().max() < 0.01
    assert (found["probs"] - probs).abs().max() < 0.01
    assert (found["rate"] - found["rate"].mean()).abs().max() < 0.01


def test_random_initial_values_are_averaged():
    guide = AutoAmortized(hierarchies.groups, init_loc_fn=init_to_median, init_scale=1e-3)
    z = centers(guide, data())["z"]
    assert (z - z.mean()).abs().max() < 0.01
    encoded = new(hierarchies.groups, {"z": ROWS}, encoder=lambda y: y[:, None])
    z = centers(encoded, data())["z"]
    assert (z - ROWS.mean()).abs().max() < 0.01


def test_the_mini_batch_of_a_model_has_its_rows():
    """The first run has the values of the rows that its plate drew."""
    runs = []

    def model(y):
        with pyro.plate("groups", SIZE, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            runs.append((z, ROWS[index]))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])

    guide = new(model, {"z": ROWS})
    assert (centers(guide, data())["z"] - ROWS).abs().max() < 0.01
    assert torch.equal(*runs[0])


def test_a_fit_goes_on_from_the_rows():
    """Two modes by element, of which the initial values choose."""

    def model():
        with pyro.plate("groups", SIZE, subsample_size=6):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.factor("both", -2 * (z.abs() - 3.0) ** 2)

    sign = torch.tensor([1.0, -1.0]).repeat(SIZE // 2)
    guide = new(model, {"z": 3.0 * sign})
    fit(model, guide, num_steps=300, num_particles=8, seed=0, progress=False)
    z = centers(guide)["z"]
    assert (z.sign() == sign).all()
    assert (z.abs() - 3.0).abs().max() < 0.5
