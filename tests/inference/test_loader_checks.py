# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides of several parts, and those that need no indices; the rest is in test_loader.py."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal, AutoNormalMessenger

from pyro_artransform import AutoAmortized
from pyro_artransform.inference.loader import BatchStream
from pyro_artransform.inference.loader_checks import check_use
from pyro_artransform.joint import LogJoint
from tests.inference import loaders
from tests.inference.loaders import rows


def check(model, guide, size=10):
    _, y = rows()
    batches = BatchStream(y.split(size))
    with torch.no_grad():
        guide(y[:size])
    first = next(batches.one_pass(1))
    check_use(batches, guide, LogJoint(model, *first), first)


def unscaled(y):
    loaders.groups(y, len(y))


def in_parts(model, local):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["mean"])))
    guide.append(local(poutine.block(model, expose=["z"])))
    return guide


def encoded(model):
    return AutoAmortized(model, lambda y: y[:, None], local_flow=None)


def test_a_list_that_has_an_encoder():
    check(loaders.groups, in_parts(loaders.groups, encoded))
    with pytest.raises(ValueError, match=r"'z'.*create_plates"):
        check(loaders.groups, in_parts(loaders.groups, AutoNormal))
    with pytest.raises(ValueError, match="'mean' is of all batches"):
        check(unscaled, in_parts(unscaled, encoded))


def test_locals_that_share_their_parameters():
    guide = AutoNormalMessenger(loaders.groups, amortized_plates=("groups",))
    check(loaders.groups, guide)
    with pytest.raises(ValueError, match="create_plates"):
        check(loaders.groups, AutoNormalMessenger(loaders.groups))


def test_one_batch_can_be_anything():
    check(unscaled, AutoNormal(unscaled), size=43)
    check(loaders.groups, AutoAmortized(loaders.groups, local_flow=None), size=43)


def test_a_guide_that_is_a_function():
    """Nobody knows what it does with its arguments."""

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.7))

    check(model, guide)
    with pytest.raises(ValueError, match="'z' is of all batches"):
        check(model, AutoNormal(model))


def test_a_scale_of_everything_is_no_scaling_up():
    def normalised(y):
        with poutine.scale(scale=1 / 43):
            unscaled(y)

    def lifted(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with poutine.scale(scale=4.3), pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match="'mean' is of all batches"):
        check(normalised, encoded(normalised))
    check(lifted, AutoNormal(lifted))


def test_a_function_in_a_list_is_the_users():
    def local(y):
        with pyro.plate("groups", 43, subsample_size=len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    guide = AutoGuideList(loaders.groups)
    guide.append(AutoNormal(poutine.block(loaders.groups, expose=["mean"])))
    guide.append(local)
    check(loaders.groups, guide)
