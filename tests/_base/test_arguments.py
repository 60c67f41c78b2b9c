# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from pyro_artransform._base.arguments import check_integer, check_positive, shown
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
