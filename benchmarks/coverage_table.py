# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks/coverage.md, from the rows of benchmarks/coverage.py."""

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist, median

from coverage_models import COUNTS, family_of
from results import Row

Chosen = Callable[[Row], bool]
CONFIDENCE = 0.975


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
    parts = [*summary(rows), "", *by_family(rows), "", *wrong(rows)]
    if any("chains" in row for row in rows):
        parts += ["", *of_chains([row for row in rows if "chains" in row])]
    return "\n".join(parts)


def summary(rows: list[Row]) -> Iterator[str]:
    """How many state bounds, and in how many of these they hold, by the tails and by k-hat."""
    yield (
        "| fits | all | state both bounds | state one at least | of these hold "
        "| also the interval of each latent | CPU s |"
    )
    yield "|---|---|---|---|---|---|---|"
    groups: dict[str, Chosen] = {
        "all": lambda row: True,
        "light tails": lambda row: not row["is_heavy"],
        "heavy tails": lambda row: row["is_heavy"],
        "k-hat at most 0.5": lambda row: row.get("khat", math.nan) <= 0.5,
        "k-hat above 0.5": lambda row: row.get("khat", math.nan) > 0.5,
    }
    for name, is_meant in groups.items():
        found = [row for row in rows if is_meant(row)]
        stated = [row for row in found if states(row)]
        cells = [
            name,
            str(len(found)),
            share(sum(map(states_both, found)), len(found)),
            share(len(stated), len(found)),
            share(sum(row["holds"] for row in stated), len(stated)),
            share(sum(map(intervals_hold, stated)), len(stated)),
            f"{sum(row.get('seconds', 0.0) for row in found):,.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def middle(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f}" if values else "-"


def spread(values: list[float], digits: int = 0) -> str:
    """The least and the largest of some numbers."""
    if not values:
        return "-"
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))))


def by_family(rows: list[Row]) -> Iterator[str]:
    """A line for each family: medians of its bounds and of its true errors, where bounds are stated."""
    yield (
        "| family | fits, heavy tails | latents | k-hat | state | hold "
        "| bound of means, true, sds | bound of sds, true, % | CPU s |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for family in COUNTS:
        found = [row for row in rows if family_of(row["model"]) == family]
        if not found:
            continue
        heavy = sum(row["is_heavy"] for row in found)
        stated, done = [row for row in found if states(row)], [r for r in found if "seconds" in r]
        of_means, of_sds = ([row["bounds"][i] for row in stated] for i in (0, 1))
        cells = [
            family.replace("_", " "),
            f"{len(found)}, {heavy}" if heavy else str(len(found)),
            spread([row["latents"] for row in done]),
            spread([row["khat"] for row in done], 2),
            str(len(stated)),
            str(sum(row["holds"] for row in stated)),
            f"{middle(of_means, 3)}, {middle([row['mean_error'] for row in stated], 3)}",
            f"{middle([100 * sd for sd in of_sds], 1)}, "
            f"{middle([100 * row['sd_error'] for row in stated], 1)}",
            f"{sum(row['seconds'] for row in done):.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def wrong(rows: list[Row]) -> Iterator[str]:
    """Each fit whose bounds do not hold."""
    found = [row for row in rows if states(row) and not row["holds"]]
    if not found:
        yield "All bounds that were stated hold."
        return
    yield "| bounds that do not hold | tails | k-hat | trusted | means, true | sds, true, % |"
    yield "|---|---|---|---|---|---|"
    for row in found:
        mean, sd = row["bounds"]
        cells = [
            f"{row['model']}, {row['latents']} latents, seed {row['seed']}",
            "heavy" if row["is_heavy"] else "light",
            f"{row['khat']:.2f}",
            "yes" if row["marginals_trusted"] else "no",
            f"{mean:.3f}, {row['mean_error']:.3f} ± {row['mean_error_se']:.3f}",
            f"{100 * sd:.1f}, {100 * row['sd_error']:.1f} ± {100 * row['sd_error_se']:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def of_chains(rows: list[Row]) -> Iterator[str]:
    """Of fits that make draws: whether these are as right as their effective sample sizes say."""
    yield "| draws of chains | fits | trusted | of these within the noise | not trusted, within | CPU s |"
    yield "|---|---|---|---|---|---|"
    groups: dict[str, Chosen] = {
        "light tails": lambda row: not row["is_heavy"],
        "heavy tails": lambda row: row["is_heavy"],
    }
    for name, is_meant in groups.items():
        found = [row for row in rows if is_meant(row)]
        trusted = [row["chains"] for row in found if row["chains"]["trusted"]]
        others = [row["chains"] for row in found if not row["chains"]["trusted"]]
        cells = [
            name,
            str(len(found)),
            share(len(trusted), len(found)),
            share(sum(chains["hold"] for chains in trusted), len(trusted)),
            share(sum(chains["hold"] for chains in others), len(others)),
            f"{sum(row['seconds'] for row in found):,.0f}",
        ]
        yield f"| {' | '.join(cells)} |"
