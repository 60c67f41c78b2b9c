# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Nothing is remembered that could be out of date, and copies leave the original alone."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform

from pyro_artransform import affine_autoregressive, conditional_affine_autoregressive, iaf
from pyro_artransform.flows.transforms import AutoregressiveTransform, chain
from pyro_artransform.flows.univariate import MonotonicAffineTransform
from pyro_artransform.testing import redraw


def distribution(flow, dim=4):
    return dist.TransformedDistribution(dist.Normal(torch.zeros(dim), 1.0).to_event(1), [flow])


WEIGHT = torch.tensor(1.0, requires_grad=True)


class ReadsInItsCall(torch.distributions.Transform):
    domain = codomain = torch.distributions.constraints.real
    bijective = True
    sign = 1

    def _call(self, x):
        return x + WEIGHT.detach()

    def _inverse(self, y):
        return y - WEIGHT.detach()

    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


def test_whatever_is_edited_between_two_calls_is_noticed():
    """A parameter that nobody registered, one that is replaced, the context, and the mode of a module."""

    class Mode(nn.Module):
        def forward(self, x):
            return MonotonicAffineTransform(torch.full_like(x, float(self.training)), 0 * x)

    context = torch.zeros(2)
    given = redraw(conditional_affine_autoregressive(3, 2)).condition(context)
    own, mode = redraw(affine_autoregressive(3)), AutoregressiveTransform(Mode())
    layer = own.meta.conditioner.layers[-1]

    def replace():
        layer.bias = nn.Parameter(layer.bias + 1)

    for t, edit in (
        (chain([ReadsInItsCall()]), lambda: WEIGHT.data.add_(1.0)),
        (
            AutoregressiveTransform(lambda x: AffineTransform(WEIGHT, 2.0)),
            lambda: WEIGHT.detach().add_(1.0),
        ),
        (given, lambda: context.add_(1.0)),
        (own, replace),
        (mode, mode.eval),
    ):
        x = torch.randn(3)
        y = t(x)
        edit()
        assert torch.equal(t.inv(y), t.inv(y.clone()))
        assert not torch.allclose(t.inv(y), x)


def test_inference_mode():
    t = redraw(affine_autoregressive(3))
    q = distribution(t, 3)
    with torch.inference_mode():
        value = q.sample((5,))
        expected = q.log_prob(value.clone())
        assert torch.allclose(q.log_prob(value), expected)
    assert torch.allclose(q.log_prob(value.clone()), expected)


def test_threads_share_a_transform():
    """One draws and scores, the other scores data: each gets the densities that it would get alone."""
    t, count = redraw(iaf(4, 2, 8)), 50
    noise, data = torch.randn(2, count, 5, 4)

    @torch.no_grad()
    def draw(k):
        y = t(noise[k])
        return torch.cat([t.log_abs_det_jacobian(noise[k], y)[:, None], t.inv(y)], -1)

    @torch.no_grad()
    def score(k):
        return distribution(t).log_prob(data[k])

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(lambda f=f: list(map(f, range(count)))) for f in (draw, score)]
    for f, future in zip((draw, score), found):
        torch.testing.assert_close(future.result(), list(map(f, range(count))), atol=0, rtol=0)


def test_cache_size():
    t = affine_autoregressive(3)
    assert t.with_cache(1) is t
    assert t.inv.with_cache(0).inv is t
    for bad in (2, -1, None):
        with pytest.raises(ValueError, match="cache_size must be 0 or 1"):
            AutoregressiveTransform(lambda x: x, cache_size=bad)


def test_pickle_after_pyro_has_registered_the_parameters():
    flow = redraw(iaf(3))
    pyro.module("flow", flow)
    x = torch.randn(4, 3)
    for source in (flow, flow.inv):
        twin = pickle.loads(pickle.dumps(source))
        assert torch.allclose(twin(x), source(x))


def test_copies_leave_what_pyro_needs():
    t = redraw(affine_autoregressive(3))

    def model():
        pyro.module("t", t)
        copy.deepcopy(t)
        with pyro.plate("data", 4):
            pyro.sample("x", distribution(t, 3), obs=torch.zeros(4, 3))

    svi = pyro.infer.SVI(model, lambda: None, pyro.optim.Adam({}), pyro.infer.Trace_ELBO())
    assert svi.step() != svi.step()
    twin = copy.deepcopy(t.inv)
    assert twin.inv.inv is twin
