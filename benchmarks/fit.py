# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How long until a guide is good: `fit` beside guides and chains of Pyro and NumPyro; see fit.md.

    python benchmarks/fit.py [--posteriors NAME ...] [--subjects NAME ...] [--limit SECONDS] [--write]

CPU seconds, compiling included, until the ELBO is within 0.05 nats of the log evidence, until the end of
`fit` with its verdict, and until 400 effective draws of NUTS. Each run is a process of its own on one
core, one after the other, and a line of a file, so that a run goes on where the last one ended (delete
the file, or name another one with --results, after a change). --write puts table and picture beside this
file. It needs the extra [bench]; a subject that is not installed is left out.
"""

import argparse
import importlib
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fit_posteriors import POSTERIORS
from fit_subjects import ESS, GAP, SUBJECTS
from marked_table import write
from results import Row, append, in_a_process, load

HERE = Path(__file__).parent
STEP_SIZES = (1e-2, 1e-3)


def runs(options: argparse.Namespace) -> Iterator[Row]:
    """What there is to run: for each posterior all subjects take turns."""
    for posterior in options.posteriors:
        for size in range(len(STEP_SIZES)):
            for subject in options.subjects:
                has_sizes = SUBJECTS[subject][1]
                if size and not has_sizes:
                    continue
                # a graph of ten latents that all depend on each other is no structure
                if subject == "AutoStructuredFlow by fit" and posterior != "chain":
                    continue
                run: Row = {"posterior": posterior, "subject": subject, "seed": options.seed}
                yield run | ({"step_size": STEP_SIZES[size]} if has_sizes else {})


def one(run: Row, evidence: float) -> Row:
    """A run in this process, on one core, after the imports that its clock leaves out."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    package = {"NumPyro": "numpyro.infer.autoguide", "Pyro": "pyro.infer.autoguide"}
    importlib.import_module(package.get(run["subject"].split()[0], "pyro_artransform"))
    warnings.simplefilter("ignore")
    subject, _ = SUBJECTS[run["subject"]]
    rest = {key: value for key, value in run.items() if key not in ("posterior", "subject")}
    return subject(posterior=POSTERIORS[run["posterior"]], evidence=evidence, **rest)


def collect(options: argparse.Namespace) -> list[Row]:
    """All outcomes, those of the file and those that it lacks."""
    outcomes = load(options.results)
    for run in runs(options):
        if any(run.items() <= outcome.items() for outcome in outcomes):
            continue
        evidence = POSTERIORS[run["posterior"]].evidence()
        limited = run | {"limit": options.limit}
        arguments = "--one", json.dumps(limited), "--evidence", repr(evidence)
        outcome = limited | in_a_process(__file__, *arguments)
        outcomes.append(outcome)
        append(options.results, outcome)
        rows, name = outcome["rows"], f"{run['posterior']}, {run['subject']}"
        last = rows[-1] if rows else outcome.get("error", "no row")
        print(f"{name}, {run.get('step_size', '-')}: {last}", file=sys.stderr, flush=True)
    return outcomes


def seconds_to_goal(outcome: Row) -> float:
    """CPU seconds to the first row that is good enough; infinite where none is."""
    is_chain = outcome["subject"].endswith("NUTS")
    good = (
        seconds
        for _, seconds, value in outcome["rows"]
        if (value >= ESS if is_chain else value <= GAP)
    )
    return next(good, math.inf)


def best_value(outcome: Row) -> float:
    """The smallest gap, or minus the largest effective sample size, of all rows."""
    sign = -1 if outcome["subject"].endswith("NUTS") else 1
    values = (sign * value for _, _, value in outcome["rows"] if not math.isnan(value))
    return min(values, default=math.inf)


def best(outcomes: list[Row], posterior: str, subject: str) -> Row | None:
    """The run with the best of the step sizes: soonest at the goal, or else nearest to it."""
    found = [o for o in outcomes if (o["posterior"], o["subject"]) == (posterior, subject)]
    return min(found, key=lambda o: (seconds_to_goal(o), best_value(o)), default=None)


