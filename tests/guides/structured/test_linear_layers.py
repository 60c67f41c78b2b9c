# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The linear layers of a structured flow."""

import torch

from pyro_artransform.guides.structured.linear_layers import LinearLinks, LowRankUpdate
from pyro_artransform.testing import check_transform

PARENTS = [(), (0,), (0, 1), (1, 2), ()]


def links():
    return LinearLinks(PARENTS, [0, 1, 2, 3, 0])


def links_with_coefficients():
    transform = links()
    transform.set_(torch.tensor([0.5, -1.5, 2.0, 0.3, -0.7]))
    return transform


def test_contracts():
    check_transform(lambda: LowRankUpdate([1, 3, 4], 2), 5)
    check_transform(links_with_coefficients, 5)


def test_identity_at_first():
    x = torch.randn(3, 5)
    for transform in (LowRankUpdate([1, 3, 4], 2), links()):
        y, ladj = transform.call_and_ladj(x)
        assert torch.equal(y, x)
        assert not ladj.any()


def test_links_are_level_by_level():
    """A coordinate reads the values of its parents, not their noise."""
    transform = links()
    transform.set_(torch.ones(5))
    y, _ = transform.call_and_ladj(torch.ones(1, 5))
    assert y.tolist() == [[1.0, 2.0, 4.0, 7.0, 1.0]]


def test_factors_along_columns():
    transform = LowRankUpdate([0, 2], 1)
    transform.set_(torch.tensor([[0.6], [0.8]]), torch.tensor([3.0]))
    y, ladj = transform.call_and_ladj(torch.tensor([[0.6, 5.0, 0.8], [0.8, 5.0, -0.6]]))
    assert torch.allclose(y, torch.tensor([[1.8, 5.0, 2.4], [0.8, 5.0, -0.6]]))
    assert torch.allclose(ladj, torch.tensor(3.0).log())
