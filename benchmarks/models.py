# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""`fit` with nothing set on models as users write them, beside two of Pyro's guides; see models.md.

    OMP_NUM_THREADS=1 python benchmarks/models.py [MODEL ...] [--guides GUIDE ...] [--limit SECONDS] [--write]

Most models are those of tests/guides/idioms/models.py, of the sizes that they have in practice, and a
path of volatility. Data are simulated with fixed seeds, except the batting averages. Each result is a
line of a file, so that a run goes on where the last one ended (delete the file after a change).
--write puts the table into models.md.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from marked_table import write
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from results import Row, collect
from torch import Tensor
from volatility import simulate, stochastic_volatility

from pyro_artransform import fit
from pyro_artransform.diagnostics import importance
from pyro_artransform.model import LogJoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.guides.idioms import models

HERE = Path(__file__).parent
PEERS = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
GUIDES = ("chosen by fit", *PEERS)
STEP_SIZE, NUM_DRAWS = 0.01, 10_000
Subject = tuple[Callable[..., Any], tuple[Any, ...]]

#: hits of 18 players in their first 45 at bats of the season of 1970 (Efron and Morris, 1975)
HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)


def uniform(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def poisson(seed: int, rate: Tensor) -> Tensor:
    return torch.poisson(rate, generator=torch.Generator().manual_seed(seed))


def baseball() -> Subject:
    return models.baseball, (torch.full((18,), 45.0), torch.tensor(HITS, dtype=torch.float64))


def correlation() -> Subject:
    factor = torch.eye(5) + 0.4 * torch.ones(5, 5).tril(-1)
    return models.correlation, (normal(0, 200, 5) @ factor.T,)


def radon() -> Subject:
    """919 houses in 85 counties of unequal sizes, each with one house at least."""
    more = (85 * uniform(0, 919 - 85) ** 2).long()
    county, floor = torch.cat([torch.arange(85), more]), (uniform(1, 919) < 0.17).double()
    intercept = 1.4 + 0.35 * normal(2, 85)
    return models.radon, (county, floor, intercept[county] - 0.7 * floor + 0.75 * normal(3, 919))


def poisson_regression(group: Tensor, x: Tensor, exposure: Tensor, y: Tensor) -> None:
    """Counts with an exposure, and an effect of each group."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("groups", int(group.max()) + 1):
        effect = pyro.sample("effect", dist.Normal(0.0, sd))
    with pyro.plate("rows", len(x)):
        log_rate = intercept + slope * x + effect[group] + exposure.log()
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def counts() -> Subject:
    group, x, exposure = torch.arange(40).repeat(10), normal(0, 400), 1 + 9 * uniform(1, 400)
    log_rate = -0.5 + 0.3 * x + 0.6 * normal(2, 40)[group]
    return poisson_regression, (group, x, exposure, poisson(3, exposure * log_rate.exp()))


def process() -> Subject:
    x = torch.linspace(0.0, 1.0, 100)
    return models.process, (
        x,
        poisson(0, torch.exp(1 + torch.sin(7 * x) + 0.5 * torch.cos(15 * x))),
    )


def items() -> Subject:
    person, item = torch.arange(100).repeat_interleave(20), torch.arange(20).repeat(100)
    slope = (0.4 * normal(0, 20)).exp()
    logits = slope[item] * (normal(1, 100)[person] - normal(2, 20)[item])
    return models.items, (person, item, (uniform(3, 2000) < logits.sigmoid()).double())


def network() -> Subject:
    """13 hidden units: 40 weights, and the noise."""
    x = 4 * uniform(0, 80)[:, None] - 2
    return models.Network(13), (x, torch.sin(2 * x[:, 0]) + 0.1 * normal(1, 80))


def ordinal() -> Subject:
    group, x = torch.arange(40).repeat(10), normal(0, 400)
    latent = 0.8 * x + 0.7 * normal(1, 40)[group] + torch.logit(uniform(2, 400))
    return models.ordinal, (group, x, 6, (latent[:, None] > torch.linspace(-2, 2, 5)).sum(-1))


def volatility() -> Subject:
    return stochastic_volatility, (simulate(200),)


#: in words, and the model with its arguments
MODELS: dict[str, tuple[str, Callable[[], Subject]]] = {
    "baseball": ("binomial, partially pooled, 18 players", baseball),
    "correlation": ("covariance by LKJ, 5 columns, 200 rows", correlation),
    "ordinal": ("ordinal mixed, 6 categories, 40 groups, 400 rows", ordinal),
    "counts": ("Poisson mixed with exposure, 40 groups, 400 rows", counts),
    "radon": ("varying intercepts, 85 counties, 919 houses", radon),
    "network": ("network of 40 weights, 80 rows", network),
    "volatility": ("stochastic volatility, 200 days", volatility),
    "items": ("item responses, 100 persons, 20 items", items),
    "process": ("Gaussian process of 100 points behind counts", process),
}


def fitted(subject: Subject) -> Row:
    """`fit` of a guide that it chooses, with nothing set."""
    model, args = subject
    began = time.process_time()
    result = fit(model, *args, progress=False)
    return {
        "seconds": time.process_time() - began,
        "chosen": type(result.guide).__name__,
        "steps": result.num_steps,
        "elbo": result.elbo,
        "elbo_se": result.elbo_se,
        "khat": result.khat,
        "ok": result.ok,
        "trusted": result.trusted,
        "marginals_trusted": result.marginals_trusted,
        "slow": result.one_at_a_time,
        "verdict": result.verdict,
    }


def by_svi(name: str, subject: Subject, limit: float) -> Row:
    """A guide of Pyro by its SVI with Adam for so many CPU seconds; then its weights."""
    model, args = subject
    began, num_steps = time.process_time(), 0
    guide = PEERS[name](model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": STEP_SIZE}), Trace_ELBO())
    try:
        while time.process_time() - began < limit:
            svi.step(*args)
            num_steps += 1
    except (ValueError, RuntimeError) as error:
        lines = str(error).splitlines()
        return {"seconds": limit, "steps": num_steps, "error": lines[0][:60]}
    seconds = time.process_time() - began
    found = importance(model, guide, NUM_DRAWS, *args)
    return {
        "seconds": seconds,
        "steps": num_steps,
        "elbo": found.elbo,
        "elbo_se": found.elbo_se,
        "khat": found.khat,
    }


def runs(options: argparse.Namespace, rows: list[Row]) -> Iterator[Row]:
    """Rows that are not there yet; the guide that `fit` chooses comes first, and says how long peers have."""
    for name in options.models:
        subject = MODELS[name][1]()
        for guide in options.guides:
            if find(rows, name, guide):
                continue
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            row: Row = {"model": name, "guide": guide}
            if guide == GUIDES[0]:
                dim = LogJoint(*subject).latents.latent_dim
                yield row | {"latents": dim} | fitted(subject)
            else:
                limit = min(find(rows, name, GUIDES[0])["seconds"], options.limit)
                yield row | by_svi(guide, subject, limit)


def find(rows: list[Row], model: str, guide: str) -> Row:
    """The row of a model and a guide, empty where there is none."""
    return next((row for row in rows if (row["model"], row["guide"]) == (model, guide)), {})


def is_trusted(row: Row) -> str:
    checked = {"draws": row["ok"], "guide": row["trusted"], "marginals": row["marginals_trusted"]}
    answers = {None: "not checked", False: "no", True: "yes"}
    return ", ".join(f"{name} {answers[answer]}" for name, answer in checked.items())


def numbers(row: Row, own: Row) -> list[str]:
    """The ELBO, of a peer as a difference, and k-hat; or why a peer has none."""
    if "error" in row:
        return [f"ended: {row['error']}", "-"]
    elbo = f"{row['elbo']:.3f} ± {row['elbo_se']:.3f}"
    if row is not own:
        elbo = f"{row['elbo'] - own['elbo']:+.2f}"
    return [elbo, f"{row['khat']:.2f}"]


def table(rows: list[Row]) -> str:
    """A line for each model and guide; the ELBO of peers as a difference."""
    lines = ["| model, latents | guide | CPU s | steps | ELBO | k-hat | trusted |"]
    lines.append("|---|---|---|---|---|---|---|")
    found = (find(rows, model, guide) for model in MODELS for guide in GUIDES)
    for row in filter(None, found):
        own = find(rows, row["model"], GUIDES[0])
        name, guide, trusted = "", row["guide"], "no verdict"
        if row is own:
            name = f"{MODELS[row['model']][0]}, {row['latents']}"
            guide, trusted = f"`{row['chosen']}`", is_trusted(row)
        cells = [name, guide, f"{row['seconds']:.1f}", f"{row['steps']:,}", *numbers(row, own)]
        lines.append(f"| {' | '.join(cells)} | {trusted} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--limit", type=float, default=15.0, help="CPU seconds of a peer at most")
    parser.add_argument("--results", type=Path, default=HERE / "models.jsonl")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    unknown = sorted(set(options.models) - MODELS.keys())
    if unknown:
        parser.error(f"expected models among {list(MODELS)}, got {unknown}")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = collect(options.results, partial(runs, options))
    print(table(rows))
    if options.write:
        write(table(rows), HERE / "models.md")


if __name__ == "__main__":
    main()
