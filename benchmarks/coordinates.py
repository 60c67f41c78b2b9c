# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""`fit` in coordinates of the prior, beside the model as it is written; see coordinates.md.

    OMP_NUM_THREADS=1 python benchmarks/coordinates.py [MODEL ...] [--coordinates ...] [--seeds N] [--write]

The posterior of slopes is compared with long chains of NumPyro's NUTS, in coordinates_reference.json.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from measuring import pages, runs
from measuring.pages import spread
from measuring.runs import Row
from models import hierarchies
from models.hierarchies import schools_truth as eight_schools
from models.library import PYRO, Subject
from models.paths import walk
from models.priors import funnel_with_data
from models.regressions import horseshoe
from pyro import distributions as dist
from torch import Tensor

from pyro_artransform import fit
from pyro_artransform.guides.choice import choose_guide

REFERENCE = Path(__file__).with_name("coordinates_reference.json")
NUM_DRAWS = 20_000
COORDINATES = ("prior", "model")
#: in the tables
IN_WORDS = {"prior": "prior", "model": "as written"}
_LOWEST = 0.01


class Moments(NamedTuple):
    """The mean and the sd of each element of a quantity, and the lowest quantile where it is known."""

    mean: Tensor
    sd: Tensor
    lowest: float | None = None


class Truth(NamedTuple):
    """What is known of a posterior: its log evidence, or moments of quantities, as functions of sites."""

    evidence: float | None = None
    moments: Mapping[str, Moments] = {}
    quantity: Callable[[str, Mapping[str, Tensor]], Tensor] = lambda name, draws: draws[name]


class Case(NamedTuple):
    """A model in words, with its arguments, seeds, and what is known of its posterior."""

    title: str
    subject: Callable[[], Subject]
    num_seeds: int = 1
    truth: Callable[[], Truth] = Truth


def schools_truth() -> Truth:
    truth = eight_schools()
    moments = {"log tau": Moments(truth.mean, truth.sd, truth.lowest)}
    return Truth(truth.evidence, moments, lambda _, draws: draws["tau"].log())


def funnel_truth() -> Truth:
    v = dist.Normal(0.0, 3.0)
    lowest = v.icdf(torch.tensor(_LOWEST)).item()
    return Truth(0.0, {"v": Moments(v.mean, v.stddev, lowest)})


def slopes_truth() -> Truth:
    stored = json.loads(REFERENCE.read_text())["sites"]
    return Truth(
        moments={
            name: Moments(torch.tensor(site["mean"]), torch.tensor(site["sd"]))
            for name, site in stored.items()
        }
    )


def funnel(num_latents: int) -> Case:
    subject = funnel_with_data, (num_latents,)
    return Case(f"funnel, {num_latents} latents in the plate", lambda: subject, 3, funnel_truth)


CASES = {
    "schools": Case(
        "eight schools", lambda: (hierarchies.schools(PYRO, True), ()), 10, schools_truth
    ),
    **{f"funnel_{count}": funnel(count) for count in (10, 30, 100, 300)},
    "slopes": Case("correlated slopes, 200 groups", hierarchies.slopes, 1, slopes_truth),
    "strong": Case("20 groups of 1,000 rows", hierarchies.strong),
    "mixed": Case("40 groups, every other one known well", hierarchies.mixed),
    "horseshoe": Case("horseshoe, 20 columns, 100 rows", horseshoe),
    "counts": Case("slopes of counts with exposures, 30 groups", hierarchies.counts),
    "walk": Case("random walk by a loop, 60 steps", walk),
    "nested": Case("50 schools in 10 districts", hierarchies.nested),
}


def of_quantity(draws: Tensor, moments: Moments) -> Row:
    """The largest errors of elements that vary: of means in sds, of sds relative; and the lowest quantile."""
    varies = moments.sd > 0
    mean, sd = draws.mean(0)[varies], draws.std(0)[varies]
    true_mean, true_sd = moments.mean[varies], moments.sd[varies]
    row: Row = {
        "mean": ((mean - true_mean) / true_sd).abs().max().item(),
        "sd": (sd / true_sd - 1).abs().max().item(),
    }
    if moments.lowest is not None:
        row["lowest"] = draws.quantile(_LOWEST).item()
    return row


def how_centred(guide: Any) -> list[float] | None:
    """The least and the largest lambda that the fit chose below 1; None for the model as it is written."""
    found = guide.prior_coordinates
    if found is None or (found.centered == 1).all():
        return None
    chosen = found.centered[found.centered < 1]
    return [chosen.min().item(), chosen.max().item()]


