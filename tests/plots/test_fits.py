# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from types import SimpleNamespace

import pytest
import torch
from matplotlib.axes import Axes

from pyro_artransform import FitResult, plots
from pyro_artransform.diagnostics import Importance
from tests.plots.known_marginals import known_marginals


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


# A fit


def result(weights=None, marginals=None, steps=500):
    """What a fit returns, of given log weights; without them it is that of mini-batches."""
    found = None if weights is None else Importance.from_log_weights(weights)
    numbers = ("elbo", "elbo_se", "log_evidence", "log_evidence_se", "khat", "khat_se", "ess")
    known = {"elbo": -30.9, "elbo_se": 0.1} if found is None else vars(found)
    return FitResult(
        **{name: known.get(name, math.nan) for name in numbers},
        num_samples=0 if found is None else found.num_samples,
        trusted=False,
        verdict="Not trusted: " + "a long sentence that says why, and " * 12,
        history=history(steps),
        num_steps=steps,
        num_skipped=0,
        num_gradients=0,
        seconds=1.0,
        stopped_because="",
        start="",
        end="",
        step_size=None,
        importance=found,
        marginals=marginals,
    )


def weights(n=2000):
    return 0.3 * torch.empty(n).exponential_() - 31


def test_fit_of_many_latents():
    found = result(weights(), known_marginals())
    axes = plots.plot_fit(found)
    assert len(axes) == 3
    elbo, tail, marginals = axes
    assert elbo.get_title() == f"ELBO = {found.elbo:.3f} ± {found.elbo_se:.3f}"
    ends = {line.get_label(): line.get_ydata()[0] for line in elbo.get_lines()[2:]}
    assert ends == {"ELBO at the end": found.elbo, "log evidence": found.log_evidence}
    low, high = elbo.get_ylim()
    assert low < min(ends.values()) < max(ends.values()) < high
    assert tail.get_title().startswith("k-hat = ")
    assert marginals.get_ylabel() == "sd too large by (%)"
    words = elbo.figure.get_suptitle()
    assert words.replace("\n", " ") == found.verdict.strip()
    elbo.figure.canvas.draw()


def test_panels_are_of_what_is_known():
    assert len(plots.plot_fit(result(weights()))) == 2
    (elbo,) = plots.plot_fit(result())
    labels = [line.get_label() for line in elbo.get_lines()]
    assert labels == ["step", "running median", "ELBO at the end"]


def test_fit_without_steps():
    found = result(1.5 * weights(), steps=0)
    assert found.log_evidence > found.elbo + 0.05
    elbo, _ = plots.plot_fit(found)
    assert [line.get_label() for line in elbo.get_lines()] == ["ELBO at the end", "log evidence"]
    low, high = elbo.get_ylim()
    assert all(low < line.get_ydata()[0] < high for line in elbo.get_lines())
    elbo.figure.canvas.draw()


def test_fit_without_a_finite_density():
    (elbo, _) = plots.plot_fit(result(torch.full((100,), -math.inf), steps=0))
    assert elbo.get_title() == "ELBO = -inf ± inf"
    elbo.figure.canvas.draw()


def test_what_is_no_fit():
    with pytest.raises(TypeError, match="result: expected what fit returns, got Importance"):
        plots.plot_fit(Importance.from_log_weights(weights()))
