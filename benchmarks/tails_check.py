# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether the quantiles of tails_models.py are right, by two other routes; see tails.md.

Models, run by Pyro at some of their scales, give the evidence that quantiles were made with: latents are
integrated out by a Hessian where they are Gaussian, and by draws of their prior where they are not. And
draws of the scales' prior, weighted by the evidence, have the shares below and above quantiles.
"""

import math
from collections.abc import Mapping
from typing import Any

import pyro
import tails_dose
import torch
from pyro import poutine
from tails_models import TARGETS, Target
from torch import Tensor

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
        return float(log_density(tails_dose.marginal_model, (tails_dose.data(),), {}, at)[0])
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


def check() -> None:
    print(
        "| target | log densities apart by | shares, largest error in standard errors |\n|---|---|---|"
    )
    for name, target in TARGETS.items():
        pyro.set_rng_seed(0)
        shares = f"{z_scores(target):.1f}" if target.priors else "-"
        print(f"| {name} | {differences(name):.1e} | {shares} |", flush=True)
