# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.moments import check_rows, location_and_scale


def test_moments():
    rows = torch.randn(500, 3) @ torch.randn(3, 3) * torch.tensor([1e4, 1.0, 1e-4]) + 7
    loc, scale = location_and_scale("rows", rows)
    torch.testing.assert_close(loc, rows.mean(0))
    torch.testing.assert_close(scale @ scale.T, rows.T.cov())
    assert not scale.triu(1).any()
    loc, scale = location_and_scale("rows", rows, full_rank=False)
    torch.testing.assert_close(scale, rows.std(0))


def test_one_coordinate():
    loc, scale = location_and_scale("rows", torch.tensor([[1.0], [3.0]]), full_rank=True)
    assert loc.item() == 2.0
    assert scale.tolist() == [[pytest.approx(2**0.5)]]


@pytest.mark.parametrize(("shape", "dims"), [((29, 3), 1), ((30, 3), 2), ((2010, 201), 1)])
def test_correlations_where_there_are_enough_rows(shape, dims):
    assert location_and_scale("rows", torch.randn(shape))[1].dim() == dims


def test_errors_name_the_rows():
    rows = torch.randn(50, 2)
    with pytest.raises(
        ValueError, match=r"x: expected coordinates that vary, got constant ones: \[1\]"
    ):
        location_and_scale("x", rows * torch.tensor([1.0, 0.0]))
    with pytest.raises(
        ValueError, match="x: expected coordinates none of which is a linear function"
    ):
        location_and_scale("x", torch.cat([rows, rows.sum(-1, keepdim=True)], -1))
    with pytest.raises(ValueError, match="x: expected finite numbers, got others in 1 of 50 rows"):
        check_rows("x", rows.index_fill(0, torch.tensor([3]), torch.inf))
    with pytest.raises(
        ValueError, match=r"x: expected shape \(n, D\) with two rows or more, got \(50,\)"
    ):
        check_rows("x", rows[:, 0])


def test_rows_have_no_graph():
    rows = torch.randn(5, 2, requires_grad=True)
    assert not check_rows("rows", rows).requires_grad
    assert check_rows("rows", [[1, 2], [3, 4]]).dtype == torch.get_default_dtype()
