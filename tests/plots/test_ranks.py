# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform import plots
from pyro_artransform.diagnostics import SBC


def test_ranks(ax):
    """The lines are the empirical distribution functions; those of right posteriors in the bands."""
    ranks = torch.arange(200) // 2
    result = SBC({"a": ranks, "b": torch.stack([ranks, ranks * 0], 1)}, 99)
    assert plots.plot_ranks(result, ax=ax) is ax
    _, *lines = ax.get_lines()
    assert len(lines) == 3
    assert torch.tensor(lines[0].get_ydata()).abs().max() < 1e-12
    wrong = torch.tensor(lines[2].get_ydata())
    points = torch.tensor(lines[2].get_xdata())
    assert torch.allclose(wrong, 1 - points)
    band = ax.collections[0].get_paths()[0].vertices
    assert 0.05 < band[:, 1].max() < 0.2
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["95 % of right posteriors", "a", "b"]


def test_ranks_of_some_sites():
    result = SBC({"a": torch.arange(50), "b": torch.arange(50)}, 49)
    ax = plots.plot_ranks(result, names=["b"], level=0.5)
    assert len(ax.get_lines()) == 2
    with pytest.raises(ValueError, match=r"names: expected some of \['a', 'b'\], got \['c'\]"):
        plots.plot_ranks(result, names=["c"])
