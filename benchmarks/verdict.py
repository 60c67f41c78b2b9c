# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether what is trusted is right: guides with known evidence, chains with known shares; see verdict.md.

    python benchmarks/verdict.py [PART_OF_NAME ...] [--guides exact AutoIAF] [--seeds 3] [--write]
    python benchmarks/verdict.py [PART_OF_NAME ...] --chains mcmc|fit [--seconds 60] [--float32] [--seeds 3]

A verdict on a guide is wrong in two ways. *Wrong trust*: it is trusted, and more than 0.1 nats off the known
evidence. *False alarm*: it is not trusted, but at most 0.05 nats off, and the k-hat of 40,000 other
draws is at most 0.6, below the bound of 0.7 by more than its noise, so that neither the posterior nor
its weights are at fault. In between either verdict is right. Chains, by `mcmc` or with a `fit`, are *silent*
where they are trusted although the share of a region of the posterior is off by more than four standard
errors. They have a table of their own, which is printed.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, product
from typing import Any

import pyro
import torch
from measuring import pages, runs
from measuring.pages import spread
from measuring.runs import Row
from models import known_shares
from models.known_densities import TARGETS, Model, Target
from models.known_evidences import POSTERIORS
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_artransform import AutoIAF, AutoStructuredFlow, fit
from pyro_artransform.diagnostics import Importance
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide, weighted_draws
from pyro_artransform.inference import FitError
from pyro_artransform.inference.evaluation.evaluate import evaluate
from pyro_artransform.inference.evaluation.verdict import FitStatus
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import mcmc

ALL: dict[str, Callable[[], Target]] = {**TARGETS, **POSTERIORS}
FITTED = {
    "AutoIAF": AutoIAF,
    "AutoStructuredFlow": AutoStructuredFlow,
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
}
#: guides that need no training: the posterior itself, and its largest mode alone
KNOWN = ("exact", "one mode")
#: with more than 50 `fit` itself chooses the structured guide, and with fewer AutoIAF
DIMS = {"AutoIAF": range(51), "AutoStructuredFlow": range(51, 10_000)}
NUM_DRAWS = 40_000
#: nats that must be lost for a wrong trust, and those that may be for a false alarm
LOST, RIGHT = 0.1, 0.05
#: a k-hat below 0.7 by more than its noise
GOOD_KHAT = 0.6
#: effective draws of chains
NUM_EFFECTIVE = 400


@dataclass(frozen=True)
class Outcome:
    """One verdict, and the truth that it is held against."""

    target: str
    guide: str
    seed: int
    dim: int
    gap: float
    gap_se: float
    lost_mass: float
    khat: float
    khat_of_many: float
    is_finite: bool
    trusted: bool
    verdict: str
    seconds: float

    @property
    def judgement(self) -> str:
        if self.trusted:
            return "wrong trust" if abs(self.gap) - 2 * self.gap_se > LOST else "right"
        is_right = abs(self.gap) <= RIGHT and self.khat_of_many <= GOOD_KHAT and self.is_finite
        return "false alarm" if is_right else "right"


@cache
def target_of(name: str) -> Target:
    """A target; some take a quadrature to make."""
    return ALL[name]()


def measured(target: Target, guide: Any) -> tuple[Importance, float]:
    """The weights of many draws of a guide, and the mass of the modes without any."""
    chunks = list(weighted_draws(target.model, guide, NUM_DRAWS, (), {}, None))
    values = {name: torch.cat([c.values[name] for c in chunks]) for name in chunks[0].values}
    weights = Importance.from_log_weights(torch.cat([c.log_weights for c in chunks]))
    return weights, target.lost_mass(values)


def known_guide(target: Target, kind: str) -> Model | None:
    return target.exact if kind == "exact" else target.part


