# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from pyro_artransform.model.graphs import factorization
from pyro_artransform.model.graphs.factorization import eigh, lower_factor


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

    monkeypatch.setattr(factorization.torch.linalg, "eigh", fails)
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
