# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from pyro_artransform._base.arguments import check_integer, check_positive, shown
from pyro_artransform._base.comparison import agree, of_reordered_sums
from pyro_artransform._base.levels import graph_levels
from pyro_artransform.flows.transforms import PermutationTransform


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([1, 2]), "tensor([1, 2])"),
        (torch.ones(1000, 2), "a Tensor of shape (1000, 2)"),
        (np.ones(1000), "a ndarray of shape (1000,)"),
        (list(range(1000)), f"{repr(list(range(1000)))[:80]}..."),
        ("a", "'a'"),
    ],
)
def test_values_in_errors_are_short(value, words):
    assert shown(value) == words


def test_errors_do_not_print_whole_tensors():
    for check in (check_integer, check_positive):
        with pytest.raises(ValueError, match=r"got a Tensor of shape \(1000,\)$"):
            check("draws", torch.ones(1000))
    with pytest.raises(ValueError, match=r"got \[0, 0, .*\.\.\.$") as found:
        PermutationTransform(torch.zeros(1000, dtype=torch.long))
    assert len(str(found.value)) < 200


def test_levels_are_longest_paths():
    assert graph_levels([[], [0], [0, 1], [], [3]]) == [0, 1, 2, 0, 1]
    assert graph_levels([[], [0], [], []], root=[0]) == [0, 1, 1, 1]
    for parents, message in (([[1], [0]], "without a cycle"), ([[2], []], "from 0 to 1, got 2")):
        with pytest.raises(ValueError, match=message):
            graph_levels(parents)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def test_values_agree_up_to_a_tolerance_of_their_dtype():
    x = torch.tensor([1.0, torch.nan])
    assert agree({"x": x}, {"x": x + 1e-10})
    assert agree({"x": x.float()}, {"x": x.float() + 1e-5})
    assert agree([x, x + 1], [x, x + 1.1], rtol=0.0, atol=0.2)
    for other in (x + 1e-5, x[:1], x.float(), torch.tensor([1.0, 2.0])):
        assert not agree({"x": x}, {"x": other})
    assert not agree({"x": x}, {"y": x})
    assert not agree([x], [x, x])


@DTYPES
def test_an_element_is_not_excused_by_others_that_are_large_or_not_finite(dtype):
    """3 nats are no round-off beside a draw of 1e27, nor is one that is not finite."""
    expected = torch.randn(64, dtype=dtype)
    expected[0], expected[1], expected[2] = 1e27, torch.nan, -torch.inf
    exact = expected * (1 + 4 * torch.finfo(dtype).eps)
    for found in (expected.clone(), exact):
        assert agree([found], [expected], 0.0, of_reordered_sums)
    for row in range(1, 6):
        found = expected.clone()
        found[row] = 3.0 if row in (1, 2) else found[row] + 3e-3
        assert not agree([found], [expected], 0.0, of_reordered_sums)
        nearby = [[found], [expected]]  # a difference at arguments that differ by round-off
        assert agree([found], [expected], 0.0, of_reordered_sums, nearby) == (row > 2)


@DTYPES
def test_an_element_is_excused_by_the_largest_of_its_row(dtype):
    """The gradient of a draw is a sum of terms as large as others of this draw, but not of others."""
    expected = torch.ones(5, 3, dtype=dtype)
    expected[2, 0] = 1e6
    error = torch.zeros_like(expected)
    error[:, 1] = 1e6 * torch.finfo(dtype).eps
    is_row = torch.arange(5)[:, None] == 2
    assert agree([expected + is_row * error], [expected], 0.0, of_reordered_sums)
    assert not agree([expected + ~is_row * error], [expected], 0.0, of_reordered_sums)
