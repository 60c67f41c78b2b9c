# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits with nothing set of posteriors that no number of a fit was made on.

    python benchmarks/unseen.py [POSTERIOR ...] [--set more] [--seeds 1] [--draws 400]

Prints CPU seconds, steps, the ELBO, its distance from the evidence by the guide's weights (nats), and k-hat;
with --draws, of `fit(draws=...)`, effective draws of the worst latent, R-hat, and how far means and sds of
unconstrained latents are from those of 4,000 effective draws of other chains, in sds and in percent.
"""

import argparse
import time

import pyro
import torch
import unseen_models
import unseen_more
from torch import Tensor
from unseen_models import Subject

from pyro_artransform import AutoIAF, FitResult, fit
from pyro_artransform.inference import mcmc
from pyro_artransform.joint import LogJoint

NUM_REFERENCE = 4000
SETS = {"first": unseen_models.MODELS, "more": unseen_more.MODELS}
MODELS = SETS["first"] | SETS["more"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posteriors", nargs="*", metavar="POSTERIOR", help=", ".join(MODELS))
    parser.add_argument("--set", choices=SETS, default="first", help="where no posterior is named")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--draws", type=int)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    more = ["least ESS", "R-hat", "worst mean, sds", "worst sd"] if args.draws else ["ended"]
    names = ["posterior", "seed", "CPU s", "steps", "ELBO", "gap", "k-hat", "trusted", *more]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name in args.posteriors or SETS[args.set]:
        subject = MODELS[name]()
        for seed in range(args.seeds):
            pyro.clear_param_store()
            began = time.process_time()
            model, data = subject
            found = fit(model, AutoIAF(model), *data, seed=seed, progress=False, draws=args.draws)
            seconds, gap = time.process_time() - began, found.log_evidence - found.elbo
            chains = found.chains
            numbers = f"{seconds:.1f} | {found.num_steps} | {found.elbo:.4f} | {gap:.4f}"
            trusted = found.trusted if chains is None else chains.trusted
            ended = found.stopped_because if chains is None else " | ".join(right(subject, found))
            print(
                f"| {name} | {seed} | {numbers} | {found.khat:.2f} | {trusted} | {ended} |",
                flush=True,
            )


def right(subject: Subject, found: FitResult) -> list[str]:
    """The columns that say how right draws are."""
    model, data = subject
    reference = mcmc(model, found.guide, NUM_REFERENCE, *data, seed=100, progress=False)
    latents = LogJoint(model, data).latents

    def unconstrained(by_chain: dict[str, Tensor]) -> Tensor:
        return latents.unconstrain({name: value.flatten(0, 1) for name, value in by_chain.items()})

    one, other = unconstrained(found.chains.by_chain), unconstrained(reference.by_chain)
    mean = ((one.mean(0) - other.mean(0)) / other.std(0)).abs().max()
    sd = (one.std(0) / other.std(0) - 1).abs().max()
    chains = found.chains
    return [f"{chains.min_ess:.0f}", f"{chains.max_rhat:.3f}", f"{mean:.2f}", f"{100 * sd:.0f} %"]


if __name__ == "__main__":
    main()
