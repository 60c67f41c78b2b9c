# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform import hinged_marginals
from pyro_artransform.conditioners import Unconditional
from pyro_artransform.testing import check_transform, redraw


def test_the_same_parameters_for_every_x():
    conditioner = redraw(Unconditional(3, 2))
    params = conditioner(torch.randn(4, 5, 3))
    assert params.shape == (4, 5, 3, 2)
    assert torch.equal(params, conditioner.params.expand_as(params))


def test_the_jacobian_is_diagonal():
    t = redraw(hinged_marginals(4))
    jacobian = torch.autograd.functional.jacobian(t, torch.randn(4))
    assert (jacobian.diagonal() > 0).all()
    assert not (jacobian - jacobian.diagonal().diag()).any()


def test_it_makes_a_transform():
    check_transform(lambda: hinged_marginals(3), 3)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="num_params"):
        Unconditional(3, 0)
    with pytest.raises(ValueError, match=r"expected shape \(\*, 3\), got \(2,\)"):
        Unconditional(3, 1)(torch.zeros(2))
