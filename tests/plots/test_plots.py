# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import importlib
import math
import sys
from itertools import product
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoStructuredFlow
from pyro_artransform.diagnostics import Importance, Marginals, fit_tail

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("Agg")

from pyro_artransform import plots  # noqa: E402


@pytest.fixture(autouse=True)
def ax():
    yield plt.subplots()[1]
    plt.close("all")


def limits(ax):
    return (*ax.get_xlim(), *ax.get_ylim())


def history(n=500):
    return (-30 - 500 * torch.exp(-torch.arange(n) / 20.0) - torch.rand(n)).tolist()


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda h: SimpleNamespace(history=h)])
def test_elbo(ax, kind):
    steps = history()
    assert plots.plot_elbo(kind(steps), ax=ax) is ax
    curve, median = ax.get_lines()
    assert curve.get_ydata().tolist() == pytest.approx(steps)
    assert curve.get_xdata()[0] == 1
    low, high = ax.get_ylim()
    # the last nine tenths are all there, the first steps are not
    assert min(steps) < low < min(steps[50:])
    assert high > max(steps)
    assert median.get_ydata()[300] == pytest.approx(sorted(steps[290:311])[10])
    assert ax.get_ylabel() == "ELBO (nats)"


@pytest.mark.parametrize("steps", [[1.0], [math.nan, 1.0, 2.0], [math.nan] * 3])
def test_elbo_of_odd_histories(steps):
    assert isinstance(plots.plot_elbo(steps), plt.Axes)
    with pytest.raises(ValueError, match="expected the ELBO of at least one step"):
        plots.plot_elbo([])


def test_khat(ax):
    weights = 0.6 * torch.empty(10_000).exponential_()
    result = Importance.from_log_weights(weights)
    assert plots.plot_khat(result, ax=ax) is ax
    assert ax.get_title() == f"k-hat = {result.khat:.2f} ± {result.khat_se:.2f}"
    dots, line, limit = ax.get_lines()
    x, y = (torch.as_tensor(axis) for axis in dots.get_data())
    assert x[0] == pytest.approx((weights.max() - result.log_evidence).exp().item())
    assert torch.allclose(y[:3] * 10_000, torch.tensor([0.5, 1.5, 2.5]))
    # at the same shares the fitted weights are near the weights
    fitted = torch.as_tensor(line.get_xdata())
    assert len(fitted) == fit_tail(weights).size
    assert (fitted[20:] / x[20 : len(fitted)]).log().abs().max() < 0.3
    # the tail that is the limit begins there too, and has larger weights
    bound = torch.as_tensor(limit.get_xdata())
    assert bound[-1].item() == pytest.approx(fitted[-1].item(), rel=1e-2)
    assert bound[0] > fitted[0]


@pytest.mark.parametrize(
    "weights",
    [
        torch.full((100,), -math.inf),
        torch.cat([torch.randn(99), torch.tensor([math.nan])]),
        torch.randn(3),
    ],
)
def test_khat_of_odd_weights(weights):
    ax = plots.plot_khat(Importance.from_log_weights(weights))
    ax.figure.canvas.draw()
    assert ax.get_title().startswith("k-hat = ")


def known_marginals(size=40):
    """Errors of a scalar ``m`` and of ``z``, whose last coordinates are off by most."""
    shift = {"m": torch.tensor(0.02), "z": torch.linspace(-0.1, 0.5, size)}
    ratio = {"m": torch.tensor(0.99), "z": torch.linspace(1.05, 0.6, size)}
    small = {name: torch.full_like(value, 0.02) for name, value in shift.items()}
    bounds = {"mean_bound": 0.55, "sd_bound": 0.45}
    return Marginals(shift, small, ratio, small, **bounds, trusted=False, is_off=False, words="")


def test_marginals(ax):
    found = known_marginals()
    assert plots.plot_marginals(found, ax=ax) is ax
    assert ax.get_title() == "means within 0.55 posterior sd, sds within 45 %"
    m, z = ax.containers
    assert (m.get_label(), z.get_label()) == ("m", "z")
    x, y = (torch.as_tensor(list(values)) for values in z.lines[0].get_data())
    torch.testing.assert_close(x, found.mean_shift["z"])
    torch.testing.assert_close(y, 100 * (found.sd_ratio["z"] - 1))
    segment = z.lines[2][0].get_segments()[0]
    assert segment[1, 0] - segment[0, 0] == pytest.approx(2 * 0.02)
    # all dots are there, and the box of errors that are small enough
    assert limits(ax) == pytest.approx((-0.55, 0.55, -44.0, 44.0))
    (box,) = ax.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((-0.15, -15.0), 0.3, 30.0)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pyro_artransform.plots")
    with pytest.raises(ImportError, match="plots need matplotlib: pip install matplotlib"):
        importlib.import_module("pyro_artransform.plots")


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
    """In the order of the model, and in that of the guide; NaN where nothing is, -1 for fill-in."""
    return [
        torch.from_numpy(image.get_array().filled(math.nan))
        for square in ax.child_axes
        for image in square.images
    ]


def test_graph(ax):
    guide = guide_of_chain(11)
    assert plots.plot_graph(guide, ax=ax) is ax
    names, levels = guide.graph.names, guide.graph.levels
    level = {name: k for k, members in enumerate(levels) for name in members}
    by_level = [name for members in levels for name in members]
    of_model, of_guide = cells(ax)
    assert (of_guide == -1).any()
    for order, square in ((names, of_model), (by_level, of_guide)):
        for (i, one), (j, two) in product(enumerate(order), repeat=2):
            is_parent = two in guide.graph.parents(*one) or one in guide.graph.parents(*two)
            if one == two or two in guide.graph.neighbours(*one):
                assert square[i, j] == max(level[one], level[two])
            elif is_parent and square is of_guide:
                assert square[i, j] == -1
            else:
                assert square[i, j].isnan()


def test_graph_of_many_latents_shows_all_dependencies(ax):
    guide = guide_of_chain(399)
    plots.plot_graph(guide, ax=ax)
    of_model, _ = cells(ax)
    assert of_model.shape == (200, 200)
    near = torch.eye(200, dtype=torch.bool)
    near[1:] |= near[:-1].clone()
    near |= near.mT.clone()
    near[0] = near[:, 0] = True  # the scale
    assert not of_model[near].isnan().any()
    assert of_model[~near].isnan().all()


def test_parts_of_the_result_of_a_fit():
    found = SimpleNamespace(marginals=known_marginals(), verdict="")
    assert (
        plots.plot_marginals(found).get_title() == plots.plot_marginals(found.marginals).get_title()
    )
    with pytest.raises(
        ValueError, match="with importance, got none from this fit: of mini-batches"
    ):
        plots.plot_khat(SimpleNamespace(importance=None, verdict="of mini-batches"))
