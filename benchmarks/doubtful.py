# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Draws by chains of posteriors that are hard for them: trusted or not, and right or not; see doubtful.md.

    python benchmarks/doubtful.py [TARGET ...] [--seeds 3] [--seconds 60] [--by fit] [--float32] [--write]

Each target divides its posterior into regions whose shares are known: by symmetry, in closed form, or by
quadrature, with draws of all images of a symmetric one. A row is *silent* where chains are trusted although a
share is wrong.
"""

import argparse
import re
import sys
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyro
import torch
from measuring import pages
from models.known_shares import TARGETS

from pyro_artransform import fit
from pyro_artransform.sampling import Chains, mcmc

NUM_DRAWS = 400


def chains_by_fit(model: Callable[[], object], seed: int, seconds: float) -> Chains:
    options = {"draws": NUM_DRAWS, "seed": seed, "relabel": False, "progress": False}
    return fit(model, max_seconds=seconds, **options).chains


def chains_by_mcmc(model: Callable[[], object], seed: int, seconds: float) -> Chains:
    options = {"draws": NUM_DRAWS, "seed": seed, "relabel": False, "progress": False}
    return mcmc(model, max_seconds=seconds, **options)


BY = {"mcmc": chains_by_mcmc, "fit": chains_by_fit}


def row(name: str, seed: int, seconds: float, by: str) -> tuple[bool, list[str]]:
    """Whether chains are silent, and the cells of the table."""
    pyro.clear_param_store()
    target = TARGETS[name]()
    shares, trusted, began = (), False, time.process_time()
    try:
        chains = BY[by](target.model, seed, seconds)
    except (RuntimeError, ValueError) as error:
        verdict = f"{type(error).__name__}: {error}"
    else:
        shares, trusted, verdict = target.shares(chains.by_chain), chains.trusted, chains.verdict
    took = time.process_time() - began
    is_silent = trusted and target.is_wrong(shares, NUM_DRAWS)
    outcome = "**silent**" if is_silent else "yes" if trusted else "no"
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z])", verdict)[0].replace("|", r"\|").replace("\n", " ")
    found, exact = (
        " ".join(f"{100 * p:.1f}" for p in each) or "-" for each in (shares, target.exact)
    )
    return is_silent, [name, str(seed), outcome, found, exact, f"{took:.1f}", sentence]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="wall seconds of a run")
    parser.add_argument("--by", choices=BY, default="mcmc")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.targets) - set(TARGETS)):
        parser.error(f"expected targets among {list(TARGETS)}, got {unknown}")
    torch.set_default_dtype(torch.float32 if options.float32 else torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines, silent = [], []
    for name, seed in product(options.targets or TARGETS, range(options.seeds)):
        is_silent, cells = row(name, seed, options.seconds, options.by)
        print(pages.row(cells), file=sys.stderr, flush=True)
        lines.append(cells)
        silent.append(is_silent)
    heads = ["target", "seed", "trusted", "shares, %", "exact, %", "CPU s", "verdict"]
    text = pages.table(heads, lines)
    text += f"\n\n{sum(silent)} of {len(silent)} are silent, by `{options.by}`."
    print(text)
    if options.write:
        pages.write(text, Path(__file__).with_suffix(".md"))


if __name__ == "__main__":
    main()
