# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch
from pyro.distributions import constraints

from pyro_artransform.joint.supports import same_support


def test_same_support():
    interval, same = constraints.interval, same_support
    assert same(interval(0.0, torch.ones(2)), interval(0.0, torch.ones(2)))
    assert not same(interval(0.0, torch.ones(2)), interval(0.0, torch.tensor([1.0, 2.0])))
    assert not same(interval(0.0, 1.0), constraints.half_open_interval(0.0, 1.0))
    nested = [constraints.independent(interval(0.0, upper), 1) for upper in (1.0, 1.0, 2.0)]
    assert same(nested[0], nested[1])
    assert not same(nested[0], nested[2])
    cat = [constraints.cat([interval(0.0, upper), constraints.real]) for upper in (1.0, 1.0, 2.0)]
    assert same(cat[0], cat[1])
    assert not same(cat[0], cat[2])
