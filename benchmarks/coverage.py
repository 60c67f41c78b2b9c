# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether the bounds on errors of single latents hold that a fit states with 97.5 %; see coverage.md.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py [--models hierarchy logistic_2] [--seeds N] [--write]

The models are random and their posteriors exact: see models/random_models.py. A fit states bounds on the
errors of its guide's means, in sds of the posterior, and sds, in percent, for all latents together. The
true errors are those of the guide, by a randomized quasi-Monte Carlo estimate, of which a standard error is
known: a bound is wrong where the error of a latent that it is about exceeds it by more than six of these.
Of a moment that does not exist any bound is wrong. With --draws the fit makes draws by chains as well:
their means and sds are held against what their effective sample sizes say of all latents together with 97.5
%.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from statistics import NormalDist, median
from typing import Any

import pyro
import torch
from measuring import pages, runs
from measuring.pages import spread
from measuring.runs import Row
from models import random_models as models
from models.moments import Moments
from models.priors import prior_as_data
from models.random_numbers import Subject
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_artransform import fit
from pyro_artransform.inference import FitError, FitResult
from pyro_artransform.model import LogJoint

Chosen = Callable[[Row], bool]
CONFIDENCE = 0.975
#: points of a scrambled Sobol sequence, and how many of these are scrambled independently
NUM_POINTS, NUM_SCRAMBLES = 2**14, 16
#: of 120 numbers one exceeds six of their standard errors with a probability of 0.3 % (Student, 15 degrees)
NUM_SES = 6.0
ROUND_OFF = 1e-6


def in_one(moments: Mapping[str, Moments], names: Iterable[str]) -> Moments:
    """Means and sds of all latents in the order of these sites, ``(D,)``."""
    parts = [[value.reshape(-1) for value in moments[name]] for name in names]
    return Moments(*map(torch.cat, zip(*parts)))


@torch.no_grad()
def moments_of_guide(guide: Any, args: tuple[Any, ...]) -> tuple[Moments, Moments]:
    """The guide's means and sds on the unconstrained space, and their standard errors."""
    transform, dim = guide.get_transform(*args), guide.latent_dim
    means, squares = [], []
    for seed in range(NUM_SCRAMBLES):
        sobol = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed)
        # in the middle of cells, of which there are 2^30
        uniform = sobol.draw(NUM_POINTS, dtype=torch.float64) + 2.0**-31
        draws = torch.cat(
            [transform.call_and_ladj(x)[0] for x in torch.special.ndtri(uniform).split(2_048)]
        )
        means.append(draws.mean(0))
        squares.append(draws.square().mean(0))
    center = torch.stack(means).mean(0)
    # about the mean of all, so that round-off does not matter
    seconds = torch.stack([s - 2 * center * m + center**2 for s, m in zip(squares, means)])
    sd = (seconds.mean(0)).sqrt()
    ses = [value.std(0) / NUM_SCRAMBLES**0.5 for value in (torch.stack(means), seconds)]
    return Moments(center, sd), Moments(ses[0], ses[1] / (2 * sd))


def errors(found: Moments, exact: Moments) -> Moments:
    """Of means in sds of the posterior, of sds relative; infinite where the moment does not exist."""
    mean, sd = (found.mean - exact.mean) / exact.sd, found.sd / exact.sd - 1
    mean = torch.where(exact.mean.isfinite(), mean, torch.inf)
    return Moments(mean, torch.where(exact.sd.isfinite(), sd, torch.inf))


def worst(error: Tensor, se: Tensor, stated: Tensor) -> tuple[float, float]:
    """The largest error of the latents that something was stated of, and its standard error."""
    if not stated.any():
        return math.nan, math.nan
    least = torch.where(stated, error.abs() - NUM_SES * se, -torch.inf)
    at = int(least.argmax())
    return error[at].abs().item(), se[at].item()


def ses_off(estimate: Tensor, estimate_se: Tensor, true: Tensor, true_se: Tensor) -> float:
    """How many of its standard errors the estimate of an error is off, of the worst latent."""
    off = ((estimate - true).abs() - NUM_SES * true_se - ROUND_OFF).clamp_min(0)
    return (off / estimate_se).nan_to_num(0.0, math.inf).max().item()


def of_guide(result: FitResult, subject: Subject, names: list[str]) -> Row:
    """True errors of the guide, and what the fit states of them."""
    exact = in_one(subject.moments, names)
    found, se = moments_of_guide(result.guide, subject.args)
    true, true_se = errors(found, exact), Moments(se.mean / exact.sd, se.sd / exact.sd)
    about = [torch.ones_like(exact.mean, dtype=torch.bool)] * 2
    row: Row = {"bounds": None, "ses_off": None}
    if (stated := result.marginals) is not None:
        row = {"bounds": [stated.mean_bound, stated.sd_bound]}
        estimates = flat(stated.mean_shift, names), flat(stated.sd_ratio, names) - 1
        ses = flat(stated.mean_shift_se, names), flat(stated.sd_ratio_se, names)
        about = [(estimate + se).isfinite() for estimate, se in zip(estimates, ses)]
        row["ses_off"] = [ses_off(*each) for each in zip(estimates, ses, true, true_se)]
    row["mean_error"], row["mean_error_se"] = worst(true.mean, true_se.mean, about[0])
    row["sd_error"], row["sd_error_se"] = worst(true.sd, true_se.sd, about[1])
    return row


