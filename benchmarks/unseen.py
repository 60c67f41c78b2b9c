# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits and draws, with nothing set, of posteriors that no number of a fit was made on.

    python benchmarks/unseen.py [POSTERIOR ...] [--seeds 1] [--draws 400]

Prints CPU seconds, steps, the ELBO, its distance from the evidence by the guide's weights (nats), k-hat, and
what the draws of the fit say of themselves. With --draws, of `mcmc(model, draws=draws)` alone: how far means
and sds of unconstrained latents are from those of 4,000 effective draws with another seed, in sds and in
percent, in brackets where these are not trusted.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from models.unseen import MODELS

from pyro_artransform import AutoIAF, fit
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import Chains, mcmc

Model, Data = Callable[..., Any], tuple[Any, ...]
NUM_REFERENCE = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posteriors", nargs="*", choices=[[], *MODELS], default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--draws", type=int)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    of_chains = ["draws trusted", "least ESS", "R-hat", "divergent, %"]
    first = ["steps", "ELBO", "gap", "k-hat", "trusted"]
    last = ["worst mean, sds", "worst sd"]
    names = [*of_chains, *last] if args.draws else [*first, *of_chains]
    names = ["posterior", "seed", "CPU s", *names]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name in args.posteriors or MODELS:
        subject = MODELS[name]()
        for seed in range(args.seeds):
            pyro.clear_param_store()
            began = time.process_time()
            row = by_mcmc if args.draws else by_fit
            cells = row(*subject, seed, args.draws)
            seconds = f"{cells.pop(0) - began:.1f}"
            print(f"| {' | '.join([name, str(seed), seconds, *cells])} |", flush=True)


def by_fit(model: Model, data: Data, seed: int, _: int | None) -> list[Any]:
    found = fit(model, AutoIAF(model), *data, seed=seed, progress=False)
    ended, gap = time.process_time(), found.log_evidence - found.elbo
    numbers = f"{found.elbo:.4f}", f"{gap:.4f}", f"{found.khat:.2f}", str(found.trusted)
    return [ended, str(found.num_steps), *numbers, *of(found.chains)]


def by_mcmc(model: Model, data: Data, seed: int, num_draws: int) -> list[Any]:
    found = mcmc(model, *data, draws=num_draws, seed=seed, progress=False)
    ended = time.process_time()
    other = mcmc(model, *data, draws=NUM_REFERENCE, seed=100, progress=False)
    latents = LogJoint(model, data).latents
    one, reference = (
        latents.unconstrain({name: value.flatten(0, 1) for name, value in chains.by_chain.items()})
        for chains in (found, other)
    )
    mean = ((one.mean(0) - reference.mean(0)) / reference.std(0)).abs().max()
    sd = (one.std(0) / reference.std(0) - 1).abs().max()
    differences = [f"{mean:.2f}", f"{100 * sd:.0f} %"]
    if not other.trusted:
        differences = [f"({value})" for value in differences]
    return [ended, *of(found), *differences]


def of(chains: Chains) -> list[str]:
    """What chains say of themselves."""
    count = len(chains.bfmi) * next(iter(chains.by_chain.values())).shape[1]
    share = f"{100 * chains.num_divergent / count:.2f}"
    return [str(chains.trusted), f"{chains.min_ess:.0f}", f"{chains.max_rhat:.3f}", share]


if __name__ == "__main__":
    main()