def run(name: str, kind: str, seed: int) -> Outcome:
    """Fits or takes a guide, and holds its verdict against the truth."""
    target = target_of(name)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    began = time.process_time()
    if kind in KNOWN:
        guide = known_guide(target, kind)
        subject = ModelAndGuide(target.model, guide, (), {}, LogJoint(target.model))
        found = evaluate(subject, FitStatus())
        khat, trusted, words = found["khat"], found["trusted"], found["verdict"]
    else:
        guide = FITTED[kind](poutine.block(target.model, hide=list(target.summed_out)))
        result = fit(target.model, guide, progress=False)
        khat, trusted, words = result.khat, result.trusted, result.verdict
    seconds = time.process_time() - began
    truth, lost_mass = measured(target, guide)
    return Outcome(
        target=name,
        guide=kind,
        seed=seed,
        dim=LogJoint(target.model).latents.latent_dim,
        gap=target.log_evidence - truth.elbo,
        gap_se=truth.elbo_se,
        lost_mass=lost_mass,
        khat=khat,
        khat_of_many=truth.khat,
        is_finite=truth.num_nonfinite == 0,
        trusted=trusted,
        verdict=words,
        seconds=seconds,
    )


def is_meant(name: str, kind: str) -> bool:
    """Whether a guide of this kind is to be had, in reasonable time."""
    target = target_of(name)
    if kind in KNOWN:
        return known_guide(target, kind) is not None
    dim = LogJoint(target.model).latents.latent_dim
    return kind not in DIMS or dim in DIMS[kind]


def attempt(job: Row) -> Row:
    """The outcome; of a fit that gives up, one that is not trusted and says why."""
    key = job["target"], job["guide"], job["seed"]
    try:
        return vars(run(*key))
    except FitError as error:
        lost = dict.fromkeys(("gap", "gap_se", "lost_mass", "khat", "khat_of_many"), float("nan"))
        lost |= {"is_finite": False, "trusted": False, "seconds": 0}
        return vars(Outcome(*key, dim=0, verdict=f"FitError: {error}", **lost))


def report(outcomes: Sequence[Outcome]) -> str:
    """The tables of verdict.md."""
    seeds = sorted({o.seed for o in outcomes})
    hours = sum(o.seconds for o in outcomes) / 3600
    what = (
        f"{len({o.target for o in outcomes})} targets, at most seeds {', '.join(map(str, seeds))}: "
        f"{hours:.1f} hours of CPU time."
    )
    parts = [what, summary(outcomes), "## Wrong verdicts", "\n".join(wrong(outcomes))]
    for guide, found in by([o for o in outcomes if o.guide not in KNOWN], lambda o: o.guide):
        parts += [f"## {guide}", table(found)]
    return "\n\n".join(parts)


def by(
    outcomes: Sequence[Outcome], key: Callable[[Outcome], str]
) -> Iterator[tuple[str, list[Outcome]]]:
    """Groups in the order of first appearance, each sorted by seed."""
    order = {name: i for i, name in enumerate(dict.fromkeys(map(key, outcomes)))}
    ranked = sorted(outcomes, key=lambda o: (order[key(o)], o.seed))
    for name, group in groupby(ranked, key):
        yield name, list(group)


