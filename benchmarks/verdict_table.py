# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The words and tables of benchmarks/verdict.md, from the outcomes of benchmarks/verdict.py."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Protocol

INTRODUCTION = """\
# What a verdict is worth: hard targets of known evidence

Made by `benchmarks/verdict.py --write` (float64, one thread, `fit` as it is by default). The gap is the known
log evidence less the ELBO of 40,000 other draws, in nats; lost is the mass of the modes with less than a
tenth of their share of these draws. A verdict is *wrong trust* where a guide is trusted whose gap is above
0.1 nats, and a *false alarm* where a guide is not trusted whose gap is at most 0.05 and whose k-hat by those
40,000 draws is at most 0.6: a k-hat that is truly above 0.7 is reason enough not to trust, however small the
gap, and 0.1 is its noise. "exact" is the posterior
itself as a guide, and "one mode" the posterior restricted to its largest mode; both are evaluated without
training. Exact draws of a Dirichlet have entries below 1e-10, which round-off changes on the way back to the
unconstrained space, so that their k-hat is truly large.
"""

_AT_THE_LIMIT = (
    "The k-hat of the 10,000 draws of the verdict is at its limit, and that of 40,000 others below 0.6: its "
    "standard error is 0.1."
)
_PLATEAU = (
    "The weights of this one latent have a local maximum, which is where the cutoff of the 300 largest is: "
    "half of them exceed it by 1e-4 or so, as no Pareto tail does, and k-hat, ArviZ's too, is 5. Of 40,000 "
    "draws it is 0.5."
)
_BETWEEN_MODES = (
    "The words are true: all coordinates depend on each other, but only between the modes. The guide has "
    "both modes by its block, and 0.01 to 0.02 nats are what the missing parents cost."
)
_NOT_REACHED = (
    "No chain is in the narrow mode: from nearly all of the prior the ways up lead to the wide one."
)
#: why a verdict on a target cannot be right
EXPLAINED = {
    **dict.fromkeys(
        ("two, sd 1 and 0.2, D=5", "two, sd 1 and 5, D=5", "two, sd 1 and 0.5, D=50"), _NOT_REACHED
    ),
    "two 8 sd, 0.7, D=2": (
        "Chains move between the modes, too seldom to agree: the verdict on the draws says so, but that on "
        "the guide looks for chains that are farther from agreeing, with an R-hat above 1.1."
    ),
    **dict.fromkeys(
        ("ring 5 ± 0.3", "shell 5 ± 0.3, D=5"),
        "At the bound of 0.1: the weights find 0.08 to 0.09 nats, since the rest is where the guide has few "
        "draws. With the earlier average of parameters it was 0.27 and 0.15 nats, and trusted as well.",
    ),
    "12 of 1 %, D=10": "Chains found three of the twelve small modes, with 4 % in all: the bound is 5 %.",
    "gamma 2": (
        "The k-hat of the 10,000 draws of the verdict is above 0.7, and that of 40,000 others below 0.6: "
        "a Gaussian is too thin in one tail, and few of its draws are there."
    ),
    **dict.fromkeys(("two 5 sd, 0.5, D=250", "two 6 sd, 0.5, D=150"), _BETWEEN_MODES),
    "Cauchy, D=3": (
        "At the bound of 0.1: of the 0.11 to 0.13 nats the weights of up to 100,000 draws find 0.06 to 0.08, "
        "since the rest is in tails that the guide's draws do not reach."
    ),
    "funnel, D=30": (
        "At the bound of 0.1: of 0.105 nats the weights find 0.03; the rest is in the neck, where the guide "
        "has few draws."
    ),
    **dict.fromkeys(("eight schools, centred", "funnel, D=10"), _AT_THE_LIMIT),
    **dict.fromkeys(("beta 0.3", "half-Cauchy", "beta-binomial"), _PLATEAU),
    "horseshoe, D=6": (
        "At the bound of 0.1: of the 0.10 to 0.12 nats the weights of up to 100,000 draws find 0.03 to 0.05, "
        "since the rest is in tails that the guide's draws do not reach."
    ),
}


