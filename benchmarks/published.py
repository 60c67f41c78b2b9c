# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Gradients until second moments are right, on targets of papers about samplers; see published.md.

    python benchmarks/published.py [TARGET ...] [--seeds N ...] [--limit SECONDS] [--write]

It needs the extra [bench] and `pip install inference_gym`, whose data and moments it reads. Each run is a
process of its own.
"""

import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pyro
import torch
from measuring import pages, runs
from measuring.runs import Row
from models.library import PYRO, in_numpyro
from models.published import TARGETS, Truth

from pyro_artransform._base.time_limit import TimeLimit
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import Ensemble
from pyro_artransform.sampling.run_mcmc import from_nothing

ENSEMBLE, NUTS = "ensemble", "NumPyro NUTS"
#: the squared error that is small enough, and effective draws that are asked for at first
LOW, NUM_DRAWS = 0.01, 400
#: draws of NUTS of a block, and of its warm-up
EVERY, NUM_WARM_UP = 250, 500


def squares(draws: dict[str, Any], truth: Truth) -> np.ndarray:
    """The standardized error of the square of each draw: shape ``(..., n, latents)``."""
    values = {site: np.asarray(z) for site, z in draws.items()}
    if "half" in values:
        values["persistence_of_volatility"] = 2 * values["half"] - 1
    parts = [
        ((values[site] ** 2).reshape(*values[site].shape[:2], -1) - mean) / np.sqrt(variance)
        for site, (mean, variance) in truth.items()
    ]
    return np.concatenate(parts, -1)


def crossings(errors: np.ndarray, gradients: list[int], transient: float) -> Row:
    """Gradients at which squared errors fall and stay below the low one.

    :param errors: shape ``(chains, n, latents)``.
    :param gradients: after each of the n draws of a chain.
    :param transient: the share of draws that is left out.
    """
    sums = np.concatenate([np.zeros((1, errors.shape[2])), errors.mean(0).cumsum(0)])
    ends = np.arange(1, len(sums))
    starts = np.floor(transient * ends).astype(int)
    squared = ((sums[ends] - sums[starts]) / (ends - starts)[:, None]) ** 2
    row: Row = {"latents": errors.shape[2], "total": gradients[-1]}
    for name, error in (("max", squared.max(1)), ("mean", squared.mean(1))):
        first = int(np.flatnonzero(np.append(True, error >= LOW))[-1])
        row[name] = gradients[first] if first < len(gradients) else None
        row[f"last {name}"] = float(error[-1])
    return row


def is_done(row: Row) -> bool:
    """Whether the error has been low for as many gradients again."""
    return row["max"] is not None and 2 * row["max"] <= row["total"]


class Watched(Ensemble):
    """Notes the gradients of all chains after each trajectory."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gradients: list[int] = []

    def _step(self, *args: Any) -> Any:
        info = super()._step(*args)
        self.gradients.append(self.num_gradients)
        return info

    def row(self, truth: Truth) -> Row:
        blocks = torch.cat(self._blocks, 1)
        sites = self.log_joint.latents.constrain(blocks)
        gradients = self.gradients[-blocks.shape[1] :]
        row = crossings(squares(sites, truth), gradients, 1 / 3)
        return row | {"chains": self.num_chains, "end": self.end.name}


def by_ensemble(name: str, seed: int, limit: float) -> Row:
    """Chains as `mcmc` makes them, which go on for twice as many draws until errors are low."""
    model, args, truth = TARGETS[name]()
    pyro.set_rng_seed(seed)
    log_joint = LogJoint(partial(model, PYRO), tuple(torch.as_tensor(x) for x in args), {})
    like = from_nothing(log_joint, NUM_DRAWS)
    chains = Watched(like.log_joint, NUM_DRAWS)
    row: Row = {}
    number = NUM_DRAWS
    with TimeLimit(limit) as clock:
        while not (row and is_done(row)) and not clock.is_over():
            chains.run(number)
            row, number = chains.row(truth), 2 * number
    return row


def by_nuts(name: str, seed: int, limit: float) -> Row:
    """NumPyro's NUTS, one chain, until errors are low, or the CPU seconds are over."""
    from measuring.nuts import blocks

    model, args, truth = TARGETS[name]()
    errors, gradients = list[np.ndarray](), [0]
    row: Row = {}
    began = time.process_time()
    for block in blocks(partial(model, in_numpyro()), args, seed, NUM_WARM_UP, EVERY):
        gradients += (gradients[-1] + np.cumsum(block.num_gradients)).tolist()
        errors.append(squares({site: z[None] for site, z in block.sites.items()}, truth))
        if len(gradients) > NUM_WARM_UP + EVERY:
            kept = np.concatenate(errors, 1)[:, NUM_WARM_UP:]
            row = crossings(kept, gradients[NUM_WARM_UP + 1 :], 0.0)
        if (row and is_done(row)) or time.process_time() - began > limit:
            break
    return row | {"warm_up": gradients[NUM_WARM_UP] if row else None}


def one(run: Row) -> Row:
    """A run in this process."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    by = by_ensemble if run["subject"] == ENSEMBLE else by_nuts
    began = time.process_time()
    row = by(run["target"], run["seed"], run["limit"])
    return row | {"seconds": time.process_time() - began}


def cells(rows: list[Row], other: Callable[[Row, int], float]) -> list[str]:
    """Medians of both errors: gradients, and what another count of these is."""
    found = []
    for name in ("max", "mean"):
        reached = sorted((row.get(name) or math.inf, i) for i, row in enumerate(rows))
        gradients, i = reached[len(rows) // 2] if rows else (math.nan, 0)
        if math.isfinite(gradients):
            found += [f"{gradients:,}", f"{other(rows[i], int(gradients)):,.0f}"]
        else:
            found += ["not run" if not rows else "not in time", "-"]
    return found


def table(outcomes: list[Row]) -> str:
    """A row for each target."""
    heads = ["target, latents", "chains", "max: `mcmc`", "of a chain", "mean: `mcmc`", "of a chain"]
    heads += ["max: NUTS", "without warm-up", "mean: NUTS", "without warm-up"]
    lines = []
    for name in TARGETS:
        ours, nuts = (
            runs.known(outcomes, {"target": name, "subject": which}) for which in (ENSEMBLE, NUTS)
        )
        if ours:
            row = [f"{name}, {ours[0]['latents']:,}", str(ours[0]["chains"])]
            row += cells(ours, lambda r, g: g / r["chains"])
            lines.append(row + cells(nuts, lambda r, g: g - r["warm_up"]))
    return pages.table(heads, lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_names("targets", TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a run")
    parser.add_argument("--subjects", nargs="+", default=[ENSEMBLE, NUTS])
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    wanted = (
        {"target": name, "subject": subject, "seed": seed, "limit": options.limit}
        for name, subject, seed in product(options.targets, options.subjects, options.seeds)
    )
    parser.show(table(runs.collect(options.results, wanted, runs.in_processes(__file__))), options)


if __name__ == "__main__":
    main()
