# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Verdicts on models that subsample their data themselves, against exact evidences."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import AutoAmortized
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide
from pyro_artransform.inference.evaluation.subsampled import PlatePasses
from tests.inference.conftest import quick_fit as fit

SIZE, BATCH = 43, 10
Y = 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(1))


def groups(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", SIZE, subsample_size=BATCH) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])


def rows(y):
    """No latents in the plate; its size is no multiple of the batch size."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", SIZE, subsample_size=BATCH):
        own = pyro.subsample(y, event_dim=0)
        pyro.sample("y", dist.Normal(mean, 1.25**0.5), obs=own)


def evidence():
    covariance = 1.25 * torch.eye(SIZE) + 9 * torch.ones(SIZE, SIZE)
    return dist.MultivariateNormal(torch.zeros(SIZE), covariance).log_prob(Y).item()


def encoder(y):
    return pyro.subsample(y, event_dim=0)[:, None]


def amortized(model, **options):
    return AutoAmortized(model, flow=None, local_flow=None, **options)


def trained(model, guide=None, num_steps=800):
    options = {"num_steps": num_steps, "num_particles": 8, "seed": 0, "progress": False}
    return fit(model, Y, guide=guide, **options)


@pytest.mark.parametrize("kind", ["embeddings", "encoder"])
def test_a_model_with_latents_of_its_subsample(kind):
    guide = amortized(groups, **({"encoder": encoder} if kind == "encoder" else {}))
    result = trained(groups, guide, 1200)
    assert result.trusted, result
    assert result.log_evidence == pytest.approx(evidence(), abs=0.1)
    assert evidence() - 0.2 < result.elbo < evidence() + 4 * result.elbo_se
    elements = result.elements["groups"]
    assert torch.equal(elements.index, torch.arange(SIZE))
    assert elements.gap.max() < 0.02


def test_one_element_that_is_wrong_is_named():
    guide = amortized(groups)
    trained(groups, guide)
    factor = guide._posterior.locals[0]
    with torch.no_grad():
        factor.table[41] = factor.table[3] + 3
    passes = PlatePasses.of(ModelAndGuide.of(groups, guide, (Y,), {}))
    found = passes.weighed(0)
    assert (~found.elements.trusted).nonzero().flatten().tolist() == [41]


def test_a_model_whose_latents_are_shared():
    """All passes go round until each row is in ten batches."""
    result = trained(rows, num_steps=1500)
    assert result.trusted, result
    assert result.log_evidence == pytest.approx(evidence(), abs=4 * result.log_evidence_se)
    assert result.log_evidence_se < 0.02
    assert result.importance is not None


def test_two_subsampled_plates_are_not_judged():
    def two(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        rows = pyro.plate("groups", SIZE, subsample_size=BATCH, dim=-1)
        with pyro.plate("columns", 4, subsample_size=2, dim=-2), rows as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index].expand(2, -1))

    result = trained(two, num_steps=10)
    assert not result.trusted
    assert not result.elements
    assert "the model subsamples its data" in result.verdict