def flat(values: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([values[name].reshape(-1) for name in names])


def of_chains(result: Any, subject: Subject, log_joint: LogJoint) -> Row:
    """Errors of the draws of chains, and the bounds that their effective sample sizes give."""
    # each (num_chains, n) + site shape
    draws = log_joint.latents.unconstrain(result.chains.by_chain)
    exact = in_one(subject.moments, log_joint.latents.sites)
    every = draws.flatten(0, 1)
    error = errors(Moments(every.mean(0), every.std(0)), exact)
    centered = (draws - every.mean(0)) / every.std(0)
    ess = [effective_sample_size(value, 0, 1) for value in (centered, centered**2)]
    kurtosis = centered.flatten(0, 1).pow(4).mean(0)
    ses = Moments(ess[0].rsqrt(), ((kurtosis - 1) / ess[1]).sqrt() / 2)
    width = critical_value(draws.shape[-1])
    exceeds = [e.abs() > width * se for e, se in zip(error, ses)]
    return {
        "mean_error": error.mean.abs().max().item(),
        "sd_error": error.sd.abs().max().item(),
        "bounds": [width * se.max().item() for se in ses],
        "hold": not any(value.any() for value in exceeds),
        "min_ess": result.chains.min_ess,
        "max_rhat": result.chains.max_rhat,
        "trusted": result.chains.trusted,
        "verdict": result.chains.verdict,
        "num_draws": len(every),
    }


def holds(row: Row) -> bool:
    """Whether the bounds of a fit that states some hold, as far as the true errors are known."""
    return all(
        row[f"{what}_error"] <= bound + NUM_SES * row[f"{what}_error_se"] + ROUND_OFF
        for what, bound in zip(("mean", "sd"), row["bounds"])
        if math.isfinite(bound)
    )


def fitted(run: Row) -> Row:
    """A fit, what it states, and what is true."""
    name, seed, num_draws = run["model"], run["seed"], run["draws"]
    subject = models.subject(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    options: dict[str, Any] = {} if num_draws is None else {"draws": num_draws}
    row: Row = {"is_heavy": subject.is_heavy, "num_moments": subject.num_moments}
    began = time.process_time()
    try:
        model = subject.model if subject.has_data else prior_as_data(subject.model)
        result = fit(model, *subject.args, progress=False, seed=seed, **options)
    except FitError as error:
        return row | {"bounds": None, "verdict": f"FitError: {error}"}
    row["seconds"] = time.process_time() - began
    log_joint = LogJoint(subject.model, subject.args)
    row |= {
        "guide": type(result.guide).__name__,
        "latents": log_joint.latents.latent_dim,
        "steps": result.num_steps,
        "elbo": result.elbo,
        "log_evidence": result.log_evidence,
        "khat": result.khat,
        "trusted": result.trusted,
        "marginals_trusted": result.marginals_trusted,
        "verdict": result.verdict,
        **of_guide(result, subject, list(log_joint.latents.sites)),
    }
    row["holds"] = None if row["bounds"] is None else holds(row)
    if result.chains is not None:
        row["chains"] = of_chains(result, subject, log_joint)
    return row


def critical_value(num_latents: int) -> float:
    """The half width of two-sided intervals of all means and sds, in standard errors (Bonferroni)."""
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (4 * num_latents))


def intervals_hold(row: Row) -> bool:
    """Whether the error of each single latent is within its own interval."""
    return max(row["ses_off"]) <= critical_value(row["latents"])


def states(row: Row) -> bool:
    """Whether a fit states a bound, of means or of sds."""
    return row["bounds"] is not None and any(map(math.isfinite, row["bounds"]))


def states_both(row: Row) -> bool:
    return row["bounds"] is not None and all(map(math.isfinite, row["bounds"]))


def share(count: int, of: int) -> str:
    return f"{count} of {of}" + (f" ({100 * count / of:.0f} %)" if of else "")


def report(rows: list[Row]) -> str:
    """All of the tables."""
    parts = [summary(rows), by_family(rows), wrong(rows)]
    if with_chains := [row for row in rows if "chains" in row]:
        parts.append(of_draws(with_chains))
    return "\n\n".join(parts)


TAILS: dict[str, Chosen] = {
    "light tails": lambda row: not row["is_heavy"],
    "heavy tails": lambda row: row["is_heavy"],
}
GROUPS: dict[str, Chosen] = {
    "all": lambda row: True,
    **TAILS,
    "k-hat at most 0.5": lambda row: row.get("khat", math.nan) <= 0.5,
    "k-hat above 0.5": lambda row: row.get("khat", math.nan) > 0.5,
}


def summary(rows: list[Row]) -> str:
    """How many state bounds, and in how many of these they hold, by the tails and by k-hat."""
    heads = ["fits", "all", "state both bounds", "state one at least", "of these hold"]
    lines = []
    for name, is_meant in GROUPS.items():
        found = [row for row in rows if is_meant(row)]
        stated = [row for row in found if states(row)]
        cells = [name, len(found), share(sum(map(states_both, found)), len(found))]
        cells += [
            share(len(stated), len(found)),
            share(sum(r["holds"] for r in stated), len(stated)),
        ]
        cells.append(share(sum(map(intervals_hold, stated)), len(stated)))
        lines.append([*cells, f"{sum(row.get('seconds', 0.0) for row in found):,.0f}"])
    return pages.table([*heads, "also the interval of each latent", "CPU s"], lines)


def middle(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f}" if values else "-"


def by_family(rows: list[Row]) -> str:
    """A line for each family: medians of its bounds and of its true errors, where bounds are stated."""
    heads = ["family", "fits, heavy tails", "latents", "k-hat", "state", "hold"]
    heads += ["bound of means, true, sds", "bound of sds, true, %", "CPU s"]
    lines = []
    for family in models.COUNTS:
        found = [row for row in rows if models.family_of(row["model"]) == family]
        if not found:
            continue
        heavy = sum(row["is_heavy"] for row in found)
        stated, done = [row for row in found if states(row)], [r for r in found if "seconds" in r]
        means, sds = ([row["bounds"][i] for row in stated] for i in (0, 1))
        true_mean, true_sd = ([row[f"{k}_error"] for row in stated] for k in ("mean", "sd"))
        cells = [family.replace("_", " "), f"{len(found)}, {heavy}" if heavy else len(found)]
        cells += [spread([r["latents"] for r in done]), spread([r["khat"] for r in done], 2)]
        cells += [len(stated), sum(row["holds"] for row in stated)]
        cells += [f"{middle(means, 3)}, {middle(true_mean, 3)}"]
        cells += [", ".join(middle([100 * value for value in each], 1) for each in (sds, true_sd))]
        lines.append([*cells, f"{sum(row['seconds'] for row in done):.0f}"])
    return pages.table(heads, lines)


def wrong(rows: list[Row]) -> str:
    """Each fit whose bounds do not hold."""
    heads = ["bounds that do not hold", "tails", "k-hat", "trusted", "means, true", "sds, true, %"]
    lines = []
    for row in (row for row in rows if states(row) and not row["holds"]):
        mean, sd = row["bounds"]
        cells = [f"{row['model']}, {row['latents']} latents, seed {row['seed']}"]
        cells += ["heavy" if row["is_heavy"] else "light", f"{row['khat']:.2f}"]
        cells.append("yes" if row["marginals_trusted"] else "no")
        cells.append(f"{mean:.3f}, {row['mean_error']:.3f} ± {row['mean_error_se']:.3f}")
        found, se = 100 * row["sd_error"], 100 * row["sd_error_se"]
        lines.append([*cells, f"{100 * sd:.1f}, {found:.1f} ± {se:.1f}"])
    return pages.table(heads, lines) if lines else "All bounds that were stated hold."


def of_draws(rows: list[Row]) -> str:
    """Of fits that make draws: whether these are as right as their effective sample sizes say."""
    heads = ["draws of chains", "fits", "trusted", "of these within the noise"]
    lines = []
    for name, is_meant in TAILS.items():
        found = [row for row in rows if is_meant(row)]
        trusted, others = (
            [row["chains"]["hold"] for row in found if row["chains"]["trusted"] == answer]
            for answer in (True, False)
        )
        cells = [name, len(found), share(len(trusted), len(found))]
        cells += [share(sum(each), len(each)) for each in (trusted, others)]
        lines.append([*cells, f"{sum(row['seconds'] for row in found):,.0f}"])
    return pages.table([*heads, "not trusted, within", "CPU s"], lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=models.MODELS,
        help="families, or models as walk_0; any number",
    )
    parser.add_argument("--seeds", type=int, default=1, help="fits of a model")
    parser.add_argument("--draws", type=int, help="of chains, by fit(..., draws=N)")
    options = parser.parse_args()
    families = models.FAMILIES.keys()
    unknown = [name for name in options.models if not {name, models.family_of(name)} & families]
    if unknown:
        parser.error(
            f"expected families of {list(families)}, or models such as walk_0, got {unknown}"
        )
    names = [
        model
        for name in options.models
        for model in ([m for m in models.MODELS if models.family_of(m) == name] or [name])
    ]
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wanted = (
        {"model": name, "seed": seed, "draws": options.draws}
        for seed in range(options.seeds)
        for name in names
    )
    rows = runs.collect(options.results, wanted, fitted)
    parser.show(report(runs.known(rows, {"draws": options.draws})), options)


if __name__ == "__main__":
    main()
