# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What the last steps of a fit, those for the tails, are worth: `fit` with and without them.

    python benchmarks/tails.py [POSTERIOR ...] [--seeds 3]

Prints for each posterior of benchmarks/flows.py the distance of the ELBO from the best log evidence
that any fit has found (nats), k-hat, and CPU seconds: medians over seeds, and the worst k-hat.
"""

import statistics
import time
from dataclasses import replace

import pyro
from flows import POSTERIORS, set_up

from pyro_artransform import AutoIAF, FitResult, fit
from pyro_artransform.inference import FitConfig

WITH = FitConfig()
WITHOUT = replace(WITH, optimization=replace(WITH.optimization, tail_steps=0))
CONFIGS = {"with": WITH, "without": WITHOUT}


def run(posterior: str, config: FitConfig, seed: int) -> tuple[FitResult, float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, began = POSTERIORS[posterior], time.process_time()
    result = fit(model, AutoIAF(model), config=config, progress=False)
    return result, time.process_time() - began


def main() -> None:
    args = set_up(__doc__.splitlines()[0], num_seeds=3)
    print("| posterior | tail steps | gap (nats) | k-hat | worst k-hat | CPU seconds |")
    print("|---|---|---|---|---|---|")
    for posterior in args.posteriors:
        found = {
            name: [run(posterior, config, seed) for seed in range(args.seeds)]
            for name, config in CONFIGS.items()
        }
        evidence = max(r.log_evidence for runs in found.values() for r, _ in runs)
        for name, runs in found.items():
            gap = statistics.median(evidence - r.elbo for r, _ in runs)
            khats = [r.khat for r, _ in runs]
            seconds = statistics.median(seconds for _, seconds in runs)
            print(
                f"| {posterior} | {name} | {gap:.4f} | {statistics.median(khats):.2f} "
                f"| {max(khats):.2f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
