# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit by mini-batches refuses, and what comes near it and is fine."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal, AutoNormalMessenger

from pyro_artransform import AutoAmortized, AutoStructuredFlow
from pyro_artransform.inference.loader import BatchStream, check_use
from pyro_artransform.model import LogJoint
from tests.inference import loaders
from tests.inference.loaders import listed, rows, shuffled, small
from tests.inference.test_fit_loader import check, fitted


def of_rows(y):
    """A guide without a batch has one latent for the first row of each."""
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def unscaled(y):
    loaders.groups(y, len(y))


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_latents_that_would_see_one_batch_only(kind):
    for model, name in ((unscaled, "mean"), (of_rows, "z")):
        refused = rf"'{name}' is shared by all batches.*subsample_size=len\(batch\)"
        with pytest.raises(ValueError, match=refused):
            fitted(model, kind(model), shuffled(rows()[1][:40]))


@pytest.mark.parametrize(
    "kind", [lambda m: AutoAmortized(m, flow=None, local_flow=None), AutoNormal]
)
def test_elements_that_are_looked_up_by_other_indices(kind):
    with pytest.raises(ValueError, match=r"'z'.*AutoAmortized\(model, encoder\).*create_plates="):
        fitted(loaders.groups, kind(loaders.groups), shuffled(rows()[1]))


def test_indices_that_are_given():
    model, create_plates = loaders.indexed, loaders.plate_of_indexed
    loader = shuffled(rows()[1], torch.arange(43))
    guide = AutoAmortized(model, flow=None, local_flow=None, create_plates=create_plates)
    check(fitted(model, guide, loader, epochs=2), 10)
    check(fitted(model, AutoNormal(model, create_plates=create_plates), loader, epochs=2), 10)


def pairs(i, y):
    z = pyro.sample("z", dist.Normal(y.new_zeros(5), 1.0).to_event(1))
    with pyro.plate("pairs", 4, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(z[..., i] - z[..., i + 1], 0.3), obs=y)


def test_a_graph_of_the_first_batch_alone():
    data = torch.arange(4), torch.randn(4)
    loader = list(zip(*(tensor.split(1) for tensor in data)))
    with pytest.raises(
        ValueError, match=r"z\[1\] and z\[2\], z\[2\] and z\[3\], .*set_up\(\*all_data\)"
    ):
        fitted(pairs, AutoStructuredFlow(pairs), loader, epochs=1)
    guide = AutoStructuredFlow(pairs, hidden_dim=2)
    guide.set_up(*data)
    result = check(fitted(pairs, guide, loader, epochs=2), 8)
    assert "dependencies" not in result.verdict


def test_dependencies_of_other_batches_that_are_off_at_the_start():
    def switched(i, y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("all", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))[..., i]
        with pyro.plate("others", 4):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))[..., i]
        with pyro.plate("data", 3, subsample_size=len(y)):
            # on for x > 2 only, where the search does not look
            loc = z + torch.where(x > 2, 0.1 * w, 0.0 * w)
            pyro.sample("y", dist.Normal(loc + 3 * x, 0.1), obs=y)

    loader = [(torch.tensor([k]), torch.tensor([9.0])) for k in range(3)]
    result = fitted(switched, AutoStructuredFlow(switched, hidden_dim=2), loader, epochs=10)
    assert not result.trusted
    assert "w[0] and z[0], w[1] and z[1], w[2] and z[2]" in result.verdict


def test_latents_of_a_short_last_batch():
    """Half of the model sees all rows, and the other has a latent for each of the batch."""

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 43, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"other latents with these arguments.*\(3,\)"):
        fitted(model, small(model), listed(rows()[1])[::-1], epochs=1)


def check_alone(model, guide, size=10):
    _, y = rows()
    batches = BatchStream(y.split(size))
    with torch.no_grad():
        guide(y[:size])
    first = next(batches.one_pass(1))
    check_use(batches, guide, LogJoint(model, *first), first)


def in_parts(model, local):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["mean"])))
    guide.append(local(poutine.block(model, expose=["z"])))
    return guide


def encoded(model):
    return AutoAmortized(model, lambda y: y[:, None], local_flow=None)


def test_guides_whose_locals_are_those_of_their_rows():
    def local(y):
        with pyro.plate("groups", 43, subsample_size=len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    check_alone(loaders.groups, in_parts(loaders.groups, encoded))
    check_alone(loaders.groups, in_parts(loaders.groups, lambda model: local))
    check_alone(loaders.groups, AutoNormalMessenger(loaders.groups, amortized_plates=("groups",)))
    for guide in (in_parts(loaders.groups, AutoNormal), AutoNormalMessenger(loaders.groups)):
        with pytest.raises(ValueError, match=r"'z'.*create_plates"):
            check_alone(loaders.groups, guide)
    with pytest.raises(ValueError, match="'mean' is shared by all batches"):
        check_alone(unscaled, in_parts(unscaled, encoded))


def test_a_guide_that_is_a_function():
    """Nobody knows what it does with its arguments."""

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.7))

    check_alone(of_rows, guide)
    with pytest.raises(ValueError, match="'z' is shared by all batches"):
        check_alone(of_rows, AutoNormal(of_rows))


def test_a_scale_of_everything_is_no_scaling_up():
    def normalised(y):
        with poutine.scale(scale=1 / 43):
            unscaled(y)

    def lifted(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with poutine.scale(scale=4.3), pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match="'mean' is shared by all batches"):
        check_alone(normalised, encoded(normalised))
    check_alone(lifted, AutoNormal(lifted))
