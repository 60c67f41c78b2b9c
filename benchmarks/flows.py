# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Which flow a preset should have: `fit` with several of them on small posteriors of several kinds.

    python benchmarks/flows.py [POSTERIOR ...] [--seeds 2]

Prints for each posterior and flow the distance of the ELBO from the best log evidence that any of
them has found (nats), k-hat, and seconds; medians over seeds, and the worst k-hat.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import pyro
import torch
from models.small import POSTERIORS
from torch import nn

from pyro_artransform import (
    AutoAutoregressive,
    AutoIAF,
    fit,
    hinged_marginals,
    iaf,
    spline_autoregressive,
)
from pyro_artransform.flows.transforms import chain


def wide(d: int, num_transforms: int = 3) -> nn.Module:
    """Layers with the networks that :class:`AutoIAF` has by default."""
    return iaf(d, num_transforms, **AutoIAF._network(d))


def splines(d: int) -> nn.Module:
    return chain([spline_autoregressive(d), spline_autoregressive(d, order=range(d - 1, -1, -1))])


FLOWS = {
    "3 affine": wide,
    "hinges, 3 affine, 2 x 64 ELU": lambda d: chain([hinged_marginals(d), iaf(d)]),
    "hinges, 2 affine": lambda d: chain([hinged_marginals(d), wide(d, 2)]),
    "2 splines, 2 x 64 ELU": splines,
}


def guides() -> dict[str, Callable[..., nn.Module]]:
    """The preset and what it is compared with, by name."""
    others = {name: partial(AutoAutoregressive, flow=flow) for name, flow in FLOWS.items()}
    return {"hinges, 3 affine (preset)": AutoIAF, **others}


def run(posterior: str, guide: str, seed: int):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = POSTERIORS[posterior]
    return fit(model, guides()[guide](model), progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("posteriors", nargs="*", default=list(POSTERIORS))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    print("| posterior | flow | gap (nats) | k-hat | worst k-hat | steps | seconds |")
    print("|---|---|---|---|---|---|---|")
    for posterior in args.posteriors:
        found = {name: [run(posterior, name, s) for s in range(args.seeds)] for name in guides()}
        evidence = max(r.log_evidence for rs in found.values() for r in rs)
        for name, results in found.items():
            gap, khat, steps, seconds = (
                statistics.median(values)
                for values in zip(
                    *((evidence - r.elbo, r.khat, r.num_steps, r.seconds) for r in results)
                )
            )
            worst = max(r.khat for r in results)
            print(
                f"| {posterior} | {name} | {gap:.4f} | {khat:.2f} | {worst:.2f} | {steps:.0f} "
                f"| {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
