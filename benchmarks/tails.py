# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether draws reach the tails of scales: shares beyond exact quantiles; see tails.md.

    python benchmarks/tails.py [--targets NAME ...] [--seeds SEED ...] [--subject mcmc|fit] [--write]
    python benchmarks/tails.py --check | --reference

Each run is a process of its own, and a line of a file, so that it goes on where the last one ended (delete
the file, or name another one with --results, after a change). --subject fit runs `fit(draws=400)` instead
of `mcmc(model, draws=400)`. --write puts the table into tails.md. --check tries the exact quantiles by
other routes, and --reference makes those of the dose response anew, by the extra [bench].
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import results
import torch
from marked_table import write
from results import Row
from tails_models import LEVELS, TARGETS

from pyro_artransform import fit
from pyro_artransform.sampling import mcmc

HERE = Path(__file__).parent
NUM_DRAWS = 400
#: levels of quantiles, in which direction shares are counted, and their bounds
LOW, MIDDLE, HIGH = 0.03, 0.5, 0.97
BOUNDS = ((0.015, 0.06), (0.44, 0.56), (0.015, 0.06))


def draw(subject: str, name: str, seed: int) -> Any:
    """Chains of a target."""
    target = TARGETS[name]
    if subject == "fit":
        found: Any = fit(target.model, *target.args, draws=NUM_DRAWS, seed=seed, progress=False)
        return found.chains
    return mcmc(target.model, *target.args, draws=NUM_DRAWS, seed=seed, progress=False)


def one(subject: str, target: str, seed: int) -> Row:
    """A run in this process: shares of each scale below, below and above quantiles."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    began = time.process_time()
    chains = draw(subject, target, seed)
    row: Row = {"seconds": time.process_time() - began}
    row |= {key: getattr(chains, key) for key in ("trusted", "verdict", "min_ess", "max_rhat")}
    row["shares"] = {}
    for name, z in TARGETS[target].values(chains.by_chain).items():
        at = TARGETS[target].quantiles[name]
        found = (z < at[LOW], z < at[MIDDLE], z > at[HIGH])
        row["shares"][name] = [float(is_beyond.double().mean()) for is_beyond in found]
    return row


def collect(options: argparse.Namespace) -> list[Row]:
    """All outcomes asked for, those of the file and those that it lacks."""
    asked = [
        {"subject": options.subject, "target": target, "seed": seed}
        for target in options.targets
        for seed in options.seeds
    ]

    def missing(rows: list[Row]) -> Iterator[Row]:
        for run in asked:
            if not any(run.items() <= row.items() for row in rows):
                yield run | results.in_a_process(__file__, "--one", json.dumps(run))

    rows = results.collect(options.results, missing)
    return [row for row in rows if any(run.items() <= row.items() for run in asked)]


def is_outside(shares: list[float]) -> list[bool]:
    return [not low <= share <= high for share, (low, high) in zip(shares, BOUNDS)]


def table(rows: list[Row]) -> str:
    """A row for each scale, with the shares of each seed in percent: in brackets if not trusted."""
    heads = ["target", "scale", "below 3 %", "below 50 %", "above 97 %", "trusted", "CPU s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [row for row in rows if row["target"] == target]
        ended = [row for row in of_target if "error" not in row]
        lines += [
            f"| {target} | {row['error']} {'|' * (len(heads) - 1)}"
            for row in of_target
            if "error" in row
        ]
        count = f"{sum(row['trusted'] for row in ended)} of {len(of_target)}"
        seconds = ", ".join(f"{row['seconds']:.1f}" for row in ended)
        for number, scale in enumerate(TARGETS[target].scales if ended else []):
            cells = []
            for k in range(len(BOUNDS)):
                shares = ((f"{100 * row['shares'][scale][k]:.1f}", row["trusted"]) for row in ended)
                cells.append(
                    ", ".join(text if trusted else f"({text})" for text, trusted in shares)
                )
            about = (target, scale) if number == 0 else ("", scale)
            rest = (count, seconds) if number == 0 else ("", "")
            lines.append(f"| {' | '.join([*about, *cells, *rest])} |")
    return "\n".join(lines)


def outside_by_chance() -> float:
    """The share of shares outside of their bounds, of independent draws."""
    from scipy.stats import binom

    inside = [
        binom(NUM_DRAWS, level).cdf([round(low * NUM_DRAWS) - 1, round(high * NUM_DRAWS)])
        for level, (low, high) in zip((LOW, MIDDLE, 1 - HIGH), BOUNDS)
    ]
    return 1 - sum(high - low for low, high in inside) / len(BOUNDS)


def summary(rows: list[Row]) -> str:
    """How many are trusted, and how many of these, and of their shares, are outside of the bounds."""
    trusted = [row for row in rows if row.get("trusted")]
    outside = [
        [flag for shares in row["shares"].values() for flag in is_outside(shares)]
        for row in trusted
    ]
    shares = sum(map(len, outside))
    return (
        f"Of {len(rows)} runs {len(trusted)} are trusted, of which {sum(map(any, outside))} have a share "
        f"outside of the bounds: {sum(map(sum, outside))} of {shares} shares. Of {NUM_DRAWS} independent "
        f"draws it would be {outside_by_chance() * shares:.0f} shares."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--subject", choices=("mcmc", "fit"), default="mcmc")
    parser.add_argument("--results", type=Path, default=HERE / "tails.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(**options.one)))
    elif options.check:
        from tails_check import check

        check()
    elif options.reference:
        from tails_dose import make_reference

        make_reference(LEVELS)
    else:
        rows = collect(options)
        text = f"{table(rows)}\n\n{summary(rows)}"
        print(text)
        if options.write:
            write(text, HERE / "tails.md")


if __name__ == "__main__":
    main()
