# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Flows, guides, fits and chains on each device of the machine; on a GPU, if there is one."""

from collections.abc import Iterator

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import AutoIAF, AutoStructuredFlow, iaf, maf, mcmc
from tests.inference.conftest import quick_fit
from tests.inference.parallel_cases import NUM_ITEMS, NUM_USERS, ROWS, ratings

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The default device, as a user would set it, and that of new tensors."""
    torch.set_default_device(request.param)
    yield torch.get_default_device()
    torch.set_default_device(None)


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("rows", 40, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(slope * x, scale), obs=y)


def chain(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    z = pyro.sample("z0", dist.Normal(0.0, scale))
    for k in range(len(y)):
        pyro.sample(f"y{k}", dist.Normal(z, 1.0), obs=y[k])
        z = pyro.sample(f"z{k + 1}", dist.Normal(z, scale))


def rows() -> tuple[Tensor, Tensor]:
    x = torch.randn(40)
    return x, 0.7 * x + 0.5 * torch.randn(40)


def are_on(device: torch.device, values: dict[str, Tensor]) -> bool:
    finite = all(bool(value.isfinite().all()) for value in values.values())
    return finite and {value.device for value in values.values()} == {device}


@pytest.mark.parametrize("make", [iaf, maf])
def test_flows(device, make):
    flow, x = make(4), torch.randn(5, 4)
    y = flow(x)
    assert torch.allclose(flow.inv(y.detach().clone()), x, atol=1e-6)
    base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    log_prob = dist.TransformedDistribution(base, [flow]).log_prob(y.detach())
    log_prob.sum().backward()
    assert are_on(device, {"log_prob": log_prob, "y": y})
    assert {parameter.device for parameter in flow.parameters()} == {device}


def test_guide_by_svi(device):
    guide = AutoIAF(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=4))
    data = rows()
    losses = [svi.step(*data) for _ in range(5)]
    assert torch.tensor(losses).isfinite().all()
    draws = guide.sample_posterior(10, *data)
    assert are_on(device, {**draws, "log_prob": guide.log_prob(draws)})


def test_fit_and_chains(device, tmp_path):
    data = rows()
    result = quick_fit(regression, *data, num_steps=5, progress=False)
    assert are_on(device, {**result.guide.sample_posterior(10), **result.draws})
    result.guide.save(tmp_path / "guide.pt")
    loaded = AutoIAF(regression)
    loaded.set_up(*data)
    loaded.load(tmp_path / "guide.pt")
    assert are_on(device, loaded.sample_posterior(10))
    assert are_on(device, mcmc(regression, *data, draws=20, progress=False).draws)


def test_fit_with_a_loader(device):
    """A control variate with all data corrects each batch."""
    loader = [*zip(*(part.split(10) for part in rows()))]
    result = quick_fit(regression, loader=loader, num_steps=5, progress=False)
    assert are_on(device, result.guide.sample_posterior(10))
    assert result.log_evidence - result.elbo < 0.2


def test_structured_guide(device):
    guide = AutoStructuredFlow(chain)
    quick_fit(chain, guide, torch.randn(4), num_steps=5, progress=False)
    assert are_on(device, guide.sample_posterior(10))


def test_elements_of_plates(device):
    """Users and items by batches: the start is found by second derivatives of elements and pairs."""
    generator = torch.Generator(device).manual_seed(0)
    user = torch.randint(NUM_USERS, (ROWS,), generator=generator)
    item = torch.randint(NUM_ITEMS, (ROWS,), generator=generator)
    data = TensorDataset(user, item, torch.randn(ROWS))
    loader = DataLoader(data, batch_size=100, shuffle=True, generator=generator)
    result = quick_fit(ratings, loader=loader, num_steps=3, progress=False)
    assert isinstance(result.guide, AutoStructuredFlow)
    assert are_on(device, result.guide.sample_posterior(10))
