# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What each number of `FitConfig` does: halved and doubled, over posteriors of every kind.

    python benchmarks/settings.py [PART_OF_NUMBER ...] [--write]

A number of the start is judged by one step after it, one of the verdict by the verdict on 300 steps, the
others by whole fits, all of the guide that `fit` chooses. Each fit is a line of a file, so that a run goes
on where the last one ended. Of each number the table has the worst change of the ELBO, the
verdicts that changed, and the median ratio of steps. It is *seen* where a change is larger than what two
other seeds do to the same fits, or the steps change by a fifth.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import chains_models as large
import marked_table
import models
import pyro
import pyro.distributions as dist
import torch
import unseen_models as unseen
from results import Row, collect
from torch import Tensor
from verdict_posteriors import POSTERIORS
from verdict_targets import TARGETS

from pyro_artransform import AutoAmortized, fit
from pyro_artransform.inference import FitConfig
from pyro_artransform.inference.config import EvaluationConfig

HERE = Path(__file__).parent
SEEDS = (1, 2)
FACTORS = (0.5, 2.0)
#: a short verdict, for all numbers but its own
SHORT = EvaluationConfig(
    num_more_samples=1, num_around=500, num_screened=16, num_by_chains=1, max_by_chains=1
)
#: names of a target of known evidence, by what is hard about it
MODES = ("two 4 sd, 0.5, D=2", "two 8 sd, 0.7, D=2", "two 20 sd, 0.9, D=2")
SHAPES = ("ring 5 ± 0.3", "spike 0.05, D=2", "banana")


def regression_model(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 2_000, subsample_size=len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weight), obs=y)


def regression_by_batches() -> dict[str, Any]:
    x = torch.randn(2_000, 3, generator=torch.Generator().manual_seed(0))
    y = (x.sum(-1) > 0.3 * x[:, 0] ** 2).to(x)
    return {"args": (regression_model,), "loader": [*zip(x.split(100), y.split(100))]}


def groups_model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", 500, subsample_size=len(y), dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("within", 5):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def groups_by_batches() -> dict[str, Any]:
    y = torch.randn(500, 1, generator=torch.Generator().manual_seed(1)) + 1.0
    y = y + torch.randn(500, 5, generator=torch.Generator().manual_seed(2))
    return {"args": (groups_model, AutoAmortized(groups_model)), "loader": [*y.split(50)]}


