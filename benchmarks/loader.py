# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Logistic regression by mini-batches of 1,000 rows, beside Pyro's Gaussian guide with Adam for as long.

    python benchmarks/loader.py [--rows 1e5 1e6] [--predictors 8 50] [--write]

Each case is a process of its own, for its memory. The evidence is by Laplace's approximation and 400
importance weights on all data; gaps are nats of it, of the ELBO by 400 draws on all data.
"""

import argparse
import json
import math
import resource
import time
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import marked_table
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from results import in_a_process
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import fit

BATCH, DRAWS = 1000, 400


def simulated(rows: int, predictors: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, predictors, generator=generator)
    weight = torch.randn(predictors, generator=generator) / predictors**0.5
    return x, torch.bernoulli((x @ weight).sigmoid(), generator=generator)


class Regression:
    """The model, and its density on all data in double precision."""

    def __init__(self, rows: int, predictors: int) -> None:
        self.rows, self.predictors = rows, predictors
        self.x, self.y = simulated(rows, predictors)

    def model(self, x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(self.predictors), 1.0).to_event(1))
        with pyro.plate("rows", self.rows, subsample_size=len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)

    def log_joint(self, weight: Tensor) -> Tensor:
        """At draws ``(n, predictors)``."""
        weight = weight.double()
        total = -0.5 * weight.square().sum(1) - 0.5 * self.predictors * math.log(2 * math.pi)
        for x, y in zip(self.x.split(20_000), self.y.split(20_000)):
            logits = x.double() @ weight.T
            total = total + (y[:, None] * logits - softplus(logits)).sum(0)
        return total

    def log_evidence(self) -> tuple[float, float]:
        """With its standard error."""
        mode = torch.zeros(self.predictors, dtype=torch.float64)
        for _ in range(20):
            precision, slope = torch.eye(self.predictors, dtype=torch.float64), -mode
            for x, y in zip(self.x.double().split(20_000), self.y.split(20_000)):
                p = (x @ mode).sigmoid()
                precision += (x * (p * (1 - p))[:, None]).T @ x
                slope = slope + x.T @ (y - p)
            mode = mode + torch.linalg.solve(precision, slope)
        gaussian = dist.MultivariateNormal(mode, precision_matrix=precision)
        draws = gaussian.sample((DRAWS,))
        weights = self.log_joint(draws) - gaussian.log_prob(draws)
        found = weights.logsumexp(0) - math.log(DRAWS)
        return float(found), float((weights - found).exp().std() / DRAWS**0.5)


def by_adam(subject: Regression, loader: Any, seconds: float) -> float:
    """The ELBO of Pyro's guide after so many CPU seconds, whose step size falls to a hundredth."""
    guide = AutoMultivariateNormal(subject.model, init_scale=0.01)
    began = time.process_time()
    optimizer = pyro.optim.PyroOptim(torch.optim.Adam, {"lr": 0.01})
    svi = SVI(subject.model, guide, optimizer, Trace_ELBO(num_particles=1))
    for _ in count():
        for batch in loader:
            share = (time.process_time() - began) / seconds
            if share >= 1:
                with torch.no_grad():
                    posterior = guide.get_posterior()
                    draws = posterior.sample((DRAWS,))
                    return float((subject.log_joint(draws) - posterior.log_prob(draws)).mean())
            for each in optimizer.optim_objs.values():
                each.param_groups[0]["lr"] = 0.01 * 0.01**share
            svi.step(*batch)
    raise AssertionError


def one(rows: int, predictors: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    subject = Regression(rows, predictors)
    loader = DataLoader(TensorDataset(subject.x, subject.y), batch_size=BATCH, shuffle=True)
    began = time.process_time()
    result = fit(subject.model, loader=loader, seed=0, progress=False)
    seconds = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    evidence, error = subject.log_evidence()
    return {
        "rows": f"{rows:,}",
        "predictors": predictors,
        "CPU s": f"{seconds:.0f}",
        "steps": result.num_steps,
        "trusted": "yes" if result.trusted else "no",
        "gap": f"{evidence - result.elbo:.4f}",
        "error of both": f"{math.hypot(error, result.elbo_se):.4f}",
        "peak GB": f"{memory:.2f}",
        "gap of Adam": f"{evidence - by_adam(subject, loader, seconds):.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", type=float, default=[1e5, 1e6])
    parser.add_argument("--predictors", nargs="*", type=int, default=[8, 50])
    parser.add_argument("--one", action="store_true", help="the case alone, in this process")
    parser.add_argument("--write", action="store_true", help="the table, into loader.md")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(int(options.rows[0]), options.predictors[0])))
        return
    found = []
    for rows in options.rows:
        for predictors in options.predictors:
            case = ["--rows", str(rows), "--predictors", str(predictors), "--one"]
            found.append(in_a_process(__file__, *case))
            print(found[-1], flush=True)
    lines = [f"| {' | '.join(found[0])} |", "|" + "---|" * len(found[0])]
    lines += [f"| {' | '.join(map(str, row.values()))} |" for row in found]
    text = "\n".join(lines)
    print(text)
    if options.write:
        marked_table.write(text, Path(__file__).parent / "loader.md")


if __name__ == "__main__":
    main()
