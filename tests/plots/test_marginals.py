# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math

import pytest
import torch
from matplotlib.container import ErrorbarContainer

from pyro_artransform import plots
from tests.plots.known_marginals import known_marginals


def test_marginals(ax):
    found = known_marginals()
    assert plots.plot_marginals(found, ax=ax) is ax
    assert ax.get_title() == "means within 0.55 sd, sds within 45 %"
    m, z = ax.containers
    assert (m.get_label(), z.get_label()) == ("m", "z")
    x, y = (torch.as_tensor(list(values)) for values in z.lines[0].get_data())
    torch.testing.assert_close(x, found.mean_shift["z"])
    torch.testing.assert_close(y, 100 * (found.sd_ratio["z"] - 1))
    segment = z.lines[2][0].get_segments()[0]
    assert segment[1, 0] - segment[0, 0] == pytest.approx(2 * 0.02)
    # all dots are there, and the box of errors that are small enough
    assert ax.get_xlim() == pytest.approx((-0.55, 0.55))
    assert ax.get_ylim() == pytest.approx((-44.0, 44.0))
    (box,) = ax.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((-0.15, -15.0), 0.3, 30.0)


def test_many_marginals_have_no_error_bars(ax):
    plots.plot_marginals(known_marginals(100), ax=ax)
    assert all(isinstance(container, ErrorbarContainer) for container in ax.containers)
    assert not any(container.has_xerr or container.has_yerr for container in ax.containers)


def test_errors_that_are_not_known(ax):
    found = known_marginals()
    ratio = {"m": torch.tensor(math.nan), "z": torch.full((40,), math.inf)}
    plots.plot_marginals(dataclasses.replace(found, sd_ratio=ratio), ax=ax)
    assert ax.get_ylim() == pytest.approx((-33.0, 33.0))
    ax.figure.canvas.draw()
