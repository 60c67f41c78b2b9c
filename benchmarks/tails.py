# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether draws reach the tails of scales: shares beyond exact quantiles; see tails.md.

    python benchmarks/tails.py [--targets NAME ...] [--seeds SEED ...] [--subject mcmc|fit] [--write]
    python benchmarks/tails.py --check | --reference

Each run is a process of its own. --subject fit runs `fit(draws=400)` instead
of `mcmc(model, draws=400)`. --check tries the exact quantiles by
other routes, and --reference makes those of the dose response anew, by the extra [bench].
"""

import json
import math
import time
import warnings
from collections.abc import Mapping
from itertools import product
from typing import Any

import pyro
import torch
from measuring import pages, runs
from measuring.runs import Row
from models import dose
from models.known_quantiles import LEVELS, TARGETS, Target
from pyro import poutine
from torch import Tensor

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


#: draws of latents of a group, draws of scales, and scales at which the model is run
NUM_LATENTS, NUM_SCALES, NUM_POINTS = 200_000, 1_000_000, 6
OF_GROUPS = ("dose", "counts")
DOSE_MEANS = {"me0": 0.5, "memax": 4.5, "mled50": 0.4}


def points(target: Target) -> list[dict[str, float]]:
    """Quantiles of scales, at random."""
    quantiles = {name: list(of_name.values())[1:-1] for name, of_name in target.quantiles.items()}
    chosen = torch.randint(3, (NUM_POINTS, len(quantiles))).tolist()
    return [{name: q[k] for (name, q), k in zip(quantiles.items(), row)} for row in chosen]


def sites_of(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Values "s[0]", "s[1]" as those of a site "s", and a correlation as a factor."""
    found = {n: torch.tensor(v) for n, v in values.items() if "[" not in n and n != "rho"}
    if "s[0]" in values:
        found["s"] = torch.tensor([v for name, v in values.items() if name.startswith("s[")])
    if rho := values.get("rho"):
        found["L"] = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]])
    return found


def trace(model: Any, sites: Mapping[str, Tensor], *args: Tensor) -> Any:
    found = poutine.trace(poutine.condition(model, data=sites)).get_trace(*args)
    found.compute_log_prob()
    return found


def by_hessian(target: Target, sites: Mapping[str, Tensor]) -> float:
    """The log density of scales and data, up to a constant, where it is quadratic in latents."""
    nodes = trace(target.model, sites, *target.args).nodes
    shapes = {
        name: node["value"].shape
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
        if type(node["fn"]).__name__ != "_Subsample"
    }

    def log_joint(z: Tensor) -> Tensor:
        parts = z.split([shape.numel() for shape in shapes.values()])
        latents = {n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts)}
        return trace(target.model, {**sites, **latents}, *target.args).log_prob_sum()

    zero = torch.zeros(sum(shape.numel() for shape in shapes.values()))
    gradient = torch.autograd.functional.jacobian(log_joint, zero)
    factor = torch.linalg.cholesky(-torch.autograd.functional.hessian(log_joint, zero))
    z = torch.linalg.solve_triangular(factor, gradient[:, None], upper=False)
    return float(log_joint(zero) + z.square().sum() / 2 - factor.diagonal().log().sum())


def by_draws(target: Target, sites: Mapping[str, Tensor]) -> float:
    """The same where groups are independent given these sites, by draws of a group's latents."""
    *args, y = target.args
    total = 0.0
    for row in y:
        nodes = trace(target.model, sites, *args, row.expand(NUM_LATENTS, *row.shape)).nodes
        total += float(nodes["y"]["log_prob"].logsumexp(0)) - math.log(NUM_LATENTS)
    return total + sum(float(nodes[name]["log_prob_sum"]) for name in sites)


def by_formula(name: str, values: Mapping[str, float], sites: Mapping[str, Tensor]) -> float:
    """The same by what the quantiles were made with."""
    if name == "dose":
        import numpyro
        from numpyro.infer.util import log_density

        numpyro.enable_x64()
        at = {site: value.numpy() for site, value in sites.items()}
        return float(log_density(dose.marginal_model, (dose.data(),), {}, at)[0])
    at = {key: torch.tensor([value]) for key, value in values.items()}
    prior = sum(of_one.log_prob(at[key]) for key, of_one in TARGETS[name].priors.items())
    return float(prior + TARGETS[name].log_evidence(*at.values()))


def differences(name: str) -> float:
    """How far apart the two are, up to a constant."""
    target, found = TARGETS[name], []
    for values in points(target):
        sites = sites_of(values | (DOSE_MEANS if name == "dose" else {}))
        route = by_draws if name in OF_GROUPS else by_hessian
        found.append(route(target, sites) - by_formula(name, values, sites))
    return max(found) - min(found)


def z_scores(target: Target) -> float:
    """The largest error of shares by weighted draws of the prior, in standard errors."""
    draws = {name: prior.sample((NUM_SCALES,)) for name, prior in target.priors.items()}
    parts = zip(*(values.split(20_000) for values in draws.values()))
    weights = (
        torch.cat([target.log_evidence(*part) for part in parts]).nan_to_num(-torch.inf).softmax(0)
    )
    found = []
    for name in target.scales:
        for level, quantile in target.quantiles[name].items():
            terms = weights * ((draws[name] < quantile) * 1.0 - level)
            found.append(float(abs(terms.sum()) / terms.square().sum().sqrt()))
    return max(found)


def check() -> str:
    """Whether quantiles are right, by two other routes.

    Models, run by Pyro at some of their scales, give the evidence that quantiles were made with: latents are
    integrated out by a Hessian where they are Gaussian, and by draws of their prior where they are not. And
    draws of the scales' prior, weighted by the evidence, have the shares below and above quantiles.
    """
    heads = ["target", "log densities apart by", "shares, largest error in standard errors"]
    lines = []
    for name, target in TARGETS.items():
        pyro.set_rng_seed(0)
        shares = f"{z_scores(target):.1f}" if target.priors else "-"
        lines.append([name, f"{differences(name):.1e}", shares])
    return pages.table(heads, lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--subject", choices=("mcmc", "fit"), default="mcmc")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--reference", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(**options.one)))
    elif options.check:
        print(check())
    elif options.reference:
        dose.make_reference(LEVELS)
    else:
        wanted = [
            {"subject": options.subject, "target": target, "seed": seed}
            for target, seed in product(options.targets, options.seeds)
        ]
        rows = runs.collect(options.results, wanted, runs.in_processes(__file__))
        found = [row for run in wanted for row in runs.known(rows, run)]
        parser.show(f"{table(found)}\n\n{summary(found)}", options)


if __name__ == "__main__":
    main()
