# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_artransform.model.vectorization import draws_at_a_time
from pyro_artransform.posterior import summary
from pyro_artransform.posterior.summaries import check_levels, quantiles_of
from pyro_artransform.sampling import mcmc


def test_summary():
    draws = {"a": torch.randn(1000), "b": torch.randn(1000, 2, 3), "c": torch.arange(1000) % 5}
    found = summary(draws, probs=[0.1, 0.5, 0.975])
    for name, value in draws.items():
        value = value.to(torch.float64)
        assert list(found[name]) == ["mean", "sd", "10%", "50%", "97.5%"]
        assert torch.allclose(found[name]["mean"], value.mean(0))
        assert torch.allclose(found[name]["sd"], value.std(0))
        assert torch.allclose(found[name]["97.5%"], value.quantile(0.975, dim=0))
        assert found[name]["50%"].shape == value.shape[1:]
    of_one = summary({"z": torch.ones(1, 2)}, probs=[])["z"]
    assert list(of_one) == ["mean", "sd"]
    assert of_one["sd"].isnan().all()
    assert summary({"none": torch.zeros(5, 0)})["none"]["50%"].shape == (0,)


def test_summary_as_a_table():
    draws = {"theta": torch.zeros(10, 2, 2), "big": torch.ones(10) * 1e9}
    lines = repr(summary(draws)).splitlines()
    assert lines[0].split() == ["mean", "sd", "5%", "50%", "95%"]
    assert lines[1].startswith("theta[0, 0]")
    assert len({len(line) for line in lines}) == 1
    assert "1.000e+09" in lines[-1]
    long = repr(summary({"z": torch.zeros(3, 80)})).splitlines()
    assert long[-1] == "... and 30 more"


def test_bad_summary():
    for levels in ([-0.1], [0.5, 1.1], [float("nan")]):
        with pytest.raises(ValueError, match=r"probs: expected numbers between 0 and 1, got \["):
            summary({"z": torch.zeros(3)}, probs=levels)
    with pytest.raises(ValueError, match=r"quantiles: expected numbers between 0 and 1, got \[\]"):
        check_levels("quantiles", [])
    for bad in (torch.zeros(()), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=r"draws: expected 'z' of shape \(n, ...\), got"):
            summary({"z": bad})


def test_quantiles_by_columns(monkeypatch):
    draws = torch.randn(1001, 3, 4)
    levels = torch.tensor([0.0, 0.3, 1.0])
    expected = torch.quantile(draws, levels, dim=0)
    assert len(draws) * draws_at_a_time(len(draws)) < 2**24  # which torch.quantile takes
    for numbers in (2**23, 2500, 10):
        monkeypatch.setattr("pyro_artransform.model.vectorization._MAX_VALUES", numbers)
        assert torch.equal(quantiles_of(draws, levels), expected)
    assert quantiles_of(draws[:, 0, 0], levels).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_quantiles_in_half_precision(dtype):
    draws = torch.randn(1001, 3).to(dtype)
    levels = check_levels("quantiles", [0.05, 0.95])
    found, expected = quantiles_of(draws, levels), draws.float().quantile(levels.float(), dim=0)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    assert torch.equal(summary({"z": draws})["z"]["5%"], expected[0])


def test_a_latent_that_is_a_constant():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(1)))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    table = mcmc(model, draws=20, num_chains=4, seed=0, progress=False).summary()
    assert table["p"]["mean"] == 1
    assert table["p"]["r_hat"].isnan()
