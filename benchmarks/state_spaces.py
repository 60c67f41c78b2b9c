# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""State spaces, fields and sparse regressions: `mcmc` beside NumPyro's NUTS; see state_spaces.md.

    python benchmarks/state_spaces.py [MODEL ...] [--seeds N ...] [--limit SECONDS] [--write]

Clocks and effective draws are those of chains.py. Each run is a process of its own and a line of a file, so
that a run goes on where the last one ended (delete the file after a change). It needs the extra [bench].
"""

import argparse
import importlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from chains import TARGETS, Problem, by_ensemble, by_nuts
from chains_table import best, cell, of_draws, reference
from marked_table import write
from results import Row, collect, in_a_process
from state_spaces_models import SUBJECTS, subject

HERE = Path(__file__).parent
ENSEMBLE, NUTS = "ensemble", "NumPyro NUTS"


def one(run: Row) -> Row:
    """A run in this process."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(run["seed"])
    pyro.enable_validation(False)
    model, args = subject(run["posterior"])

    def peer() -> Any:
        return importlib.import_module("state_spaces_peers").PEERS[model.__name__]

    problem = Problem(run["posterior"], model, args, peer)
    if run["subject"] == ENSEMBLE:
        return by_ensemble(problem, run["seed"], run["limit"])
    return by_nuts(problem, run["seed"], run["limit"], run["target_accept"])


def table(outcomes: list[Row]) -> str:
    """A row for each model."""
    heads = ["model, latents", "`mcmc`, CPU s", "trusted", "gradients", "least ESS"]
    heads += ["means off, sds", "sds off", "NUTS, CPU s"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    for name in SUBJECTS:
        ours, peers = (best(outcomes, name, which) for which in (ENSEMBLE, NUTS))
        if not ours:
            continue
        sizes = {row["latents"] for row in ours if "latents" in row}
        trusted = f"{sum(row.get('trusted', False) for row in ours)} of {len(ours)}"
        cells = [", ".join([name, *map(str, sizes)]), cell(ours), trusted]
        cells += [*of_draws(ours, reference(outcomes, name)), cell(peers)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *SUBJECTS], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a run")
    parser.add_argument("--results", type=Path, default=HERE / "state_spaces.jsonl")
    parser.add_argument("--write", action="store_true", help="put the table into state_spaces.md")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return

    def wanted() -> Iterator[Row]:
        """NUTS has one seed."""
        for name in options.models or SUBJECTS:
            run: Row = {"posterior": name, "limit": options.limit}
            yield from (run | {"subject": ENSEMBLE, "seed": seed} for seed in options.seeds)
            nuts = run | {"subject": NUTS, "seed": options.seeds[0]}
            yield from (nuts | {"target_accept": target} for target in TARGETS)

    def runs(rows: list[Row]) -> Iterator[Row]:
        for run in wanted():
            if not any(run.items() <= row.items() for row in rows):
                yield run | in_a_process(__file__, "--one", json.dumps(run))

    text = table(collect(options.results, runs))
    if options.write:
        write(text, HERE / "state_spaces.md")
    else:
        print(text)


if __name__ == "__main__":
    main()