def cell(outcome: Row | None) -> str:
    if outcome is None:
        return "not run"
    if not outcome["rows"]:
        return outcome.get("error", "nothing")
    seconds, value = seconds_to_goal(outcome), best_value(outcome)
    if math.isfinite(seconds):
        return f"{seconds:.1f}"
    return f"not: {-value:.0f} draws" if value <= 0 else f"not: {value:.2f}"


def verdict(outcome: Row | None) -> str:
    """Seconds of the whole fit, the gap at its end, and whether it was trusted."""
    if outcome is None or not outcome["rows"]:
        return cell(outcome)
    _, seconds, gap = outcome["rows"][-1]
    return f"{seconds:.1f} ({gap:.3f}, {'trusted' if outcome['trusted'] else 'not trusted'})"


def table(outcomes: list[Row]) -> str:
    """A row for each subject, a column for each posterior."""
    posteriors = [name for name in POSTERIORS if any(o["posterior"] == name for o in outcomes)]
    lines = ["| | " + " | ".join(f"{n}, D={POSTERIORS[n].dim}" for n in posteriors) + " |"]
    lines.append("|---|" + "---|" * len(posteriors))
    for subject in SUBJECTS:
        found = [best(outcomes, name, subject) for name in posteriors]
        if not any(found):
            continue
        lines.append(f"| {subject} | " + " | ".join(map(cell, found)) + " |")
        if subject.endswith("by fit"):
            lines.append("| its verdict | " + " | ".join(map(verdict, found)) + " |")
    return "\n".join(lines)


def draw(outcomes: list[Row], path: Path) -> None:
    """Seconds to the goal by posterior; an open mark at the right edge where it was not reached."""
    from matplotlib import pyplot as plt

    posteriors = [name for name in POSTERIORS if any(o["posterior"] == name for o in outcomes)]
    edge = 2 * max(o["rows"][-1][1] for o in outcomes if o["rows"])
    figure, ax = plt.subplots(figsize=(9, 0.95 * len(posteriors) + 1.6), layout="constrained")
    for number, subject in enumerate(SUBJECTS):
        found = [(y, best(outcomes, name, subject)) for y, name in enumerate(posteriors)]
        rows = [(y, outcome) for y, outcome in found if outcome is not None]
        heights = [y + 0.095 * (number - 3.5) for y, _ in rows]
        times = [min(seconds_to_goal(outcome), edge) for _, outcome in rows]
        is_ours, is_chain = subject.endswith("by fit"), subject.endswith("NUTS")
        style: dict[str, Any] = {"marker": "D" if is_ours else "s" if is_chain else "o", "s": 30}
        color = f"C{number}"
        fills = [color if seconds < edge else "none" for seconds in times]
        ax.scatter(times, heights, color=fills, edgecolors=color, **style)
        ax.scatter([], [], label=subject, color=color, **style)
        for (_, outcome), height, seconds in zip(rows, heights, times):
            if is_ours and outcome["rows"]:
                end = outcome["rows"][-1][1]
                ax.plot([min(seconds, end), end], [height, height], color=color, linewidth=1.2)
                ax.plot(end, height, "|", color=color, markersize=8)
    ax.axvline(edge / 1.35, color="0.8", linewidth=0.8)
    ax.set(xscale="log", xlabel="CPU seconds; at the right edge: not reached")
    ax.set_yticks(range(len(posteriors)), posteriors)
    ax.set_ylim(len(posteriors) - 0.5, -0.5)
    for y in range(1, len(posteriors)):
        ax.axhline(y - 0.5, color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3}
    figure.legend(frameon=False, fontsize=8, **place)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds of a peer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "fit.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--evidence", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.evidence)))
        return
    outcomes = collect(options)
    print(table(outcomes))
    if options.write:
        write(table(outcomes), HERE / "fit.md")
        draw(outcomes, HERE / "fit.png")


if __name__ == "__main__":
    main()
