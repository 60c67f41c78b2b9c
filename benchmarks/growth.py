# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How a step and its memory grow with the number of latents, beside Pyro's guides; see growth.md.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [DAYS ...] [--out FOLDER] [--limit SECONDS] [--only GUIDE]

The stochastic volatility model of so many days (1,000, 3,000 and 10,000), float64, 64 draws a step. Each
guide and size is a process of its own. "by fit" is a step of ``fit``, after its start; all others are of
Pyro's SVI. Writes growth.png, and prints tables in Markdown.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from volatility import simulate, stochastic_volatility

from pyro_artransform import AutoStructuredFlow, fit

SITES = ("mu", "phi", "sigma", "h")
GUIDES: dict[str, Callable[..., Any]] = {
    "AutoStructuredFlow by fit": AutoStructuredFlow,
    "AutoStructuredFlow": AutoStructuredFlow,
    "AutoNormal": AutoNormal,
    "AutoLowRankMultivariateNormal": AutoLowRankMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoStructured": partial(
        AutoStructured,
        conditionals=dict.fromkeys(SITES, "normal"),
        dependencies={"h": dict.fromkeys(SITES[:3], "linear")},
    ),
}
PARTICLES, STEPS, WARM_UP = 64, 12, 2
MOST_MEMORY = 6_000_000_000  # bytes: a guide that wants more ends with an error


class EnoughSteps(Exception):
    """Ends a fit before its verdict."""


def times_of_fit(guide: Any, y: torch.Tensor) -> list[float]:
    """CPU seconds at the beginning, and after each step."""
    times = [time.process_time()]

    def note(step: int, _: float) -> None:
        times.append(time.process_time())
        if step == STEPS:
            raise EnoughSteps

    try:
        fit(stochastic_volatility, guide, y, num_particles=PARTICLES, callback=note, progress=False)
    except EnoughSteps:
        return times
    raise RuntimeError("the fit has taken fewer steps")


def times_of_svi(guide: Any, y: torch.Tensor) -> list[float]:
    """CPU seconds at the beginning, and after each step."""
    times = [time.process_time()]
    loss = Trace_ELBO(PARTICLES, max_plate_nesting=0, vectorize_particles=True)
    svi = SVI(stochastic_volatility, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    guide(y)
    for _ in range(STEPS):
        svi.step(y)
        times.append(time.process_time())
    return times


def one(name: str, num_days: int) -> dict[str, float]:
    """What a guide takes, in this process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    y, guide = simulate(num_days), GUIDES[name](stochastic_volatility)
    before = peak_memory()
    times = (times_of_fit if name.endswith("by fit") else times_of_svi)(guide, y)
    steps = [end - start for start, end in pairwise(times[1:])][WARM_UP:]
    step = statistics.median(steps)
    start = times[1] - times[0] - step
    return {"step": step, "start": start, "memory": peak_memory() - before, "peak": peak_memory()}


def peak_memory() -> float:
    """Megabytes of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(name: str, num_days: int, limit: float) -> dict[str, float] | str:
    """The same in a process of its own, or why there is nothing."""
    command = [sys.executable, __file__, str(num_days), "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done in {limit:.0f} s"
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1]
        return "out of memory" if "memory" in error.lower() else error[:80]
    return json.loads(done.stdout.splitlines()[-1])


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a line through the logarithms."""
    x, y = ([math.log(value) for value in of] for of in (sizes, values))
    return statistics.linear_regression(x, y).slope


def print_row(name: str, days: int, row: dict[str, float] | str) -> None:
    text = f"{row} | | |"
    if not isinstance(row, str):
        size = f"{row['memory']:.0f} | {row['peak']:.0f}"
        text = f"{1e3 * row['step']:.1f} | {row['start']:.1f} | {size}"
    print(f"| {name} | {days:,} | {text} |", flush=True)


def print_exponents(found: dict[str, dict[int, dict[str, float]]]) -> None:
    print("\n| guide | exponent of a step | of seconds before the first | of memory |")
    print("|---|---|---|---|")
    for name, rows in found.items():
        if len(rows) > 1:
            sizes = list(rows)
            slopes = (
                exponent(sizes, [row[key] for row in rows.values()])
                for key in ("step", "start", "memory")
            )
            print(f"| {name} | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |")


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    labels = {"step": "CPU milliseconds of a step", "memory": "megabytes, without those of PyTorch"}
    for ax, (key, label) in zip(axes, labels.items()):
        for name, rows in found.items():
            values = [row[key] * (1e3 if key == "step" else 1) for row in rows.values()]
            ax.loglog(list(rows), values, "o-", label=name, linewidth=1.2, markersize=4)
        ax.set(xlabel="days", ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3}
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, **place)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("days", nargs="*", type=int, default=[1_000, 3_000, 10_000])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--limit", type=float, default=300.0)
    parser.add_argument("--only", nargs="*", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--one", choices=GUIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.days[0])))
        return
    print("| guide | days | ms a step | s before the first | MB | MB with PyTorch |")
    print("|---|---|---|---|---|---|")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for name in options.only:
        found[name] = {}
        for days in options.days:
            row = in_a_process(name, days, options.limit)
            print_row(name, days, row)
            if not isinstance(row, str):
                found[name][days] = row
    print_exponents(found)
    draw(found, options.out / "growth.png")


if __name__ == "__main__":
    main()