class Outcome(Protocol):
    """See benchmarks/verdict.py."""

    target: str
    guide: str
    seed: int
    dim: int
    gap: float
    lost_mass: float
    khat: float
    trusted: bool
    verdict: str
    seconds: float
    judgement: str


def report(outcomes: Sequence[Outcome]) -> str:
    """All of verdict.md."""
    seeds = sorted({o.seed for o in outcomes})
    targets = len({o.target for o in outcomes})
    hours = sum(o.seconds for o in outcomes) / 3600
    what = (
        f"{targets} targets, seeds {', '.join(map(str, seeds))} at most: {hours:.1f} hours of CPU time. "
        "Only verdicts of the present code are here: their number says which seeds a guide has."
    )
    parts = [INTRODUCTION, what, *summary(outcomes), "", "## Wrong verdicts", "", *wrong(outcomes)]
    for guide, found in by(outcomes, lambda o: o.guide):
        parts += ["", f"## {guide}", "", *table(found)]
    return "\n".join(parts) + "\n"


def by(
    outcomes: Sequence[Outcome], key: Callable[[Outcome], str]
) -> Iterator[tuple[str, list[Outcome]]]:
    """Groups in the order in which they first appear, each by its seeds."""
    order = {name: i for i, name in enumerate(dict.fromkeys(map(key, outcomes)))}
    ranked = sorted(outcomes, key=lambda o: (order[key(o)], o.seed))
    for name, group in groupby(ranked, key):
        yield name, list(group)


def summary(outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield "\n| guide | verdicts | trusted | wrong trust | false alarms | CPU seconds a fit |"
    yield "|---|---|---|---|---|---|"
    for guide, found in by(outcomes, lambda o: o.guide):
        count = Counter(o.judgement for o in found)
        seconds = sum(o.seconds for o in found) / len(found)
        yield (
            f"| {guide} | {len(found)} | {sum(o.trusted for o in found)} | {count['wrong trust']} "
            f"| {count['false alarm']} | {seconds:.1f} |"
        )


def wrong(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Each wrong verdict, in its own words, and why it is so where that is known."""
    found = [o for o in outcomes if o.judgement != "right"]
    alone = {o.target for o in found if o.guide == "one mode"}
    if alone:
        yield (
            f"- wrong trust: one mode of {len(alone)} targets. Without training there are no chains, and "
            "other modes are not searched for, as the words say."
        )
    found = [o for o in found if o.guide != "one mode"]
    if not found:
        yield "None."
    for case, group in by(found, lambda o: f"{o.judgement}: {o.target}, {o.guide}"):
        seeds = ", ".join(str(o.seed) for o in group)
        worst = max(group, key=lambda o: o.gap)
        lost = f", {100 * worst.lost_mass:.0f} % lost" if worst.lost_mass >= 0 else ""
        yield (
            f"- {case}, seed {seeds}: a gap of {worst.gap:.3f} nats{lost}. "
            f'"{worst.verdict}" {EXPLAINED.get(worst.target, "Not explained.")}'
        )


def spread(values: Sequence[float], digits: int) -> str:
    """The least and the largest of the numbers that are known, once where they print alike."""
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return "-"
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (known[0], known[-1]))
    return " to ".join(ends)


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """One row for a target, with the range of its seeds."""
    yield "| target | D | gap | lost | k-hat | trusted | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for target, found in by(outcomes, lambda o: o.target):
        judged = dict.fromkeys(o.judgement for o in found)
        cells = [
            target,
            str(max(o.dim for o in found)),
            spread([o.gap for o in found], 3),
            spread([o.lost_mass for o in found], 2),
            spread([o.khat for o in found], 2),
            f"{sum(o.trusted for o in found)} of {len(found)}",
            ", ".join(name if name == "right" else f"**{name}**" for name in judged),
        ]
        yield f"| {' | '.join(cells)} |"
