# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The table of benchmarks/chains.py from its outcomes."""

import math
from collections.abc import Mapping
from statistics import median

import numpy as np
from fit_subjects import ESS
from results import Row

PEERS = ("NumPyro NUTS", "nutpie")
#: effective draws of NUTS that make it the reference
REFERENCE_ESS = 2_000
#: posteriors whose labels can be exchanged, so that latents one by one have no reference
SYMMETRIC = {"gmm3"}


def errors(moments: Mapping[str, list[float]], truth: Mapping[str, list[float]]) -> Row:
    """Of means in sds, and of sds relative: the worst latent, and the 95 % quantile of all."""
    mean, sd, true_mean, true_sd = (
        np.array(which[key])[: len(truth["mean"])]
        for which in (moments, truth)
        for key in ("mean", "sd")
    )
    of_means, of_sds = abs(mean - true_mean) / true_sd, abs(sd / true_sd - 1)
    found = {}
    for key, values in (("mean", of_means), ("sd", of_sds)):
        found |= {f"{key}_max": values.max(), f"{key}_q95": np.quantile(values, 0.95)}
    return {key: float(value) for key, value in found.items()}


def seconds(outcome: Row) -> float:
    """CPU seconds until there were enough effective draws; infinite where there never were."""
    if outcome["subject"] in PEERS:
        return next((at for _, at, ess in outcome["rows"] if ess >= ESS), math.inf)
    return outcome["seconds"] if outcome.get("trusted") else math.inf


def best(outcomes: list[Row], posterior: str, subject: str) -> list[Row]:
    """The outcomes of a subject, one for each seed: the best one of a peer's."""
    found: dict[int, Row] = {}
    rows = [o for o in outcomes if (o["posterior"], o["subject"]) == (posterior, subject)]
    for row in sorted(rows, key=lambda o: (o["seed"], seconds(o), -o.get("ess", 0.0))):
        found.setdefault(row["seed"], row)
    return list(found.values())


def cell(rows: list[Row]) -> str:
    """Seconds for each seed, in brackets where chains are not trusted."""
    texts = []
    for row in rows:
        if "error" in row or math.isfinite(seconds(row)):
            texts.append(row.get("error") or f"{seconds(row):.1f}")
        elif row["subject"] in PEERS:
            texts.append(f"not in {row['limit']:.0f}: {row['ess']:.0f} draws")
        else:
            texts.append(f"({row['seconds']:.1f})")
    return ", ".join(texts) or "not run"


def reference(outcomes: list[Row], posterior: str) -> Row | None:
    """The moments of the NUTS with the most effective draws, where these are enough."""
    rows = [o for o in outcomes if (o["posterior"], o["subject"]) == (posterior, "NumPyro NUTS")]
    row = max(rows, key=lambda o: o.get("ess", 0.0), default={})
    is_enough = row.get("ess", 0.0) >= REFERENCE_ESS and posterior not in SYMMETRIC
    return row.get("moments") if is_enough else None


def of_draws(rows: list[Row], truth: Row | None) -> list[str]:
    """Four cells of all seeds: median gradients, least ESS, and largest errors of means and sds."""
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return ["-"] * 4
    gradients, ess = median(row["gradients"] for row in rows), min(row["ess"] for row in rows)
    off = [row.get("errors") or (truth and errors(row["moments"], truth)) for row in rows]
    if not all(off):
        return [f"{gradients:,.0f}", f"{ess:,.0f}", "-", "-"]
    largest = {key: max(one[key] for one in off) for key in off[0]}
    cells = [f"{largest[f'{k}_max']:.2f} ({largest[f'{k}_q95']:.2f})" for k in ("mean", "sd")]
    return [f"{gradients:,.0f}", f"{ess:,.0f}", *cells]


def ratio(ours: list[Row], peers: list[list[Row]]) -> str:
    """Median seconds over those of the faster peer, or a bound of it where none was done in its limit."""
    if not ours or not all(peers) or math.isinf(top := median(map(seconds, ours))):
        return "-"
    bottom = min(median(map(seconds, rows)) for rows in peers)
    if math.isinf(bottom):
        return f"< {top / min(row['limit'] for rows in peers for row in rows):.2f}"
    return f"{top / bottom:.2f}"


def table(outcomes: list[Row]) -> str:
    """A row for each posterior."""
    heads = ["posterior, latents", "ensemble, CPU s", "gradients", "least ESS", "means off, sds"]
    heads += ["sds off", "`fit`, CPU s", "NUTS, CPU s", "nutpie, CPU s", "ensemble / faster peer"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    for name in dict.fromkeys(outcome["posterior"] for outcome in outcomes):
        by = {subject: best(outcomes, name, subject) for subject in ("ensemble", "fit", *PEERS)}
        sizes = {row["latents"] for rows in by.values() for row in rows if "latents" in row}
        cells = [", ".join([name, *(f"{size:,}" for size in sizes)]), cell(by["ensemble"])]
        cells += of_draws(by["ensemble"], reference(outcomes, name))
        cells += [cell(by[subject]) for subject in ("fit", *PEERS)]
        cells.append(ratio(by["ensemble"], [by[subject] for subject in PEERS]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
