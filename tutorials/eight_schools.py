# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""
A flow guide for the eight schools, in the parametrization that is hard to fit.

Eight schools coached their pupils for a test. Each reports the effect and its standard error, and
the model shares strength between them::

    mu ~ Normal(0, 5),  tau ~ HalfCauchy(5),  theta_j ~ Normal(mu, tau),
    y_j ~ Normal(theta_j, sigma_j)

Written like this, *centred*, the posterior is a funnel: the smaller tau, the closer all theta_j are
to mu. A Gaussian guide has the same width for all tau. ``AutoIAF`` works in units of the prior of theta,
which is known from the model, and reaches the neck. This script fits Pyro's two Gaussian guides and
``AutoIAF``, prints the verdict on each, compares ``AutoIAF`` with NUTS draws, and plots the draws.

References:

Estimation in parallel randomized experiments (Rubin, 1981),
https://doi.org/10.3102/10769986006004377
"""

import argparse
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_artransform import AutoIAF, FitResult, fit

smoke_test = "CI" in os.environ

EFFECTS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
STANDARD_ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
# By quadrature over log tau (400,000 points); mu and theta are integrated out in closed form.
LOG_EVIDENCE = -31.3113

GUIDES: dict[str, Callable[..., AutoGuide]] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAF": AutoIAF,
}
COLOURS = {"AutoNormal": "tab:green", "AutoMultivariateNormal": "tab:orange", "AutoIAF": "tab:blue"}
NUM_DRAWS = 1_000 if smoke_test else 10_000
NUM_NUTS = 20 if smoke_test else 2_000
NUM_WARMUP = 10 if smoke_test else 500

Draws = dict[str, Tensor]


def model(effects: Tensor, standard_errors: Tensor) -> None:
    """The centred parametrization, which the guides fit."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(EFFECTS)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, standard_errors), obs=effects)