def summary(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for guide, found in by(outcomes, lambda o: o.guide):
        count = Counter(o.judgement for o in found)
        seconds = sum(o.seconds for o in found) / len(found)
        cells = [guide, len(found), sum(o.trusted for o in found), count["wrong trust"]]
        lines.append([*cells, count["false alarm"], f"{seconds:.1f}"])
    heads = ["guide", "verdicts", "trusted", "wrong trust", "false alarms", "CPU seconds a fit"]
    return pages.table(heads, lines)


def wrong(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Quotes each wrong verdict."""
    found = [o for o in outcomes if o.judgement != "right"]
    alone = {o.target for o in found if o.guide == "one mode"}
    if alone:
        yield (
            f"- wrong trust: one mode of {len(alone)} targets. Without training there are no chains, so "
            "other modes are not searched for, as the verdicts say."
        )
    found = [o for o in found if o.guide != "one mode"]
    if not found:
        yield "None."
    for case, group in by(found, lambda o: f"{o.judgement}: {o.target}, {o.guide}"):
        seeds = ", ".join(str(o.seed) for o in group)
        worst = max(group, key=lambda o: o.gap)
        lost = f", {100 * worst.lost_mass:.0f} % lost" if worst.lost_mass >= 0 else ""
        words = worst.verdict.partition(" Marginals")[0]
        yield (f'- {case}, seed {seeds}: a gap of {worst.gap:.3f} nats{lost}. "{words}"')


def table(outcomes: Sequence[Outcome]) -> str:
    """One row per target, with the range over its seeds; those that are trusted and right are only named."""
    lines, good = [], []
    for target, found in by(outcomes, lambda o: o.target):
        if all(o.trusted and o.judgement == "right" for o in found):
            good.append(target)
            continue
        judged = dict.fromkeys(o.judgement for o in found)
        cells = [target, max(o.dim for o in found), spread([o.gap for o in found], 3)]
        cells += [spread([o.lost_mass for o in found], 2), spread([o.khat for o in found], 2)]
        cells.append(f"{sum(o.trusted for o in found)} of {len(found)}")
        words = (name if name == "right" else f"**{name}**" for name in judged)
        lines.append([*cells, ", ".join(words)])
    named = f"Trusted and right with each seed: {'; '.join(good) or 'none'}."
    heads = ["target", "D", "gap", "lost", "k-hat", "trusted", "verdict"]
    return f"{pages.table(heads, lines)}\n\n{named}"


def chains_row(name: str, seed: int, options: argparse.Namespace) -> tuple[bool, list[str]]:
    """Whether chains are silent, and the cells of the table."""
    pyro.clear_param_store()
    target = known_shares.TARGETS[name]()
    asked: Any = {"draws": NUM_EFFECTIVE, "seed": seed, "relabel": False, "progress": False}
    shares, trusted, began = (), False, time.process_time()
    try:
        by = {"mcmc": mcmc, "fit": fit}[options.chains]
        found: Any = by(target.model, max_seconds=options.seconds, **asked)
    except (RuntimeError, ValueError) as error:
        verdict = f"{type(error).__name__}: {error}"
    else:
        chains = getattr(found, "chains", found)
        shares, trusted, verdict = target.shares(chains.by_chain), chains.trusted, chains.verdict
    took = time.process_time() - began
    is_silent = trusted and target.is_wrong(shares, NUM_EFFECTIVE)
    outcome = "**silent**" if is_silent else "yes" if trusted else "no"
    print(f"{name}, seed {seed}: {outcome}. {verdict}", file=sys.stderr, flush=True)
    exact, percent = (
        "/".join(f"{100 * p:.1f}" for p in each) or "-" for each in (target.exact, shares)
    )
    return is_silent, [name, exact, percent, outcome, f"{took:.1f}"]


def of_chains(names: Sequence[str], options: argparse.Namespace) -> str:
    """A row for each target, with a value of each seed; verdicts are printed as they come."""
    silent, lines = [], []
    for name in names:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        found = [chains_row(name, seed, options) for seed in seeds]
        silent += [is_silent for is_silent, _ in found]
        of_seeds = zip(*(cells[2:] for _, cells in found))
        lines.append([*found[0][1][:2], *map("; ".join, of_seeds)])
    heads = ["target", "exact, %", "shares, %", "trusted", "CPU s"]
    text = pages.table(heads, lines)
    return f"{text}\n\n{sum(silent)} of {len(silent)} are silent, by `{options.chains}`."


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("targets", nargs="*", help="parts of names; all targets by default")
    kinds = [*KNOWN, *FITTED]
    parser.add_argument("--guides", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--chains", choices=("mcmc", "fit"), help="chains in place of guides")
    parser.add_argument("--seconds", type=float, default=60.0, help="wall seconds of chains")
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float32 if options.float32 else torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    parts = [part.lower() for part in options.targets]
    every = known_shares.TARGETS if options.chains else ALL
    names = [name for name in every if not parts or any(part in name.lower() for part in parts)]
    if options.chains:
        print(of_chains(names, options))
        return
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    wanted = (
        {"target": name, "guide": kind, "seed": seed}
        for seed, kind, name in product(seeds, options.guides, names)
        if is_meant(name, kind)
    )
    rows = runs.collect(options.results, wanted, attempt)
    parser.show(report([Outcome(**row) for row in rows]), options)


if __name__ == "__main__":
    main()