def branch_model(y: Tensor) -> None:
    """A branch on a value, so that one draw is evaluated after the other."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    wide = float(loc) > 5
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 2 * scale if wide else scale), obs=y)


def branch() -> dict[str, Any]:
    return {"args": (branch_model, torch.linspace(-1.0, 1.0, 12)), "num_particles": 8}


def arguments(name: str) -> dict[str, Any]:
    """The arguments of a fit of a posterior."""
    special = {made.__name__: made for made in (regression_by_batches, groups_by_batches, branch)}
    if name in special:
        return special[name]()
    if name in TARGETS or name in POSTERIORS:
        return {"args": ({**TARGETS, **POSTERIORS}[name]().model,)}
    small = {
        "states of 250": lambda: large.states(250),
        "hierarchy of 300": lambda: large.hierarchy(300),
        "volatility of 250": lambda: large.volatility(250),
        "baseball": models.baseball,
        "process": models.process,
        **unseen.MODELS,
    }
    model, data = small[name]()
    return {"args": (model, *data)}


SMALL = ("dogs", "dugongs", "survival", "growth", "catches", "baseball")
STARTED = ("branch", *SMALL, "states of 250", "hierarchy of 300", "ordinal")
EASY = ("dogs", "dugongs", "survival")
HARD = (
    "seeds",
    "ordinal",
    "drug",
    "poisson_process",
    "process",
    "hierarchy of 300",
    "volatility of 250",
)
BATCHES = ("regression_by_batches", "groups_by_batches")
#: of each part of the settings: the steps of its fits (None: to their own end) and the posteriors
PARTS: dict[str, tuple[int | None, tuple[str, ...]]] = {
    "initialization": (1, STARTED),
    "optimization": (None, (*EASY, *HARD, *MODES[:1], *SHAPES, *BATCHES)),
    "minibatch": (None, BATCHES),
    "evaluation": (300, (*MODES, *SHAPES)),
}


def settings(part: str) -> FitConfig:
    """The settings as they are, but for a short verdict where that is not asked about."""
    return FitConfig() if part == "evaluation" else FitConfig(evaluation=SHORT)


def varied(part: str, number: str, factor: float) -> FitConfig | None:
    """The settings with one number changed; None where that leaves it as it was."""
    config = settings(part)
    group = getattr(config, part)
    old = getattr(group, number)
    new = max(round(old * factor), 1) if isinstance(old, int) else old * factor
    if new == old or (number.endswith("share") and new > 1):
        return None
    return replace(config, **{part: replace(group, **{number: new})})


def run(part: str, name: str, seed: int, config: FitConfig) -> Row:
    """One fit, in short."""
    pyro.clear_param_store()
    torch.manual_seed(seed)
    given, began = arguments(name), time.process_time()
    args = given.pop("args")
    try:
        found = fit(
            *args, seed=seed, progress=False, num_steps=PARTS[part][0], config=config, **given
        )
    except Exception as error:  # an answer as well, and the run goes on
        return {"error": repr(error)[:200], "seconds": time.process_time() - began}
    return {
        "elbo": found.elbo,
        "khat": found.khat,
        "trusted": found.trusted,
        "steps": found.num_steps,
        "seconds": time.process_time() - began,
    }


def runs(options: argparse.Namespace, rows: list[Row]) -> Iterator[Row]:
    done = {
        tuple(row[key] for key in ("part", "number", "factor", "posterior", "seed")) for row in rows
    }
    for part, (_, posteriors) in PARTS.items():
        if options.parts and part not in options.parts:
            continue
        numbers = [field.name for field in fields(getattr(FitConfig(), part))]
        cases = [("", 1.0, seed) for seed in (0, *SEEDS)]
        cases += [(number, factor, 0) for number in numbers for factor in FACTORS]
        for number, factor, seed in cases:
            if number and not any(word in number for word in options.numbers or [""]):
                continue
            config = varied(part, number, factor) if number else settings(part)
            for name in posteriors if config is not None else ():
                if (part, number, factor, name, seed) not in done:
                    key = {"part": part, "number": number, "factor": factor, "posterior": name}
                    yield {**key, "seed": seed, **run(part, name, seed, config)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", help="numbers whose names have one of these parts")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="by default all")
    parser.add_argument("--results", type=Path, default=HERE / "settings.jsonl")
    parser.add_argument("--write", action="store_true", help="the table, into settings.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows = collect(options.results, lambda rows: runs(options, rows))
    text = table(rows)
    print(text)
    if options.write:
        marked_table.write(text, HERE / "settings.md")


def change(row: Row, base: Row, key: str) -> float:
    """The change of a result; infinite where one of the two is an error."""
    if "error" in row or "error" in base:
        return 0.0 if "error" in row and "error" in base else math.inf
    return row[key] - base[key]


def table(rows: list[Row]) -> str:
    """A line for each number and factor that has results."""
    by_case: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        case = row["part"], row["number"], row["factor"], row["seed"]
        by_case.setdefault(case, {})[row["posterior"]] = row
    noise = {
        (part, name): max(
            abs(change(by_case[part, "", 1.0, seed][name], base[name], "elbo"))
            for seed in SEEDS
            if name in by_case.get((part, "", 1.0, seed), {})
        )
        for part in PARTS
        if (base := by_case.get((part, "", 1.0, 0))) and (part, "", 1.0, SEEDS[0]) in by_case
        for name in base
        if name in by_case[part, "", 1.0, SEEDS[0]]
    }
    lines = [
        "| number | value | posteriors | ELBO: worst, beyond seeds | best | trust: lost, won "
        "| steps, ratio | seen |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (part, number, factor, _), found in by_case.items():
        base = by_case.get((part, "", 1.0, 0), {})
        names = [name for name in found if name in base]
        if not number or not names:
            continue
        elbos = {name: change(found[name], base[name], "elbo") for name in names}
        worst, best = min(elbos, key=elbos.__getitem__), max(elbos, key=elbos.__getitem__)
        beyond = [
            name for name in names if abs(elbos[name]) > max(1.5 * noise.get((part, name), 0), 0.01)
        ]
        lost = [n for n in names if base[n].get("trusted") and not found[n].get("trusted")]
        won = [n for n in names if found[n].get("trusted") and not base[n].get("trusted")]
        ratio = statistics.median(
            found[n].get("steps", 1) / max(base[n].get("steps", 1), 1) for n in names
        )
        config = varied(part, number, factor)
        value = getattr(getattr(config, part), number)
        is_seen = bool(beyond or lost or won) or not 0.8 < ratio < 1.25
        lines.append(
            f"| `{number}` | {value:g} | {len(names)} | {elbos[worst]:+.3f} ({worst}), {len(beyond)} "
            f"| {elbos[best]:+.3f} | {len(lost)}, {len(won)} | {ratio:.2f} | {'yes' if is_seen else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