def noncentred_model(effects: Tensor, standard_errors: Tensor) -> None:
    """The non-centred parametrization, without a funnel, for which NUTS is fast and reliable."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(EFFECTS)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, standard_errors), obs=effects)


def nuts_draws(*data: Tensor) -> Draws:
    kernel = NUTS(noncentred_model, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=NUM_NUTS, warmup_steps=NUM_WARMUP)
    mcmc.run(*data)
    draws = mcmc.get_samples()
    mu, tau = draws["mu"], draws["tau"]
    return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * draws["z"]}


def fitted(name: str, args: argparse.Namespace, *data: Tensor) -> tuple[AutoGuide, FitResult]:
    pyro.set_rng_seed(args.seed)
    pyro.clear_param_store()
    guide = GUIDES[name](model)
    print(name, file=sys.stderr)
    return guide, fit(model, guide, *data, num_steps=args.steps, seed=args.seed)


def guide_draws(guide: AutoGuide, *data: Tensor) -> Draws:
    drawn = Predictive(guide, num_samples=NUM_DRAWS, parallel=True)(*data)
    return {site: drawn[site].squeeze() for site in ("mu", "tau", "theta")}


def print_table(guide: Draws, nuts: Draws) -> None:
    columns = f"{'mean':>8}{'sd':>7}{'5 %':>8}{'50 %':>7}{'95 %':>7}"
    print(f"\n{'':<9}{'AutoIAF':^37}   {'NUTS':^37}")
    print(f"{'site':<9}{columns}   {columns}")
    for name in ["mu", "tau", *(f"theta[{j}]" for j in range(len(EFFECTS)))]:
        print(f"{name:<9}{_row(_coordinate(guide, name))}   {_row(_coordinate(nuts, name))}")


def _coordinate(draws: Draws, name: str) -> Tensor:
    return draws["theta"][:, int(name[6])] if name.startswith("theta") else draws[name]


def _row(draws: Tensor) -> str:
    low, median, high = draws.quantile(draws.new_tensor([0.05, 0.5, 0.95])).tolist()
    return f"{draws.mean():8.2f}{draws.std():7.2f}{low:8.2f}{median:7.2f}{high:7.2f}"


def print_verdicts(results: dict[str, FitResult]) -> None:
    for name, result in results.items():
        print("\n" + textwrap.fill(f"{name}: {result.verdict}", width=100))


def print_elbos(results: dict[str, FitResult]) -> None:
    print(f"\n{'guide':<24}{'ELBO':>9}{'s.e.':>8}{'draws':>9}")
    for name, result in results.items():
        print(f"{name:<24}{result.elbo:9.3f}{result.elbo_se:8.4f}{result.num_samples:9,}")
    print(f"{'log evidence':<24}{LOG_EVIDENCE:9.3f}   (no ELBO can be higher)")


def draw_picture(
    path: Path, guides: dict[str, Draws], nuts: Draws, elbos: dict[str, Tensor]
) -> None:
    """Above, each guide's draws over those of NUTS; below, the ELBO by step."""
    figure = plt.figure(figsize=(10, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    panels = above.subplots(1, len(guides), sharex=True, sharey=True)
    for panel, (name, draws) in zip(panels, guides.items(), strict=True):
        draw_funnel(panel, name, draws, nuts)
    panels[0].set_ylabel(r"$\log\,\tau$")
    draw_elbos(below.subplots(), elbos)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_funnel(panel: plt.Axes, name: str, guide: Draws, nuts: Draws) -> None:
    for label, draws, style in (
        ("NUTS", nuts, {"color": "0.65", "s": 9, "zorder": 1}),
        (name, guide, {"color": COLOURS[name], "s": 4, "alpha": 0.6, "zorder": 2}),
    ):
        points = slice(NUM_NUTS)
        theta, log_tau = draws["theta"][points, 0], draws["tau"][points].log()
        panel.scatter(theta, log_tau, label=label, linewidths=0, **style)
    panel.set(xlabel=r"$\theta_1$", xlim=(-30, 50), ylim=(-5.5, 4))
    panel.set_xticks(range(-20, 41, 20))
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
    legend = panel.legend(**place, markerscale=3, handletextpad=0, columnspacing=1, frameon=False)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def draw_elbos(panel: plt.Axes, elbos: dict[str, Tensor]) -> None:
    num_steps = min(len(history) for history in elbos.values())
    window = max(1, min(100, num_steps // 10))
    for name, history in elbos.items():
        smooth = history.unfold(0, window, 1).nanmean(-1)
        panel.plot(torch.arange(window, len(history) + 1), smooth, color=COLOURS[name], label=name)
    panel.axhline(LOG_EVIDENCE, color="black", linestyle="--", linewidth=1, label="log evidence")
    label = f"ELBO, mean of {window} steps" if window > 1 else "ELBO"
    panel.set(xlabel="step", ylabel=label, xlim=(0, None), ylim=(-36, -30.9))
    panel.legend(loc="lower right", ncols=2, frameon=False)


def main(args: argparse.Namespace) -> None:
    # Tensors this small gain nothing from threads, which stall each other on a busy machine.
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    start = time.monotonic()
    data = torch.tensor(EFFECTS), torch.tensor(STANDARD_ERRORS)
    pyro.set_rng_seed(args.seed)
    nuts = nuts_draws(*data)
    draws, results = {}, {}
    for name in GUIDES:
        guide, results[name] = fitted(name, args, *data)
        draws[name] = guide_draws(guide, *data)
    print_table(draws["AutoIAF"], nuts)
    print_verdicts(results)
    print_elbos(results)
    elbos = {name: torch.tensor(result.history) for name, result in results.items()}
    draw_picture(args.out, draws, nuts, elbos)
    print(f"\nPicture: {args.out}. Time: {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fit the eight schools, and compare with NUTS.")
    parser.add_argument("--seed", type=int, default=0)
    # By default each fit determines the number itself.
    parser.add_argument("--steps", type=int, default=20 if smoke_test else None)
    # A shortened run does not overwrite the picture of a full one.
    picture = Path(__file__).with_suffix(".png")
    folder = Path(tempfile.gettempdir()) if smoke_test else picture.parent
    parser.add_argument("--out", type=Path, default=folder / picture.name)
    main(parser.parse_args())
