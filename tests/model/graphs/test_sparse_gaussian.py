# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from pyro_artransform.model.graphs.markov_graph import eliminate
from pyro_artransform.model.graphs.sparse_gaussian import (
    PrecisionPattern,
    SparseGaussian,
    eigh,
    lower_factor,
)
from tests.model.graphs.markov_graphs import GRAPHS, chain, dominant_precision, grid

every_graph = pytest.mark.parametrize("neighbours", GRAPHS.values(), ids=GRAPHS)


def random_precision(neighbours, seed=0):
    """A dense precision with the zeros of a graph, and badly scaled coordinates."""
    dense = dominant_precision(neighbours, 0.1, torch.Generator().manual_seed(seed))
    units = 10 ** torch.linspace(-2, 2, len(neighbours))
    return units[:, None] * dense * units


def entries(pattern, dense):
    rows, columns = dense.triu().nonzero().T
    found = dense.new_zeros(pattern.num_entries)
    return found.index_put((pattern.index(rows, columns),), dense[rows, columns])


def new(neighbours, seed=0):
    dense = random_precision(neighbours, seed)
    pattern = PrecisionPattern(eliminate(neighbours))
    loc = torch.arange(len(dense), dtype=dense.dtype)
    return SparseGaussian.from_precision(pattern, loc, entries(pattern, dense)), dense


@every_graph
def test_draws_covariances_and_solutions(neighbours):
    gaussian, dense = new(neighbours)
    root = gaussian.transform(torch.eye(len(dense))) - gaussian.loc
    assert torch.allclose(root.T @ root @ dense, torch.eye(len(dense)), atol=1e-6)
    covariance = torch.linalg.inv(dense)
    assert torch.allclose(gaussian.sd, covariance.diagonal().sqrt(), rtol=1e-9)
    rows, columns = gaussian.pattern.pairs()
    assert torch.allclose(gaussian.covariance[:-1], covariance[rows, columns], rtol=1e-8)
    right = torch.randn(len(dense))
    assert torch.allclose(dense @ gaussian.solve(right), right, atol=1e-7)


@every_graph
def test_regressions_on_a_part_of_the_parents(neighbours):
    gaussian, dense = new(neighbours)
    covariance = torch.linalg.inv(dense)
    parents = [own[:1] for own in gaussian.pattern.elimination.parents]
    coefficients, scale = gaussian.given(parents)
    for i, own in enumerate(parents):
        if own:
            slope = covariance[i, own[0]] / covariance[own[0], own[0]]
            assert torch.allclose(coefficients[i], slope[None])
            variance = covariance[i, i] - slope * covariance[i, own[0]]
            assert torch.allclose(scale[i], variance.sqrt())


def test_pivots_that_are_not_positive_are_raised():
    neighbours = chain(5)
    pattern = PrecisionPattern(eliminate(neighbours))
    dense = random_precision(neighbours)
    for bad in (-dense, torch.zeros_like(dense), dense - 2 * torch.diag(dense.diagonal())):
        gaussian = SparseGaussian.from_precision(pattern, torch.zeros(5), entries(pattern, bad))
        assert gaussian.transform(torch.randn(10, 5)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("neighbours", [chain(60, 4), grid(16, 16)], ids=["chain", "grid"])
def test_an_indefinite_precision_does_not_grow_as_it_is_eliminated(neighbours, dtype):
    """Pivots that are raised to a constant alone give sds of 1e15 here, and a root block that overflows."""
    pattern = PrecisionPattern(eliminate(neighbours))
    indefinite = torch.randn(pattern.num_entries, dtype=dtype)
    indefinite[pattern.diagonal] = 1.0
    loc = torch.zeros(len(neighbours), dtype=dtype)
    gaussian = SparseGaussian.from_precision(pattern, loc, indefinite)
    assert gaussian.sd.max() < 100  # in units of the diagonal
    assert gaussian.transform(loc[None]).isfinite().all()


def test_a_precision_that_is_not_finite_has_no_finite_gaussian():
    neighbours = chain(5, 1)
    pattern = PrecisionPattern(eliminate(neighbours))
    for bad in (math.nan, math.inf):
        precision = entries(pattern, random_precision(neighbours))
        precision[0] = bad
        gaussian = SparseGaussian.from_precision(pattern, torch.zeros(6), precision)
        log_scales = torch.cat([gaussian.scale, gaussian.root_tril.diagonal()]).log()
        draws = gaussian.transform(torch.randn(3, 6))
        assert not (draws.sum() + log_scales.sum()).isfinite()


def test_entries_are_those_of_the_pattern_alone():
    pattern = PrecisionPattern(eliminate(chain(300, 2)))
    assert pattern.num_entries < 10 * 302
    with pytest.raises(ValueError, match="entries only for pairs in the pattern"):
        pattern.index(torch.tensor([0]), torch.tensor([40]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_many_matrices_one_without_eigenvalues_is_nan_and_no_error(bad):
    root = torch.randn(3, 4, 4)
    matrices = root @ root.mT
    matrices[1, 0, 0] = bad
    values, vectors = eigh(matrices)
    assert values[1].isnan().all()
    for k in (0, 2):
        found = (vectors[k] * values[k]) @ vectors[k].mT
        assert torch.allclose(found, matrices[k])


def test_no_convergence_is_nan_and_no_error(monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = eigh(torch.ones(2, 2))
    assert values.shape == (2,)
    assert values.isnan().all()
    assert vectors.isnan().all()


def test_a_factor_has_a_positive_diagonal():
    root = torch.randn(2, 3, 5)
    lower = lower_factor(root)
    assert torch.allclose(lower @ lower.mT, root @ root.mT)
    assert (lower.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert torch.equal(lower, lower.tril())
