# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from pyro_artransform.testing import check_transform
from pyro_artransform.transforms import PermutationTransform


@pytest.mark.parametrize("order", [[0], [1, 0], [2, 0, 3, 1]])
def test_contract(order):
    check_transform(lambda: PermutationTransform(order), len(order))


def test_order_is_restored_by_the_state_dict():
    t, other = PermutationTransform([2, 0, 1]), PermutationTransform([0, 1, 2])
    other.load_state_dict(t.state_dict())
    assert torch.equal(other(torch.arange(3.0)), torch.tensor([2.0, 0.0, 1.0]))


@pytest.mark.parametrize("order", [[1, 2], [0, 0], [[0, 1]], 3])
def test_bad_order(order):
    with pytest.raises(ValueError, match="permutation"):
        PermutationTransform(order)


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected shape \(\*, 2\), got \(5, 3\)"):
        PermutationTransform([1, 0])(torch.zeros(5, 3))
