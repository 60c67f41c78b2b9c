# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math
from itertools import product

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoStructuredFlow, plots


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


def test_graph_of_a_guide_before_its_first_call():
    with pytest.raises(RuntimeError, match="call"):
        plots.plot_graph(AutoStructuredFlow(chain))
