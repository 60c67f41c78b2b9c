# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""State spaces, fields and sparse regressions: `mcmc` beside NumPyro's NUTS; see state_spaces.md.

    python benchmarks/state_spaces.py [MODEL ...] [--seeds N ...] [--limit SECONDS] [--write]

Clocks and effective draws are those of chains.py, and it needs the extra [bench], too.
"""

import importlib
import json
from collections.abc import Iterator
from typing import Any

from chains import ENSEMBLE, NUTS, TARGETS, Problem, best, cell, measured, of_draws
from measuring import pages, runs
from measuring.runs import Row
from models.state_spaces import SUBJECTS, subject


def make(name: str) -> Problem:
    model, args = subject(name)

    def peer() -> Any:
        return importlib.import_module("models.state_spaces_in_numpyro").PEERS[model.__name__]

    return Problem(name, model, args, peer)


def table(rows: list[Row]) -> str:
    """A row for each model."""
    heads = ["model, latents", "`mcmc`, CPU s", "trusted", "gradients", "least ESS"]
    heads += ["means off, sds", "sds off", "NUTS, CPU s"]
    lines = []
    for name in SUBJECTS:
        if not (ours := best(rows, name, ENSEMBLE)):
            continue
        sizes = {row["latents"] for row in ours if "latents" in row}
        trusted = f"{sum(row.get('trusted', False) for row in ours)} of {len(ours)}"
        cells = [", ".join([name, *map(str, sizes)]), cell(ours), trusted]
        lines.append([*cells, *of_draws(rows, name), cell(best(rows, name, NUTS))])
    return pages.table(heads, lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_names("models", SUBJECTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of a run")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.one, make)))
        return

    def wanted() -> Iterator[Row]:
        """NUTS has one seed."""
        for name in options.models:
            run: Row = {"posterior": name, "limit": options.limit}
            yield from (run | {"subject": ENSEMBLE, "seed": seed} for seed in options.seeds)
            nuts = run | {"subject": NUTS, "seed": options.seeds[0]}
            yield from (nuts | {"target_accept": target} for target in TARGETS)

    rows = runs.collect(options.results, wanted(), runs.in_processes(__file__))
    parser.show(table(rows), options)


if __name__ == "__main__":
    main()
