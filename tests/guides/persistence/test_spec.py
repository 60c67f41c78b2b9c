# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import json

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

from pyro_artransform.conditioners import TiltedSiLU
from pyro_artransform.guides import AutoIAF
from pyro_artransform.guides.persistence.spec import (
    GuideSpec,
    from_plain,
    to_plain,
)
from pyro_artransform.guides.prototype import prototype_trace
from pyro_artransform.joint.sites import same_support
from tests.guides import models

FNS = {
    "normal": lambda new: dist.Normal(new([0.0, 1.0]), 1.0).to_event(1),
    "gamma": lambda new: dist.Gamma(new(1.0), 1.0),
    "pareto": lambda new: dist.Pareto(new([1.0, 2.5]), 2.0),
    "uniform": lambda new: dist.Uniform(new(-1.0), new([2.0, 1 / 3])).to_event(1),
    "beta": lambda new: dist.Beta(new(1.0), 1.0),
    "mises": lambda new: dist.VonMises(new(1.0), 1.0),
    "dirichlet": lambda new: dist.Dirichlet(new([1.0, 2.0, 3.0])),
    "lkj": lambda new: dist.LKJCholesky(3, new(1.0)),
    "half": lambda new: dist.HalfCauchy(new(1.0)),
    "ordered": lambda new: dist.TransformedDistribution(
        dist.Normal(new([0.0, 0.0, 0.0]), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_spec_survives_json(dtype):
    def model():
        with pyro.plate("plate", 2, dim=-3):
            for name, fn in FNS.items():
                pyro.sample(name, fn(torch.zeros((), dtype=dtype).new_tensor))

    guide = AutoIAF(model, hidden_dims=8, nonlinearity=nn.Tanh())
    guide()
    plain = json.loads(json.dumps(guide._spec.to_plain()))
    spec = GuideSpec.from_plain(plain, torch.device("cpu"))
    assert spec.to_plain() == guide._spec.to_plain()
    assert isinstance(spec.arguments["nonlinearity"], nn.Tanh)
    assert (spec.observed, spec.dtype, spec.device) == ((), dtype, torch.device("cpu"))
    assert GuideSpec.from_plain({**plain, "observed": None}, spec.device).observed is None
    values = spec.latents.constrain(spec.zeros())
    back, sites = prototype_trace(spec.latents, values).nodes, guide.prototype_trace.nodes
    assert list(back) == list(sites) == list(FNS)
    for name, site in sites.items():
        assert same_support(back[name]["fn"].support, site["fn"].support), name
        assert back[name]["fn"].batch_shape == site["fn"].batch_shape
        assert back[name]["fn"].event_shape == site["fn"].event_shape
        assert back[name]["value"].dtype == site["value"].dtype == dtype
        assert back[name]["cond_indep_stack"] == site["cond_indep_stack"]
        assert back[name]["fn"].support.check(back[name]["value"]).all()


def test_conversion_of_a_spec():
    guide = AutoIAF(models.mixed_dtypes, hidden_dims=8)
    guide(models.data())
    spec = guide._spec
    assert spec.dtype == torch.float64
    assert {site.dtype for site in spec.sites} == {torch.float32, torch.float64}
    single = spec.to(torch.Tensor.float)
    assert single.dtype == single.zeros().dtype == torch.float32
    assert {site.dtype for site in single.sites} == {torch.float32}
    assert spec.to(lambda t: t.to("meta")).device.type == "meta"


class Odd(constraints.Constraint):
    event_dim = 0

    def check(self, value):
        return value == value


@biject_to.register(Odd)
def _biject_to_odd(constraint):
    return dist.transforms.identity_transform


class OddNormal(dist.Normal):
    support = Odd()


def test_support_that_cannot_be_written(tmp_path):
    def model():
        pyro.sample("fine", dist.Normal(0, 1))
        pyro.sample("odd", OddNormal(0, 1))

    guide = AutoIAF(model, hidden_dims=8)
    guide()
    with pytest.raises(ValueError, match=r"support of site 'odd' cannot be written.* got Odd"):
        guide.save(tmp_path / "guide")
    # a state dict does without, and then needs a guide that was called
    state, fresh = guide.state_dict(), AutoIAF(model, hidden_dims=8)
    with pytest.raises(RuntimeError, match="AutoIAF was never called, so it has no parameters yet"):
        fresh.load_state_dict(state)
    fresh()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.transform.transforms[1].loc, guide.transform.transforms[1].loc)


@pytest.mark.parametrize(
    "nonlinearity",
    [
        nn.Tanh(),
        nn.Softplus(beta=2),
        nn.GELU(approximate="tanh"),
        TiltedSiLU(0.25),
        torch.tanh,
        nn.functional.silu,
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_nonlinearity(nonlinearity):
    plain = json.loads(json.dumps(to_plain("nonlinearity", nonlinearity)))
    back = from_plain(plain)
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(back(x), nonlinearity(x))
    assert type(back) is type(nonlinearity)


@pytest.mark.parametrize("nonlinearity", [lambda x: x, nn.Sequential(nn.Tanh(), nn.Tanh())])
def test_nonlinearity_that_cannot_be_written(nonlinearity):
    with pytest.raises(ValueError, match=r"nonlinearity: expected an activation of torch\.nn or"):
        to_plain("nonlinearity", nonlinearity)
