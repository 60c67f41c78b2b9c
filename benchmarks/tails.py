# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether draws reach the tails of scales: shares beyond exact quantiles; see tails.md.

    python benchmarks/tails.py [--targets NAME ...] [--seeds SEED ...] [--subject mcmc|fit] [--write]

Each run is a process of its own. --subject fit runs `fit(draws=400)` instead of `mcmc(model, draws=400)`.
"""

import json
import time
import warnings
from itertools import product
from typing import Any

import pyro
import torch
from measuring import pages, runs
from measuring.runs import Row
from models.known_quantiles import TARGETS

from pyro_artransform import fit
from pyro_artransform.sampling import mcmc

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


def is_outside(shares: list[float]) -> list[bool]:
    return [not low <= share <= high for share, (low, high) in zip(shares, BOUNDS)]


def table(rows: list[Row]) -> str:
    """A row for each scale, with the shares of each seed in percent: in brackets if not trusted."""
    heads = ["target", "scale", "below 3 %", "below 50 %", "above 97 %", "trusted", "CPU s"]
    lines = []
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = runs.known(rows, {"target": target})
        ended = [row for row in of_target if "error" not in row]
        lines += [[target, row["error"], *[""] * 5] for row in of_target if "error" in row]
        count = f"{sum(row['trusted'] for row in ended)} of {len(of_target)}"
        seconds = ", ".join(f"{row['seconds']:.1f}" for row in ended)
        for number, scale in enumerate(TARGETS[target].scales if ended else []):
            cells = []
            for k in range(len(BOUNDS)):
                shares = ((f"{100 * row['shares'][scale][k]:.1f}", row["trusted"]) for row in ended)
                cells.append(", ".join(text if ok else f"({text})" for text, ok in shares))
            rest = [count, seconds] if number == 0 else ["", ""]
            lines.append(["" if number else target, scale, *cells, *rest])
    return pages.table(heads, lines)


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
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--subject", choices=("mcmc", "fit"), default="mcmc")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(**options.one)))
        return
    wanted = [
        {"subject": options.subject, "target": target, "seed": seed}
        for target, seed in product(options.targets, options.seeds)
    ]
    rows = runs.collect(options.results, wanted, runs.in_processes(__file__))
    found = [row for run in wanted for row in runs.known(rows, run)]
    parser.show(f"{table(found)}\n\n{summary(found)}", options)


if __name__ == "__main__":
    main()
