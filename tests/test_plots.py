# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro import distributions as dist

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from pyro_artransform import AutoStructuredFlow, plots  # noqa: E402
from pyro_artransform.diagnostics import SBC, Importance, fit_tail  # noqa: E402


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots()[1]


def history(n=500):
    return (-30 - 500 * torch.exp(-torch.arange(n) / 20.0) - torch.rand(n)).tolist()


# The ELBO


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda h: SimpleNamespace(history=h)])
def test_elbo(ax, kind):
    steps = history()
    assert plots.plot_elbo(kind(steps), ax=ax) is ax
    curve, median = ax.get_lines()
    assert curve.get_ydata().tolist() == pytest.approx(steps)
    assert curve.get_xdata()[0] == 1
    low, high = ax.get_ylim()
    # the last nine tenths are all there, the first steps are not
    assert low < min(steps[50:])
    assert high > max(steps)
    assert low > min(steps)
    assert median.get_ydata()[300] == pytest.approx(sorted(steps[290:311])[10])
    assert ax.get_ylabel() == "ELBO (nats)"


@pytest.mark.parametrize("steps", [[1.0], [2.0] * 30, [math.nan, 1.0, 2.0], [math.nan] * 3])
def test_elbo_of_odd_histories(steps):
    assert isinstance(plots.plot_elbo(steps), Axes)


def test_elbo_of_nothing():
    with pytest.raises(ValueError, match="expected the ELBO of at least one step"):
        plots.plot_elbo([])


# Pairs


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
    assert all(bool(ax.collections) == (i != j) for (i, j), ax in _places(axes))
    x = axes[2, 0].collections[0].get_offsets()
    assert torch.allclose(torch.tensor(x.data)[:, 0], given["tau"])


def _places(axes):
    return [((i, j), axes[i, j]) for i in range(len(axes)) for j in range(len(axes))]


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


def test_pairs_by_site():
    axes = plots.plot_pairs(draws(), names=["theta"])
    assert axes.shape == (4, 4)
    assert plots.plot_pairs({"z": torch.randn(50, 30)}).shape == (8, 8)


def test_pairs_of_many_draws_are_thinned():
    axes = plots.plot_pairs({"z": torch.randn(50_001, 2)})
    assert 1000 < len(axes[1, 0].collections[0].get_offsets()) <= 2000


def test_pairs_of_a_constant():
    assert plots.plot_pairs({"z": torch.ones(20, 2)}).shape == (2, 2)


def test_bad_names():
    with pytest.raises(ValueError, match=r"names: expected some of \['tau', .*\], got 'mu'"):
        plots.plot_pairs(draws(), names=["mu"])
    with pytest.raises(ValueError, match=r"reference: expected the coordinates .* \['tau'\]"):
        plots.plot_pairs(draws(), {"theta": draws()["theta"]}, names=["tau"])


# Ranks


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


# k-hat


def test_khat(ax):
    weights = 0.6 * torch.empty(10_000).exponential_()
    result = Importance.from_log_weights(weights)
    assert plots.plot_khat(result, ax=ax) is ax
    assert ax.get_title() == f"k-hat = {result.khat:.2f} ± {result.khat_se:.2f}"
    dots, line = ax.get_lines()
    x, y = (torch.tensor(axis) for axis in dots.get_data())
    assert x[0] == pytest.approx((weights.max() - result.log_evidence).exp().item())
    assert torch.allclose(y[:3] * 10_000, torch.tensor([0.5, 1.5, 2.5]))
    # at the same shares the fitted weights are near the weights
    fitted = torch.tensor(line.get_xdata())
    assert len(fitted) == fit_tail(weights).size
    assert (fitted[20:] / x[20 : len(fitted)]).log().abs().max() < 0.3


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


# The graph of latents


def chain(size):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
    steps = dist.Normal(z[..., :-1], scale[..., None])
    pyro.factor("steps", steps.log_prob(z[..., 1:]).sum(-1))


def guide_of_chain(size):
    guide = AutoStructuredFlow(chain)
    guide(size)
    return guide


def cells(ax):
    """Of the fill-in, of the order of the model, and of that of the guide; NaN where nothing is."""
    return [torch.from_numpy(image.get_array().filled(math.nan)) for image in ax.images]


def test_graph(ax):
    guide = guide_of_chain(11)
    assert plots.plot_graph(guide, ax=ax) is ax
    names, levels = guide.graph.names, guide.graph.levels
    level = {name: k for k, members in enumerate(levels) for name in members}
    by_level = [name for members in levels for name in members]
    filled, *squares = cells(ax)
    for order, square in zip((names, by_level), squares):
        for (i, one), (j, two) in product(enumerate(order), repeat=2):
            if one == two or two in guide.graph.neighbours(*one):
                assert square[i, j] == max(level[one], level[two])
            else:
                assert square[i, j].isnan()
    for (i, one), (j, two) in product(enumerate(by_level), repeat=2):
        own = two in guide.graph.parents(*one) and two not in guide.graph.neighbours(*one)
        other = one in guide.graph.parents(*two) and one not in guide.graph.neighbours(*two)
        assert (not filled[i, j].isnan()) == (own or other)
    assert not filled.isnan().all()


def test_graph_names_large_sites_and_levels(ax):
    guide = guide_of_chain(60)
    plots.plot_graph(guide.graph, ax=ax)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    last = len(guide.graph.levels) - 1
    # the scale is too small to be named
    assert (labels[0], labels[-1]) == ("z", f"level {last}")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["z"]
    assert ax.get_xticks()[0] == ax.get_yticks()[0] == 31
    assert ax.get_xlim()[1] > ax.get_xticks()[-1] > 61


def test_graph_of_many_latents_shows_all_dependencies(ax):
    guide = guide_of_chain(999)
    plots.plot_graph(guide, ax=ax)
    _, of_model, _ = cells(ax)
    assert of_model.shape == (200, 200)
    near = torch.eye(200, dtype=torch.bool)
    near[1:] |= near[:-1].clone()
    near |= near.mT.clone()
    near[0] = near[:, 0] = True  # the scale
    assert not of_model[near].isnan().any()
    assert of_model[~near].isnan().all()


def test_graph_of_one_latent():
    guide = AutoStructuredFlow(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    guide()
    ax = plots.plot_graph(guide)
    ax.figure.canvas.draw()
    assert [tuple(square.shape) for square in cells(ax)] == [(1, 1)] * 3
    assert "gray" not in " ".join(text.get_text() for text in ax.texts)


def test_graph_of_a_guide_before_its_first_call():
    with pytest.raises(RuntimeError, match="call"):
        plots.plot_graph(AutoStructuredFlow(chain))


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
import pyro_artransform
try:
    import pyro_artransform.plots
except ImportError as error:
    print(error)
"""


def test_without_matplotlib():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "plots need matplotlib: pip install pyro_artransform[plots]"
