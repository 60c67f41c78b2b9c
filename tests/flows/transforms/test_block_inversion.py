# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite, in either kind of inverse."""

import torch
from torch import nn
from torch.distributions import AffineTransform

from pyro_artransform import affine_autoregressive, hinged_marginals
from pyro_artransform.flows.transforms import AutoregressiveTransform
from pyro_artransform.testing import redraw


def test_early_passes_may_overflow():
    # each coordinate multiplies the one before by 1e3: garbage of early passes overflows float32
    def meta(x):
        return AffineTransform(1e3 * nn.functional.pad(x[..., :-1], (1, 0)) ** 2, 1.0)

    t = AutoregressiveTransform(meta)
    x = torch.full((1, 8), 1e-3).float()
    y = t(x)
    assert torch.allclose(t.inv(y.clone()), x, atol=1e-5)


def test_infinity_and_nan_stay_in_their_row_and_after_their_coordinate():
    order = [3, 0, 2, 1]
    t = redraw(affine_autoregressive(4, order=order), 2.0)
    y = torch.randn(3, 4)
    expected = t.inv(y)[:, order]
    y = y.clone()
    y[0, order[2]], y[1, order[1]] = torch.inf, torch.nan
    x, ladj = t.inv.call_and_ladj(y)
    x = x[:, order]
    assert x[1, 1:].isnan().all()
    assert ladj.isnan().tolist() == [False, True, False]
    assert torch.equal(x[2], expected[2])
    assert torch.allclose(x[0, :2], expected[0, :2])
    assert torch.allclose(x[1, :1], expected[1, :1])


def test_infinity_stays_one_where_passes_invert():
    t = AutoregressiveTransform(
        lambda x: AffineTransform(nn.functional.pad(x[:, :-1], (1, 0)), 2.0)
    )
    x = t.inv(torch.tensor([[0.3, torch.inf, 0.1], [0.1, -torch.inf, 0.2]]))
    assert x[:, :2].tolist() == [[0.15, torch.inf], [0.05, -torch.inf]]


def test_nan_has_no_finite_consequences():
    """Not by passes over a meta from elsewhere, nor under torch.func; independent coordinates stay."""
    y = torch.tensor([[0.3, torch.nan, -0.2], [0.1, 0.2, 0.3]])
    for t in (
        AutoregressiveTransform(
            lambda x: AffineTransform(nn.functional.pad(x[..., :-1], (1, 0)), 2.0)
        ),
        redraw(affine_autoregressive(3)),
    ):
        for x, ladj in (t.inv.call_and_ladj(y), torch.vmap(t.inv.call_and_ladj)(y)):
            assert x[0, 1:].isnan().all()
            assert x[1].isfinite().all()
            assert ladj[1].isfinite()
    x = redraw(hinged_marginals(3)).inv(y)
    assert x.isnan().tolist() == [[False, True, False], [False] * 3]
