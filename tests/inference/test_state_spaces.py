# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""State-space models by loops: a fit ends with an answer, or with a sentence that says why there is none."""

import math
from collections.abc import Callable, Iterator

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor

from pyro_artransform import AutoStructuredFlow, fit
from pyro_artransform.inference.initialization.start import find_start
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling.run_mcmc import from_nothing

Model = Callable[[int, Tensor | None], None]


def _number(value: float) -> Tensor:
    return torch.tensor(value)


def _datum(y: Tensor | None, t: int) -> Tensor | None:
    return None if y is None else y[t]


def _walk(name: str, num: int, scale: Tensor, first: float = 1.0) -> Iterator[Tensor]:
    x = _number(0.0)
    for t in range(num):
        x = pyro.sample(f"{name}_{t}", dist.Normal(x, scale if t else _number(first)))
        yield x


def local_linear_trend(num: int, y: Tensor | None) -> None:
    s1 = pyro.sample("s1", dist.HalfNormal(_number(1.0)))
    s2 = pyro.sample("s2", dist.HalfCauchy(_number(0.5)))
    s3 = pyro.sample("s3", dist.HalfNormal(_number(1.0)))
    level, slope = _number(0.0), _number(0.0)
    for t in range(num):
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, s1))
        slope = pyro.sample(f"slope_{t}", dist.Normal(slope, s2))
        pyro.sample(f"y_{t}", dist.Normal(level, s3), obs=_datum(y, t))


def seasonal(num: int, y: Tensor | None) -> None:
    step = pyro.sample("step", dist.HalfCauchy(_number(0.5)))
    noise = pyro.sample("noise", dist.LogNormal(_number(-1.0), 1.0))
    effects = [pyro.sample(f"season_{k}", dist.Normal(_number(0.0), 2.0)) for k in range(3)]
    effects.append(-sum(effects))
    for t, level in enumerate(_walk("level", num, step)):
        pyro.sample(f"y_{t}", dist.Normal(level + effects[t % 4], noise), obs=_datum(y, t))


def ar2(num: int, y: Tensor | None) -> None:
    phi = [pyro.sample(f"phi_{k}", dist.Normal(_number(0.0), 0.5)) for k in range(2)]
    step = pyro.sample("step", dist.HalfCauchy(_number(1.0)))
    noise = pyro.sample("noise", dist.HalfNormal(_number(0.5)))
    before, x = _number(0.0), _number(0.0)
    for t in range(num):
        mean = phi[0] * x + phi[1] * before
        before, x = x, pyro.sample(f"x_{t}", dist.Normal(mean, step))
        pyro.sample(f"y_{t}", dist.Normal(x, noise), obs=_datum(y, t))


def student_level(num: int, y: Tensor | None) -> None:
    step = pyro.sample("step", dist.HalfCauchy(_number(1.0)))
    noise = pyro.sample("noise", dist.HalfCauchy(_number(1.0)))
    df = pyro.sample("df", dist.Gamma(_number(2.0), 0.1))
    for t, level in enumerate(_walk("level", num, step)):
        pyro.sample(f"y_{t}", dist.StudentT(df, level, noise), obs=_datum(y, t))


def dynamic_poisson(num: int, y: Tensor | None) -> None:
    step = pyro.sample("step", dist.LogNormal(_number(-2.0), 1.0))
    for t, log_rate in enumerate(_walk("log_rate", num, step)):
        pyro.sample(f"y_{t}", dist.Poisson(log_rate.exp()), obs=_datum(y, t))


def coupled_walks(num: int, y: Tensor | None) -> None:
    steps = [pyro.sample(f"step_{k}", dist.HalfNormal(_number(0.5))) for k in range(2)]
    noise = pyro.sample("noise", dist.HalfNormal(_number(1.0)))
    pull = pyro.sample("pull", dist.Normal(_number(0.0), 0.3))
    one, other = _number(0.0), _number(0.0)
    for t in range(num):
        gap = other - one
        one = pyro.sample(f"one_{t}", dist.Normal(one + pull * gap, steps[0]))
        other = pyro.sample(f"other_{t}", dist.Normal(other - pull * gap, steps[1]))
        both = dist.Normal(torch.stack([one, other], -1), noise.unsqueeze(-1)).to_event(1)
        pyro.sample(f"y_{t}", both, obs=_datum(y, t))


def stochastic_volatility(num: int, y: Tensor | None) -> None:
    step = pyro.sample("step", dist.HalfCauchy(_number(0.2)))
    mean = pyro.sample("mean", dist.Normal(_number(0.0), 1.0))
    for t, log_sd in enumerate(_walk("log_sd", num, step, 0.2)):
        pyro.sample(f"y_{t}", dist.Normal(0.0, (mean + log_sd).exp()), obs=_datum(y, t))


QUICK_MODELS = ar2, student_level, dynamic_poisson
MODELS = *QUICK_MODELS, local_linear_trend, seasonal, coupled_walks, stochastic_volatility
_TRUTH = {
    **dict.fromkeys(
        ("step", "noise", "s1", "s3", "step_0", "step_1", "pull", "phi_0", "phi_1"), 0.3
    ),
    **{"s2": 0.05, "df": 4.0, "mean": -1.0},
}


def simulated(model: Model, num: int, seed: int = 0) -> Tensor:
    """Data of a model at moderate values of its parameters."""
    truth = {name: _number(value) for name, value in _TRUTH.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trace = poutine.trace(poutine.condition(model, truth)).get_trace(num, None)
    return torch.stack([trace.nodes[f"y_{t}"]["value"] for t in range(num)])


@pytest.mark.parametrize(
    "model",
    [m if m in QUICK_MODELS else pytest.param(m, marks=pytest.mark.slow) for m in MODELS],
)
@pytest.mark.usefixtures("quick")
def test_a_start_is_found_in_single_precision(model):
    torch.set_default_dtype(torch.float32)
    y = simulated(model, 4)
    guide = AutoStructuredFlow(model)
    guide.set_up(4, y)
    log_joint = LogJoint(model, (4, y)).with_coordinates(guide.prior_coordinates)
    ensemble = from_nothing(log_joint, 50)
    ensemble.run(50, most=32)
    found = find_start(log_joint, guide, ensemble)
    z, log_q = guide.rsample_and_log_prob(500)
    # the median of other draws: in the neck of a scale a Gaussian has draws of any density
    median = (log_joint(z) - log_q).median().item()
    assert abs(median - found.elbo) < 20.0


@pytest.mark.slow
@pytest.mark.parametrize("draws", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("model", "num"), [*((model, 30) for model in MODELS), (local_linear_trend, 100)]
)
def test_a_fit_of_some_seconds(model, num, dtype, draws):
    """The ELBO has digits, or the verdict says that nothing is known."""
    torch.set_default_dtype(dtype)
    y = simulated(model, num)
    result = fit(model, num, y, draws=draws, seed=0, max_seconds=20, progress=False)
    assert math.isfinite(result.elbo)
    if abs(result.elbo) * torch.finfo(dtype).eps > 1:
        assert not result.trusted
        assert "round-off" in result.verdict
    if draws:
        assert all(value.isfinite().all() for value in result.draws.values())
