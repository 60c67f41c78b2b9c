# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Calibration of the eight schools in one fit of all data sets, beside exact means; see many_posteriors.md.

    OMP_NUM_THREADS=1 python benchmarks/many_posteriors.py [--sets N] [--steps N] [--singles N]

Data sets are drawn from the prior, and all are fitted at once by ``AutoStructuredFlow``, in float32; ranks
are those of draws that are resampled by the weights of each. Exact means and sds are by quadrature over log
tau, given which the posterior is normal. Prints the page's lines.
"""

import argparse
import json
import time
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_artransform import AutoStructuredFlow, FitResult, fit
from pyro_artransform.diagnostics import psis_resample, sbc
from pyro_artransform.inference import over_data_sets

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
NUM_DRAWS = 4000  # by which means of the guide are known to 0.016 sd
NUM_RESAMPLED = 1000  # of 5,000: means are known to 0.03 sd and more


def schools(y: Tensor | None = None) -> Tensor:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)


def exact(y: Tensor) -> tuple[Tensor, Tensor]:
    """Means and sds of mu, log tau and the eight effects of each data set ``(S, 8)``, shape ``(S, 10)``."""
    y, sigma = y.double()[:, None], SIGMA.double()
    u = torch.linspace(-12, 16, 6001, dtype=torch.float64)  # log tau
    tau = u.exp()[:, None]
    precision = 1 / (sigma**2 + tau**2)  # of y given mu and tau
    total = precision.sum(-1) + 1 / 25
    mean = (precision * y).sum(-1) / total
    log_p = 0.5 * (precision.log().sum(-1) - total.log() + total * mean**2)
    log_p = log_p - 0.5 * (precision * y**2).sum(-1) + u - (1 + (tau[:, 0] / 5) ** 2).log()
    weights = log_p.softmax(-1)[..., None]
    shrink = tau**2 * precision
    theta = mean[..., None] + shrink * (y - mean[..., None])
    variance = shrink * sigma**2 + (1 - shrink) ** 2 / total[:, None]
    means = torch.cat([mean[..., None], u.expand_as(mean)[..., None], theta], -1)
    zeros = torch.zeros_like(u)[:, None]
    variances = torch.cat([1 / total[:, None], zeros, variance], -1)
    first = (weights * means).sum(1)
    second = (weights * (variances + means**2)).sum(1)
    return first, (second - first**2).sqrt()


def moments(draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same of draws."""
    count = draws["mu"].numel() // len(draws["mu"])
    values = draws["mu"], draws["tau"].log(), draws["theta"]
    flat = torch.cat([value.reshape(len(value), count, -1) for value in values], -1).double()
    return flat.mean(0), flat.std(0)


def run(num_sets: int, num_steps: int | None, num_singles: int) -> None:
    kept: dict[str, Any] = {}

    def fit_all(data: dict[str, Tensor]) -> Any:
        many = over_data_sets(schools, data)
        options = {"num_steps": num_steps, "progress": False}
        kept["y"], kept["result"] = data["y"], fit(many, AutoStructuredFlow(many), **options)
        kept["draw"] = partial(psis_resample, many, kept["result"].guide)
        return kept["draw"]

    start = time.process_time()
    options: dict[str, Any] = {"num_simulations": num_sets, "observed": ["y"], "progress": False}
    found = sbc(schools, fit_all, at_once=True, seed=0, **options)
    print(f"CPU seconds of the call: {time.process_time() - start:.0f}", flush=True)
    print(found, flush=True)
    result: FitResult = kept["result"]
    print(result, flush=True)
    each, levels = result.elements, torch.tensor([0.5, 0.9, 0.99, 1.0])
    if each is not None:
        print("k-hat, quantiles:", each.khat.quantile(levels).tolist())
        gap = each.gap
        print("gap, quantiles:", gap.quantile(levels).tolist())
        trusted = each.trusted
    right, right_sd = exact(kept["y"])
    for of, draws in {
        "resampled": kept["draw"](NUM_RESAMPLED),
        "guide": result.guide.sample_posterior(NUM_DRAWS),
    }.items():
        mean, sd = moments(draws)
        shift, ratio = ((mean - right) / right_sd).abs(), (sd / right_sd - 1).abs()
        for name, part in {
            "mu": slice(0, 1),
            "log tau": slice(1, 2),
            "theta": slice(2, 10),
        }.items():
            for what, error in {"mean": shift[:, part], "sd": ratio[:, part]}.items():
                quantiles = error.flatten().quantile(levels.double()).tolist()
                rounded = json.dumps([round(q, 3) for q in quantiles])
                print(f"{of}, error of the {what} of {name}:", rounded)
    if each is not None:
        worst = shift.amax(1)[trusted].max(), shift.amax(1)[~trusted]
        print(f"worst mean of a trusted one: {worst[0]:.3f}, of others: {worst[1].tolist()}")
    for k in range(num_singles):
        start = time.process_time()
        alone = fit(schools, kept["y"][k], seed=k, progress=False)
        seconds = time.process_time() - start
        own, _ = moments(alone.guide.sample_posterior(NUM_DRAWS))
        from_many = ((own[0] - mean[k]) / right_sd[k]).abs().max()
        from_exact = ((own[0] - right[k]) / right_sd[k]).abs().max()
        print(
            f"alone {k}: {seconds:.0f} s, means {from_many:.3f} sd from those of all at once, "
            f"{from_exact:.3f} from exact ones, which those of all at once are {shift[k].max():.3f} from"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--singles", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    run(given.sets, given.steps, given.singles)
