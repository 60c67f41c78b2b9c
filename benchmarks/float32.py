# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Plain SVI in float32: how many runs end in NaN, and how large the largest loss of a run is.

    python benchmarks/float32.py [MODEL ...] [--guides AutoIAF AutoMAF pyro] [--seeds 20] [--steps 1000]
                                 [--step-size 0.01]

One particle a step (eight for the bound of Renyi), Adam, nothing clipped, beside Pyro's AutoIAFNormal.
"""

import argparse
import math
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal

from pyro_artransform import AutoIAF, AutoMAF

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
COUNTS = torch.tensor([3.0, 0.0, 1.0, 0.0, 7.0, 0.0, 0.0, 2.0, 0.0, 1.0])
ROWS = torch.tensor([1.2, 0.3, -0.5, 2.2, 0.9])


def mixed() -> None:
    """A simplex, a scale and a location."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(ROWS)):
        pyro.sample("y", dist.Normal(loc * weights[..., :1], scale), obs=ROWS)


def counts() -> None:
    """Counts in ten classes, with mass at the edges of the simplex."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((10,), 0.2)))
    pyro.sample("y", dist.Multinomial(int(COUNTS.sum()), weights), obs=COUNTS)


def schools() -> None:
    """The centred eight schools."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(EFFECTS)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


MODELS = {
    "mixed": (mixed, Trace_ELBO),
    "counts": (counts, Trace_ELBO),
    "schools": (schools, Trace_ELBO),
    "schools, Renyi": (schools, lambda: RenyiELBO(num_particles=8, vectorize_particles=True)),
}
GUIDES = {"AutoIAF": AutoIAF, "AutoMAF": AutoMAF, "pyro": AutoIAFNormal}


def losses_of_run(name: str, kind: str, seed: int, steps: int, step_size: float) -> list[float]:
    """The losses up to the first that is not finite."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, make_elbo = MODELS[name]
    svi = SVI(model, GUIDES[kind](model), pyro.optim.Adam({"lr": step_size}), make_elbo())
    losses = []
    for _ in range(steps):
        try:
            losses.append(svi.step())
        except ValueError:  # of parameters that are NaN
            losses.append(math.nan)
        if not math.isfinite(losses[-1]):
            break
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--guides", nargs="*", default=list(GUIDES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--step-size", type=float, default=0.01)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    print("| model | guide | step size | steps | NaN | median largest loss | largest | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for kind in args.guides:
            start, failed, largest = time.process_time(), 0, []
            for seed in range(args.seeds):
                losses = losses_of_run(name, kind, seed, args.steps, args.step_size)
                failed += not math.isfinite(losses[-1])
                largest.append(max(filter(math.isfinite, losses), default=math.inf))
            row = f"| {name} | {kind} | {args.step_size} | {args.steps} | {failed} of {args.seeds} "
            seconds = time.process_time() - start
            spikes = f"{statistics.median(largest):.0f} | {max(largest):.3g}"
            print(f"{row}| {spikes} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
