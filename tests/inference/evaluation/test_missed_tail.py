# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Tails that draws lack, of densities with an evidence of 1 whose exact draws are known."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform.inference.evaluation.missed_modes import Mixture, moments
from pyro_artransform.inference.evaluation.mode_search import Shape
from pyro_artransform.joint import LogJoint

NUM_DRAWS = 2000


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 2.0))
    pyro.sample("x", dist.Normal(torch.zeros(4), (v[..., None] / 2).exp()).to_event(1))


def student():
    pyro.sample("z", dist.StudentT(3.0, torch.zeros(5), 1.0).to_event(1))


def normal():
    pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))


def exact(model, count=NUM_DRAWS):
    with pyro.plate("draws", count):
        trace = pyro.poutine.trace(model).get_trace()
    sites = (trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "draws")
    return torch.cat([value.reshape(count, -1) for value in sites], 1)


def missed(model, draws, log_evidence=0.0):
    around, ess = Shape(moments(draws)), torch.full(draws.shape[1:], float(len(draws)))
    wide = around._replace(is_heavy=True).stratum(LogJoint(model), 10_000)
    return Mixture.of(draws, around, [wide], []).missed_tail(draws, ess, log_evidence)


@pytest.mark.parametrize("model", [funnel, student, normal])
def test_exact_draws_lack_nothing(model):
    assert [missed(model, exact(model)) for _ in range(20)] == [None] * 20


def test_exact_draws_lack_nothing_where_the_evidence_of_a_guide_is_far_too_small():
    assert missed(normal, exact(normal), log_evidence=-5.0) is None


@pytest.mark.parametrize("model", [funnel, student, normal])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_tail_that_draws_do_not_enter(model, sign):
    """Without the draws beyond the quantile of 5 % of one latent; the neck of the funnel is too narrow."""
    draws = exact(model)
    first = sign * draws[:, 0]
    found = missed(model, draws[first < first.quantile(0.95)])
    if model is funnel and sign == -1:
        assert found is None
    else:
        assert found is not None
        assert found[0] == 0
        assert found[1] == pytest.approx(0.05, abs=0.02)


def test_what_has_no_covariance():
    draws = exact(normal)
    draws[:, 1] = draws[:, 0]
    assert missed(normal, draws) is None
