# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_artransform import plots
from pyro_artransform.diagnostics import Importance, fit_tail


def test_khat(ax):
    weights = 0.6 * torch.empty(10_000).exponential_()
    result = Importance.from_log_weights(weights)
    assert plots.plot_khat(result, ax=ax) is ax
    assert ax.get_title() == f"k-hat = {result.khat:.2f} ± {result.khat_se:.2f}"
    dots, line, limit = ax.get_lines()
    x, y = (torch.tensor(axis) for axis in dots.get_data())
    assert x[0] == pytest.approx((weights.max() - result.log_evidence).exp().item())
    assert torch.allclose(y[:3] * 10_000, torch.tensor([0.5, 1.5, 2.5]))
    # at the same shares the fitted weights are near the weights
    fitted = torch.tensor(line.get_xdata())
    assert len(fitted) == fit_tail(weights).size
    assert (fitted[20:] / x[20 : len(fitted)]).log().abs().max() < 0.3
    # the tail that is the limit begins there too, and has larger weights
    bound = torch.tensor(limit.get_xdata())
    assert bound[-1].item() == pytest.approx(fitted[-1].item(), rel=1e-2)
    assert bound[0] > fitted[0]


@pytest.mark.parametrize(
    "weights",
    [
        torch.zeros(100),
        torch.full((100,), -math.inf),
        torch.cat([torch.randn(99), torch.tensor([math.nan])]),
        torch.tensor([0.0] * 99 + [60.0]),
        torch.randn(3),
        torch.zeros(100).index_fill(0, torch.tensor([3]), -math.inf),
    ],
)
def test_khat_of_odd_weights(weights):
    ax = plots.plot_khat(Importance.from_log_weights(weights))
    ax.figure.canvas.draw()
    assert ax.get_title().startswith("k-hat = ")
