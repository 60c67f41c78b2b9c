# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a guide costs beside its draws: CPU seconds of `fit` over those of `mcmc`; see price.md.

    python benchmarks/price.py [MODEL ...] [--seeds N ...] [--folder FOLDER] [--write]

Each run is a process of its own: `mcmc(model, draws=400)`, then `fit(model)` with nothing set. --folder
measures models of a folder instead: its models.py has NAMES, and either make(name), which returns a model
with its arguments, or a function for each name, which returns a dictionary with `model` and `data`.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from measuring import pages, runs
from measuring.runs import Row
from models.bugs import EXAMPLES
from models.bugs import subject as of_bugs
from models.library import from_folder

from pyro_artransform import fit, mcmc

HEADS = ["model", "latents", "mcmc, CPU s", "fit, CPU s", "ratio", "k-hat", "gap", "steps"]
HEADS += ["guide trusted"]
COLUMNS = {
    "mcmc": "{:.1f}",
    "fit": "{:.1f}",
    "ratio": "{:.1f}",
    "khat": "{:.2f}",
    "gap": "{:.3f}",
    "steps": "{:,}",
    "trusted": "{}",
}


def subject(name: str, folder: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A model and its arguments."""
    if not folder:
        return of_bugs(name)
    module = from_folder(Path(folder))
    if not hasattr(module, "make"):
        found = getattr(module, name)()
        return found["model"], tuple(torch.as_tensor(value) for value in found["data"])
    model, data = module.make(name)
    return model, data if isinstance(data, tuple) else ()


def one(run: Row) -> Row:
    """Draws and a fit in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, data = subject(run["model"], run["folder"])
    options = {"seed": run["seed"], "progress": False}
    began = time.process_time()
    chains = mcmc(model, *data, draws=400, **options)
    row: Row = {"mcmc": time.process_time() - began, "draws_trusted": chains.trusted}
    pyro.clear_param_store()
    began = time.process_time()
    result = fit(model, *data, **options)
    row |= {"fit": time.process_time() - began, "khat": result.khat, "steps": result.num_steps}
    row |= {"gap": result.log_evidence - result.elbo, "trusted": result.trusted}
    latents = sum(value[0].numel() for value in chains.draws.values())
    return row | {"ratio": row["fit"] / row["mcmc"], "latents": latents}


def table(rows: list[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        values = [", ".join(form.format(row[key]) for row in own) for key, form in COLUMNS.items()]
        lines.append([name, str(own[0]["latents"]), *values])
    return pages.table(HEADS, lines)


def summary(rows: list[Row]) -> str:
    right = [row for row in rows if row["draws_trusted"]]
    ratios = [row["ratio"] for row in right]
    trusted = sum(row["trusted"] for row in right)
    return (
        f"Of {len(rows)} runs {len(right)} have trusted draws; of these the median ratio is "
        f"{median(ratios):.1f}, the largest {max(ratios):.1f}, and {trusted} guides are trusted; the "
        f"median gap is {median(row['gap'] for row in right):.3f} nats."
    )


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("models", nargs="*", help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    names = options.models or (
        from_folder(Path(options.folder)).NAMES if options.folder else [*EXAMPLES]
    )
    wanted = (
        {"model": name, "folder": options.folder, "seed": seed}
        for name, seed in product(names, options.seeds)
    )
    found = runs.collect(options.results, wanted, runs.in_processes(__file__))
    for row in found:
        if "error" in row:
            print(f"{row['model']}, seed {row['seed']}: {row['error']}", file=sys.stderr)
    rows = [row for row in found if "error" not in row]
    parser.show("\n\n".join([table(rows), summary(rows)]), options)


if __name__ == "__main__":
    main()
