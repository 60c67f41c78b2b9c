# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform.joint import quantiles
from pyro_artransform.joint.quantiles import check_levels, quantiles_of


def test_quantiles_by_columns(monkeypatch):
    draws = torch.randn(1001, 3, 4)
    levels = torch.tensor([0.0, 0.3, 1.0])
    expected = torch.quantile(draws, levels, dim=0)
    for numbers in (2**23, 2500, 10):
        monkeypatch.setattr(quantiles, "_QUANTILE_NUMBERS", numbers)
        assert torch.equal(quantiles_of(draws, levels), expected)
    assert quantiles_of(draws[:, 0, 0], levels).shape == (3,)


@pytest.mark.parametrize("levels", [[-0.1], [0.5, 1.1], [float("nan")], []])
def test_bad_levels(levels):
    with pytest.raises(ValueError, match="expected numbers between 0 and 1, got"):
        check_levels("quantiles", levels, torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quantiles_in_half_precision(dtype):
    draws = torch.randn(1001, 3).to(dtype)
    levels = check_levels("quantiles", [0.05, 0.95], draws)
    assert torch.equal(levels, torch.tensor([0.05, 0.95], dtype=torch.float32))
    found = quantiles_of(draws, levels)
    assert found.dtype == dtype
    assert torch.equal(found, torch.quantile(draws.float(), levels, dim=0).to(dtype))
