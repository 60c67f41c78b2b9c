# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Batches of matrix products that are one product."""

import pytest
import torch

from pyro_artransform.model.replay.recording import has_one_matrix, product_with_one_matrix, record

MATRIX = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (MATRIX.expand(7, 50, 4), VECTORS[:, :, None]),
        (VECTORS[:, None, :], MATRIX.T.expand(7, 4, 50)),
        (VECTORS[:, None, :].expand(7, 1, 4), MATRIX.T.contiguous().expand(7, 4, 50)),
    ],
)
def test_the_product_is_that_of_bmm(left, right):
    expected = torch.bmm(left, right)
    assert has_one_matrix(left, right)
    found = product_with_one_matrix(left, right)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (MATRIX.repeat(7, 1, 1), VECTORS[:, :, None]),
        (MATRIX.expand(7, 50, 4), torch.randn(7, 4, 2)),
        (MATRIX[None], VECTORS[:1, :, None]),
    ],
    ids=["several matrices", "several vectors", "no batch"],
)
def test_other_products_stay_as_they_are(left, right):
    assert not has_one_matrix(left, right)


@pytest.mark.parametrize(
    "product", [lambda b: MATRIX @ b, lambda b: (MATRIX @ b[:, None])[:, 0], lambda b: b @ MATRIX.T]
)
def test_replays_have_one_product_for_all_draws(product):
    """The value and the gradient of a linear predictor, as torch.vmap and autograd write them."""

    def evaluate(b):
        with torch.enable_grad():
            b = b.detach().requires_grad_()
            value = torch.vmap(product)(b).square().sum(-1)
            (gradient,) = torch.autograd.grad(value.sum(), b)
        return value.detach(), gradient

    replay = record(evaluate, [VECTORS], 10.0)
    assert replay is not None
    assert "bmm" not in {call.name for call in replay.program.calls}
    for inputs in (VECTORS, 2 - VECTORS):
        for found, expected in zip(replay(inputs), evaluate(inputs)):
            torch.testing.assert_close(found, expected)
