# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussians by draws and their gradients, which are exact for Gaussians, and what a fit makes of them."""

import pytest
import torch

from pyro_artransform.inference.initialization.from_draws import dense_gaussian, sparse_gaussian
from pyro_artransform.model.graphs.markov_graph import MarkovGraph
from tests.model.graphs.markov_graphs import GRAPHS, chain, crossed, dominant_precision, grid, tree

DIM = 20
LINEAR = {
    "chain with hubs": chain(30, 2),
    "tree": tree(31),
    "grid": grid(6, 6),
    "crossed plates": crossed(10, 6),
    "complete": GRAPHS["complete"],
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def drawn(loc, precision, count):
    scale_tril = torch.linalg.cholesky(torch.linalg.inv(precision))
    away = torch.randn(count, len(loc)) @ scale_tril.T
    return loc + away, -away @ precision


def precision_of(units):
    root = torch.randn(DIM, DIM) / units[:, None]
    return root @ root.T


def test_twice_as_many_draws_as_dimensions_are_enough():
    """Of any units, and a condition number of 1e16 or more."""
    loc, units = torch.randn(DIM), torch.logspace(-4, 4, DIM)
    precision = precision_of(units)
    draws, gradients = drawn(loc, precision, 2 * DIM)
    found = dense_gaussian(draws, gradients)
    whitened = found.scale_tril.T @ precision @ found.scale_tril
    assert torch.allclose(whitened, torch.eye(DIM), atol=1e-6)
    mean = found.loc + found.solve(gradients.mean(0))
    sd = found.scale_tril.norm(dim=1)
    assert ((mean - loc) / sd).abs().max() < 1e-6
    # the nearest without correlations has the conditional sds
    assert torch.allclose(found.independent_sd(), precision.diagonal().rsqrt())


def test_few_draws_know_the_scales():
    loc, units = torch.randn(DIM), torch.logspace(-4, 4, DIM)
    precision = (units**-2).diag()
    found = dense_gaussian(*drawn(loc, precision, DIM // 2))
    assert ((found.scale_tril.norm(dim=1) / units).log().abs() < 1.0).all()


@pytest.mark.parametrize("neighbours", LINEAR.values(), ids=LINEAR)
def test_a_sparse_gaussian(neighbours):
    """From a few draws for each neighbour, hubs among the coordinates."""
    dim = len(neighbours)
    generator = torch.Generator().manual_seed(3)
    precision = dominant_precision(neighbours, 0.05, generator)
    units = torch.logspace(-2, 2, dim)
    precision = precision / units / units[:, None]
    graph, loc = MarkovGraph.from_neighbours(neighbours), torch.randn(dim)
    draws, gradients = drawn(loc, precision, 40)
    found = sparse_gaussian(draws, gradients, graph)
    mean = found.loc + found.solve(gradients.mean(0))
    assert ((mean - loc) / found.sd).abs().max() < 1e-4
    root = found.transform(torch.eye(dim)) - found.loc
    whitened = root @ torch.linalg.cholesky(precision)
    assert torch.allclose(whitened.T @ whitened, torch.eye(dim), atol=1e-4)
