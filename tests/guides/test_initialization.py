# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_median

from pyro_artransform.guides.initialization import StartingValues


def site(fn, **infer):
    return {"name": "x", "fn": fn, "infer": infer}


def test_discrete_sites():
    values = StartingValues(init_to_median)
    marked = site(dist.OneHotCategorical(torch.ones(3)), enumerate="parallel")
    assert values(marked).sum() == 1
    with pytest.raises(ValueError, match="site 'x' is discrete"):
        values(site(dist.OneHotCategorical(torch.ones(3))))


def test_other_sites_are_left_to_the_starting_function():
    values = StartingValues(init_to_median)
    value = values(site(dist.Normal(torch.tensor([-300.0, 40.0]), 1e-3).to_event(1)))
    assert torch.allclose(value, torch.tensor([-300.0, 40.0]), atol=0.01)