def fitted(run: Row) -> Row:
    """A fit of the guide that `fit` chooses, and its errors."""
    case, coordinates, seed = CASES[run["model"]], run["coordinates"], run["seed"]
    model, args = case.subject()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    guide = type(choose_guide(model, args)[0])(model, coordinates=coordinates)
    result = fit(model, *args, guide=guide, progress=False, seed=seed)
    seconds = time.process_time() - began
    truth = case.truth()
    draws = guide.sample_posterior(NUM_DRAWS)
    return {
        "seconds": seconds,
        "guide": type(guide).__name__,
        "latents": guide.latent_dim,
        "steps": result.num_steps,
        "elbo": result.elbo,
        "elbo_se": result.elbo_se,
        "khat": result.khat,
        "log_evidence": result.log_evidence,
        "true_evidence": truth.evidence,
        "trusted": result.trusted,
        "slow": result.one_at_a_time,
        "start": result.start,
        "centred": how_centred(guide),
        "verdict": result.verdict,
        "errors": {
            name: of_quantity(truth.quantity(name, draws), moments)
            for name, moments in truth.moments.items()
        },
    }


def groups(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The fits of a model in some coordinates, one for each seed, with the words of their first column."""
    for name, case in CASES.items():
        title = case.title
        for coordinates in COORDINATES:
            key = {"model": name, "coordinates": coordinates}
            if found := [row for row in rows if key.items() <= row.items()]:
                yield title, found
                title = ""


def nats_missing(row: Row) -> float:
    """From the ELBO to the evidence, where this is known, or else as its weights say."""
    evidence = row["true_evidence"]
    return (row["log_evidence"] if evidence is None else evidence) - row["elbo"]


def lambdas(rows: list[Row]) -> str:
    """The lambdas that the fits chose, and how many fits chose the model as it is written."""
    chosen = [row["centred"] for row in rows if row["centred"] is not None]
    cells = [spread([value for pair in chosen for value in pair], 2)] if chosen else []
    if len(chosen) < len(rows):
        cells.append("1" if not chosen else f"1 in {len(rows) - len(chosen)}")
    return ", ".join(cells)


def of_fits(rows: list[Row]) -> str:
    """A line for each model and its coordinates: the least and the largest figures of all seeds."""
    heads = ["model, latents", "guide", "coordinates", "lambda", "ELBO", "gap", "k-hat", "trusted"]
    lines = []
    for title, found in groups(rows):
        first = found[0]
        known = "" if first["true_evidence"] is not None else "~ "
        lines.append(
            [
                *([f"{title}, {first['latents']}", f"`{first['guide']}`"] if title else ["", ""]),
                IN_WORDS[first["coordinates"]],
                lambdas(found),
                spread([row["elbo"] for row in found], 3),
                known + spread([nats_missing(row) for row in found], 4),
                spread([row["khat"] for row in found], 2),
                f"{sum(row['trusted'] for row in found)} of {len(found)}",
                spread([row["steps"] for row in found]),
                spread([row["seconds"] for row in found], 1),
            ]
        )
    return pages.table([*heads, "steps", "CPU s"], lines)


def of_errors(rows: list[Row]) -> str:
    """A line for each quantity whose moments are known: the least and the largest figures of all seeds."""
    heads = ["model", "coordinates", "quantity", "mean, sds off", "sd, % off", "0.01 quantile"]
    lines = []
    for title, found in groups(rows):
        first = [title, IN_WORDS[found[0]["coordinates"]]]
        for name, known in CASES[found[0]["model"]].truth().moments.items():
            errors = [row["errors"][name] for row in found]
            mean = spread([error["mean"] for error in errors], 3)
            sd = spread([100 * error["sd"] for error in errors], 1)
            lowest = "-"
            if known.lowest is not None:
                lowest = f"{spread([e['lowest'] for e in errors], 2)}, exact {known.lowest:.2f}"
            lines.append([*first, name, mean, sd, lowest])
            first = ["", ""]
    return pages.table(heads, lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_names("models", CASES)
    parser.add_argument("--coordinates", nargs="+", choices=COORDINATES, default=COORDINATES)
    parser.add_argument("--seeds", type=int, default=10, help="seeds of a model at most")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = (
        {"model": name, "coordinates": coordinates, "seed": seed}
        for name in options.models
        for seed in range(min(options.seeds, CASES[name].num_seeds))
        for coordinates in options.coordinates
    )
    rows = runs.collect(options.results, wanted, fitted)
    parser.show(f"{of_fits(rows)}\n\n{of_errors(rows)}", options)


if __name__ == "__main__":
    main()
