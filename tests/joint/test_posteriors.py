# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoIAF, AutoStructuredFlow
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.joint.posteriors import Posteriors
from pyro_artransform.testing import redraw

Y = torch.tensor([[0.3, -1.2, 2.2], [0.9, 1.6, -0.3], [0.8, 1.9, 0.1], [2.0, 2.1, 1.4]]).double()


def many(y):
    with pyro.plate("sets", len(y), dim=-2):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(y.new_ones(())))
        with pyro.plate("groups", y.shape[-1], dim=-1):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def shared(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
    with pyro.plate("sets", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, 0])


def coupled(y):
    with pyro.plate("sets", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
    pyro.factor("steps", -(z[..., 1:] - z[..., :-1]).square().sum(-1))


def set_up(model, kind=AutoStructuredFlow, **options):
    guide = kind(model, **options)
    guide.set_up(Y)
    return ModelAndGuide.of(model, guide, (Y,), {})


@pytest.mark.parametrize("coordinates", ["model", "prior"])
def test_weights_of_each_are_those_of_its_own_latents_and_data(coordinates):
    subject = set_up(many, coordinates=coordinates)
    redraw(subject.guide._parts[0], 0.5)
    found = Posteriors.of(subject.log_joint, subject.guide)
    assert (found.plate, found.size) == ("sets", 4)
    state = torch.get_rng_state()
    z, weights, rest = found.log_weights(50)
    torch.set_rng_state(state)
    same, log_q = subject.guide.rsample_and_log_prob(50)
    assert torch.allclose(z, same)
    assert torch.allclose(weights.sum(1) + rest, subject.log_joint(z) - log_q)
    # of another one's parameters nothing is seen
    _, affine = subject.guide._parts
    with torch.no_grad():
        affine.log_scale[found.elements == 2] += 0.3
    torch.set_rng_state(state)
    changed = (found.log_weights(50)[1] - weights).abs().amax(0) > 1e-9
    assert changed.tolist() == [False, False, True, False]


def test_log_determinants_of_each_are_those_of_blocks_of_the_jacobian():
    guide = redraw(set_up(many, num_transforms=2).guide, 0.5)
    flow, elements = guide._parts[0], torch.tensor([0, 1, 2, 3] * 2 + [k // 3 for k in range(12)])
    x = torch.randn(20).double()
    jacobian = torch.func.jacrev(lambda x: flow(x[None])[0])(x)
    y, terms = flow.call_and_ladj_by_coordinate(x[None])
    assert torch.allclose(y, flow(x[None]))
    for k in range(4):
        block = jacobian[elements == k][:, elements == k]
        assert torch.allclose(torch.linalg.slogdet(block)[1], terms[0, elements == k].sum())


@pytest.mark.parametrize(
    ("model", "kind"),
    [(shared, AutoStructuredFlow), (coupled, AutoStructuredFlow), (many, AutoIAF)],
)
def test_there_are_not_many_where_latents_are_shared_or_no_graph_says_so(model, kind):
    subject = set_up(model, kind)
    assert Posteriors.of(subject.log_joint, subject.guide) is None
