# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from pyro_artransform import plots


def draws(n=400):
    return {
        "tau": torch.randn(n).exp(),
        "theta": torch.randn(n, 2, 2),
        "count": torch.arange(n) % 3,
    }


def test_pairs_of_all_coordinates():
    given = draws()
    axes = plots.plot_pairs(given)
    assert axes.shape == (6, 6)
    bottom = [ax.get_xlabel() for ax in axes[-1]]
    assert bottom == [
        "tau",
        *(f"theta[{i}, {j}]" for i in range(2) for j in range(2)),
        "count",
    ]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == bottom
    # dots off the diagonal, a histogram on it
    assert all(bool(axes[i, j].collections) == (i != j) for i in range(6) for j in range(6))
    x = axes[2, 0].collections[0].get_offsets()
    assert torch.allclose(torch.tensor(x.data)[:, 0], given["tau"])


def test_pairs_over_a_reference():
    guide, reference = draws(), {k: 3 * v for k, v in draws(900).items()}
    axes = plots.plot_pairs(guide, reference, names=["tau", "theta[0, 1]"])
    assert axes.shape == (2, 2)
    sizes = [[len(dots.get_offsets()) for dots in ax.collections] for ax in axes.flatten()]
    # below the diagonal the guide is on top, above it the reference
    assert sizes == [[], [400, 900], [900, 400], []]
    legend = axes[0, 0].figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["reference", "guide"]
    low, high = axes[1, 0].get_xlim()
    assert low < 0.5
    assert high > reference["tau"].sort().values[-6]


def test_pairs_of_many_draws_are_thinned():
    axes = plots.plot_pairs({"z": torch.randn(50_001, 30)}, names=["z[0]", "z[1]"])
    assert 1000 < len(axes[1, 0].collections[0].get_offsets()) <= 2000


def test_bad_names():
    with pytest.raises(ValueError, match=r"names: expected some of \['tau', .*\], got 'mu'"):
        plots.plot_pairs(draws(), names=["mu"])
    with pytest.raises(ValueError, match=r"reference: expected the coordinates .* \['tau'\]"):
        plots.plot_pairs(draws(), {"theta": draws()["theta"]}, names=["tau"])


def test_draws_that_are_not_finite():
    spoilt = draws()
    spoilt["tau"][:2] = torch.nan
    with pytest.raises(ValueError, match="draws: expected finite numbers, got 2 of 'tau' that are"):
        plots.plot_pairs(spoilt)
    plots.plot_pairs(spoilt, names=["theta"])  # where they are not shown, they may be
