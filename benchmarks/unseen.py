# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits with nothing set of posteriors that no number of a fit was made on.

    python benchmarks/unseen.py [POSTERIOR ...] [--seeds 1]

Prints CPU seconds, steps, the ELBO, its distance from the evidence by the guide's weights (nats), and k-hat.
"""

import argparse
import time

import pyro
import torch
from unseen_models import MODELS

from pyro_artransform import AutoIAF, fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posteriors", nargs="*", default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print("| posterior | seed | CPU s | steps | ELBO | gap | k-hat | trusted | ended |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.posteriors:
        model, data = MODELS[name]()
        for seed in range(args.seeds):
            pyro.clear_param_store()
            began = time.process_time()
            found = fit(model, AutoIAF(model), *data, seed=seed, progress=False)
            seconds, gap = time.process_time() - began, found.log_evidence - found.elbo
            print(
                f"| {name} | {seed} | {seconds:.1f} | {found.num_steps} | {found.elbo:.4f} "
                f"| {gap:.4f} | {found.khat:.2f} | {found.trusted} | {found.stopped_because} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
