# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether the verdict of `fit` tells the truth: hard targets of known evidence, for several guides.

    python benchmarks/verdict.py [PART_OF_NAME ...] [--guides exact AutoIAF] [--seeds 3] [--write]

A verdict is wrong in two ways. *Wrong trust*: it is trusted, and more than 0.1 nats off the known
evidence. *False alarm*: it is not trusted, but at most 0.05 nats off, and the k-hat of 40,000 other
draws is at most 0.6, below the bound of 0.7 by more than its noise, so that neither the posterior nor
its weights are at fault. In between either verdict is right.

Each result is a line of a file, so that a run goes on where the last one ended (delete the file, or
name another one with --results, after a change). --write puts the table into benchmarks/verdict.md.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from results import append, load
from verdict_posteriors import POSTERIORS
from verdict_table import report
from verdict_targets import TARGETS, Model, Target

from pyro_artransform import AutoIAF, AutoMAF, AutoStructuredFlow, fit
from pyro_artransform.diagnostics import Importance
from pyro_artransform.diagnostics.importance_weights import ModelAndGuide, weighted_draws
from pyro_artransform.inference import FitError
from pyro_artransform.inference.evaluation.evaluate import evaluate
from pyro_artransform.inference.evaluation.verdict import FitStatus
from pyro_artransform.model import LogJoint

HERE = Path(__file__).parent
ALL: dict[str, Callable[[], Target]] = {**TARGETS, **POSTERIORS}
FITTED = {
    "AutoIAF": AutoIAF,
    "AutoStructuredFlow": AutoStructuredFlow,
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoMAF": AutoMAF,
}
#: guides that need no training: the posterior itself, and its largest mode alone
KNOWN = ("exact", "one mode")
#: a step of a MAF inverts its networks: more coordinates than this are slow. With more than 50 `fit`
#: itself chooses the structured guide, and with fewer AutoIAF
DIMS = {"AutoMAF": range(11), "AutoIAF": range(51), "AutoStructuredFlow": range(51, 10_000)}
NUM_DRAWS = 40_000
#: nats that must be lost for a wrong trust, and those that may be for a false alarm
LOST, RIGHT = 0.1, 0.05
#: a k-hat below 0.7 by more than its noise
GOOD_KHAT = 0.6
QUICK_STEPS = 300


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


def run(name: str, kind: str, seed: int, num_steps: int | None) -> Outcome:
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
        result = fit(target.model, guide, num_steps=num_steps, progress=False)
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


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """What is to be run, the first seed of everything first."""
    parts = [part.lower() for part in args.targets]
    names = [name for name in ALL if not parts or any(part in name.lower() for part in parts)]
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for kind in args.guides:
            yield from ((name, kind, seed) for name in names if is_meant(name, kind))


def attempt(job: tuple[str, str, int], num_steps: int | None) -> Outcome:
    """The outcome; of a fit that gives up, one that is not trusted and says why."""
    try:
        return run(*job, num_steps)
    except FitError as error:
        lost = dict.fromkeys(("gap", "gap_se", "lost_mass", "khat", "khat_of_many"), float("nan"))
        words = f"FitError: {error}"
        return Outcome(
            *job, dim=0, **lost, is_finite=False, trusted=False, verdict=words, seconds=0
        )


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help="parts of names; all targets by default")
    kinds = [*KNOWN, *FITTED]
    parser.add_argument("--guides", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"fits of {QUICK_STEPS} steps")
    parser.add_argument("--results", type=Path, default=HERE / "verdict.jsonl")
    parser.add_argument("--write", action="store_true", help="the table into verdict.md")
    return parser.parse_args()


def main() -> None:
    args = command_line()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done = {(o.target, o.guide, o.seed): o for o in (Outcome(**row) for row in load(args.results))}
    for job in jobs(args):
        if job in done:
            continue
        outcome = done[job] = attempt(job, QUICK_STEPS if args.quick else None)
        append(args.results, vars(outcome))
        print(
            f"{outcome.target:32} {outcome.guide:22} {outcome.seed} gap {outcome.gap:8.3f} "
            f"lost {outcome.lost_mass:4.2f} k-hat {outcome.khat:5.2f} {outcome.seconds:4.0f} s "
            f"{'trusted' if outcome.trusted else 'not':7} {outcome.judgement}",
            flush=True,
        )
    if args.write:
        (HERE / "verdict.md").write_text(report(list(done.values())))


if __name__ == "__main__":
    main()
