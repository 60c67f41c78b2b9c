# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from pyro_artransform import affine_autoregressive, maf, spline_autoregressive
from pyro_artransform.testing import check_transform, redraw
from pyro_artransform.transforms import PartitionTransform


def new():
    return PartitionTransform(
        [([3, 0], maf(2, 2, 8)), ([1], spline_autoregressive(1, 8)), ([4, 2], maf(2, 1, 8).inv)]
    )


def test_contract():
    check_transform(new, 5)
    check_transform(lambda: new().inv, 5)


def test_each_part_sees_its_own_coordinates():
    jacobian = torch.autograd.functional.jacobian(redraw(new().double()), torch.randn(5))
    found = (jacobian != 0).nonzero().tolist()
    parts = [{0, 3}, {1}, {2, 4}]
    assert all(any({i, j} <= part for part in parts) for i, j in found)


def test_score():
    transform = redraw(new().double())
    x = torch.randn(6, 5)
    y, ladj, score = transform.call_and_score(x, -x)
    point = y.detach().requires_grad_()
    for back, back_ladj in (transform.inverse_and_ladj(point), transform.inverse_at(x, point)):
        log_prob = -0.5 * back.square().sum() + back_ladj.sum()
        assert torch.allclose(score, torch.autograd.grad(log_prob, point)[0], atol=1e-10)
        assert torch.allclose(back_ladj, -ladj, atol=1e-10)


@pytest.mark.parametrize("sets", [[[0, 0]], [[1, 2]], [[0], [2]], [[]], []])
def test_what_is_no_partition_is_refused(sets):
    with pytest.raises(ValueError, match="partition"):
        PartitionTransform([(part, affine_autoregressive(max(len(part), 1))) for part in sets])


def test_a_foreign_transform_is_refused():
    with pytest.raises(TypeError, match="of this package, got ExpTransform"):
        PartitionTransform([([0], torch.distributions.ExpTransform())])
