# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits by mini-batches under ten likelihoods and priors, beside chains with all data; see likelihoods.md.

    python benchmarks/likelihoods.py [MODEL ...] [--seeds N ...] [--write]

Each run is a process of its own: `mcmc` with all data, then `fit(model, loader=loader, max_seconds=60)`, with
nothing else set.
"""

import json
import sys
import time
import warnings
from itertools import product
from typing import Any

import pyro
import torch
from measuring import pages, runs
from measuring.runs import Row
from models.likelihoods import NAMES, make
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import fit, mcmc

_SECONDS, _BATCH, _NUM_DRAWS = 60, 500, 4000
COLUMNS = {
    "latents": "{}",
    "mcmc": "{:.0f}",
    "fit": "{:.0f}",
    "first": "{:.1f}",
    "steps": "{:,}",
    "gap": "{:.2f}",
    "khat": "{:.2f}",
    "trusted": "{}",
    "globals": "{:.2f}",
    "global_sds": "{:+.0f}",
    "elements": "{:.2f}",
    "element_sds": "{:+.0f}",
}
HEADS = ["model", "latents", "mcmc, CPU s", "fit, CPU s", "first step, s", "steps", "gap", "k-hat"]
HEADS += ["trusted", "globals, sds", "their sds, %", "elements: rms, sds", "their sds, %"]


def one(run: Row) -> Row:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, data = make(run["model"])
    began = time.process_time()
    chains = mcmc(model, *data, draws=1000, seed=100, progress=False)
    row: Row = {"mcmc": time.process_time() - began, "draws_trusted": chains.trusted}
    pyro.clear_param_store()
    loader = DataLoader(TensorDataset(*data), batch_size=_BATCH, shuffle=True)
    first, start, began = list[float](), time.perf_counter(), time.process_time()

    def callback(*_: object) -> None:
        if not first:
            first.append(time.perf_counter() - start)

    options: dict[str, Any] = {"seed": run["seed"], "progress": False, "callback": callback}
    result = fit(model, loader=loader, max_seconds=_SECONDS, **options)
    row |= {"fit": time.process_time() - began, "first": first[0] if first else _SECONDS}
    row |= {"steps": result.num_steps, "gap": result.log_evidence - result.elbo}
    row |= {"khat": result.khat, "trusted": result.trusted}
    row["latents"] = sum(value[0].numel() for value in chains.draws.values())
    return row | errors(result.guide.sample_posterior(_NUM_DRAWS), chains.draws)


def errors(draws: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> Row:
    """Largest errors of global latents, and mean ones of elements of plates."""
    worst, worst_sd, squares, ratios = 0.0, 0.0, list[torch.Tensor](), list[torch.Tensor]()
    for name, values in exact.items():
        own, value = (v.double().reshape(len(v), -1) for v in (draws[name], values))
        is_free = value.std(0) > 1e-6  # entries of a factor may be constant
        sd = value.std(0)[is_free]
        error = ((own.mean(0) - value.mean(0))[is_free] / sd).abs()
        ratio = own.std(0)[is_free] / sd - 1
        if len(error) > 100:
            squares.append(error.square())
            ratios.append(ratio)
        else:
            worst = max(worst, float(error.max()))
            worst_sd = max(worst_sd, *ratio.tolist(), key=abs)
    rms, mean = float(torch.cat(squares).mean().sqrt()), float(torch.cat(ratios).mean())
    found = {"globals": worst, "global_sds": 100 * worst_sd}
    return found | {"elements": rms, "element_sds": 100 * mean}


def table(rows: list[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        values = [", ".join(form.format(row[key]) for row in own) for key, form in COLUMNS.items()]
        lines.append([name, *values])
    return pages.table(HEADS, lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("models", nargs="*", help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    wanted = ({"model": m, "seed": s} for m, s in product(options.models or NAMES, options.seeds))
    found = runs.collect(options.results, wanted, runs.in_processes(__file__))
    for row in found:
        if "error" in row:
            print(f"{row['model']}, seed {row['seed']}: {row['error']}", file=sys.stderr)
    parser.show(table([row for row in found if "error" not in row]), options)


if __name__ == "__main__":
    main()
