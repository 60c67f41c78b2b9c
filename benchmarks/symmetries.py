# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Posteriors modulo their symmetries: which are found, and whether draws and shares of modes are right.

    python benchmarks/symmetries.py [found | draws | modes] [--models NAME ...] [--seeds N ...] [--write]

Each run is a process of its own. `found`: the symmetries of models with and without any, and the share of CPU
time that the search takes. `draws`: means and sds of components beside those of symmetries_reference.json, in
standard errors of the difference; each draw is relabelled to the image nearest to the centre of the
reference. `modes`: shares of modes that are no images of each other, beside exact ones.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import pages, runs
from measuring.runs import Row
from models.known_modes import TARGETS
from models.symmetric import ASYMMETRIC, SYMMETRIC
from models.symmetry import Center, Symmetric, Symmetry
from torch import Tensor

from pyro_artransform import fit, mcmc
from pyro_artransform.diagnostics.convergence import mean_ess
from pyro_artransform.sampling import Chains, adaptive_chains

NUM_DRAWS, OPTIONS = 400, {"progress": False, "max_seconds": 300.0}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
REFERENCE: Row = json.loads(Path(__file__).with_name("symmetries_reference.json").read_text())
MODELS = {**SYMMETRIC, **ASYMMETRIC}
KNOWN = {"found": [*MODELS], "draws": [*REFERENCE], "modes": [*TARGETS]}
#: standard errors beyond which a mean or an sd is called wrong
MOST_ERRORS = 4.0
Draws = Mapping[str, Tensor]


class Clock:
    """CPU seconds inside of functions that it wraps."""

    seconds = 0.0

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(fn)
        def timed(*args: Any) -> Any:
            began = time.process_time()
            try:
                return fn(*args)
            finally:
                self.seconds += time.process_time() - began

        return timed


def sampled(subject: Symmetric, seed: int) -> tuple[Chains, Row]:
    """Draws, what is said of them, and the share of CPU time in the search for symmetries."""
    clock: Any = Clock()
    adaptive_chains.find_symmetries = clock(adaptive_chains.find_symmetries)
    adaptive_chains.confirmed = clock(adaptive_chains.confirmed)
    began = time.process_time()
    chains = mcmc(subject.model, *subject.args, draws=NUM_DRAWS, seed=seed, **OPTIONS)
    row: Row = {"seconds": time.process_time() - began, "of_search": clock.seconds}
    row |= {key: getattr(chains, key) for key in ("trusted", "verdict", "min_ess", "max_rhat")}
    row["latents"] = sum(z.numel() for z in chains.rhat.values())
    return chains, row


def of_symmetries(model: str, seed: int) -> Row:
    """The symmetries that are found, those that are missed, and those that are none."""
    subject = MODELS[model]()
    chains, row = sampled(subject, seed)
    found = {Symmetry(s.kind, frozenset(s.slots), s.size) for s in chains.symmetries}
    sets = {
        "found": found,
        "missed": subject.symmetries - found,
        "wrong": found - subject.symmetries,
    }
    return row | {name: sorted(map(in_words, of_name)) for name, of_name in sets.items()}


def in_words(symmetry: Symmetry) -> str:
    slots = sorted(f"{name}{list(dims) if dims else ''}" for name, dims in symmetry.slots)
    return f"{symmetry.kind} of {', '.join(slots)}"


def of_draws(model: str, seed: int) -> Row:
    """The largest errors of means and sds of all components, in standard errors of the difference."""
    subject, reference = MODELS[model](), REFERENCE[model]["sites"]
    chains, row = sampled(subject, seed)
    shape = next(iter(chains.by_chain.values())).shape[:2]
    draws = {name: chains.by_chain[name].double().flatten(0, 1) for name in reference}
    for symmetry in subject.symmetries:
        draws, _ = center_of(reference, draws).nearest(draws, symmetry)
    errors = [of_moments(z.reshape(*shape, -1), reference[name]) for name, z in draws.items()]
    return row | {key: max(of_site[key] for of_site in errors) for key in ("mean", "sd")}


def center_of(reference: Row, like: Draws) -> Center:
    def columns(key: str) -> Draws:
        return {k: z.new_tensor(reference[k][key]).reshape(z.shape[1:]) for k, z in like.items()}

    return Center(columns("center"), columns("center_sd"))


def of_moments(chains: Tensor, reference: Row) -> dict[str, float]:
    """The largest errors of chains ``(C, n, D)``."""
    expected = {key: chains.new_tensor(value) for key, value in reference.items()}
    mean, sd = chains.mean((0, 1)), chains.std((0, 1))
    squares = (chains - mean).square()
    of_sd = squares.std((0, 1)) / mean_ess(squares).sqrt() / (2 * sd)
    errors = {"mean": sd / mean_ess(chains).sqrt(), "sd": of_sd}
    return {
        key: float(
            ((of_run - expected[key]) / errors[key].hypot(expected[f"{key}_se"])).abs().max()
        )
        for key, of_run in {"mean": mean, "sd": sd}.items()
    }


def of_modes(model: str, seed: int) -> Row:
    """Shares of modes by `mcmc` and by `fit`, and their errors in standard errors."""
    target = TARGETS[model]()
    if target.mode_of is None or target.masses is None:
        raise TypeError(f"{model}: expected known modes")
    exact = target.masses.sort(descending=True).values
    row: Row = {"exact": exact.tolist()}
    began = time.process_time()
    for name, run in {"mcmc": mcmc, "fit": fit}.items():
        result = run(target.model, seed=seed, **OPTIONS)
        chains = result if isinstance(result, Chains) else result.chains
        row[name] = {"trusted": chains.trusted and result.trusted, "shares": [1.0], "off": math.inf}
        if (found := result.modes) is not None and len(found.share) == len(exact):
            order = found.share.argsort(descending=True)
            share, se = (each[order].double() for each in (found.share, found.se))
            off = float(((share - exact).abs() / se).max())
            row[name] |= {"shares": share.tolist(), "off": off}
        row[name] |= {"verdict": result.verdict, "seconds": time.process_time() - began}
        began = time.process_time()
    return row


RUNS = {"found": of_symmetries, "draws": of_draws, "modes": of_modes}


def one(what: str, model: str, seed: int, dtype: str) -> Row:
    """A run in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(DTYPES[dtype])
    return RUNS[what](model, seed)


def groups(rows: list[Row]) -> Iterator[tuple[list[str], list[Row]]]:
    """For each model and precision the first cell of its line, and the runs that ended."""
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        found = runs.known(rows, {"model": model, "dtype": dtype})
        failed = "".join(f" ({row['error']})" for row in found if "error" in row)
        yield [f"{model}, {dtype}{failed}"], [row for row in found if "error" not in row]


def spread(rows: list[Row], key: str, digits: int) -> str:
    return pages.spread((row[key] for row in rows), digits)


def cells_of_run(rows: list[Row]) -> list[str]:
    shares = [100 * row["of_search"] / row["seconds"] for row in rows]
    return [
        spread(rows, "latents", 0),
        spread(rows, "seconds", 1),
        pages.spread(shares, 1),
        f"{sum(row['trusted'] for row in rows)} of {len(rows)}",
        spread(rows, "max_rhat", 3),
    ]


HEADS = ["latents", "CPU s", "search, %", "trusted", "R-hat"]


def table_of_symmetries(rows: list[Row]) -> str:
    lines = [
        [*cell, *cells_of_run(of)[:4], " / ".join({*map(found_in_words, of)})]
        for cell, of in groups(rows)
    ]
    ended = [row for row in rows if "error" not in row]
    right = sum(not row["missed"] and not row["wrong"] for row in ended)
    share = sum(row["of_search"] for row in ended) / sum(row["seconds"] for row in ended)
    count = (
        f"{right} of {len(rows)} runs have the symmetries that are expected and no other; the search takes "
        f"{share:.1%} of their CPU time."
    )
    return f"{pages.table(['model', *HEADS[:4], 'symmetries'], lines)}\n\n{count}"


def found_in_words(row: Row) -> str:
    words = ["; ".join(row["found"]) or "none"]
    words += [f"**{key}**: {'; '.join(row[key])}" for key in ("missed", "wrong") if row[key]]
    return "; ".join(words)


def table_of_draws(rows: list[Row]) -> str:
    lines = [
        [*cell, *cells_of_run(of), spread(of, "mean", 1), spread(of, "sd", 1)]
        for cell, of in groups(rows)
    ]
    far = [row for row in rows if max(row.get("mean", 0.0), row.get("sd", 0.0)) > MOST_ERRORS]
    count = (
        f"{len(far)} of {len(rows)} runs have a mean or an sd that is off by more than {MOST_ERRORS:.0f} "
        f"standard errors, {sum(row['trusted'] for row in far)} of which are trusted."
    )
    return f"{pages.table(['model', *HEADS, 'mean off, s.e.', 'sd off, s.e.'], lines)}\n\n{count}"


def table_of_modes(rows: list[Row]) -> str:
    lines = []
    for cell, of_target in groups(rows):
        line = [*cell, *dict.fromkeys(percent(row["exact"]) for row in of_target)]
        for name in ("mcmc", "fit"):
            said = [row[name] for row in of_target]
            line.append("; ".join(percent(of["shares"]) for of in said))
            line.append("; ".join(f"{of['off']:.1f}" for of in said))
            line.append(f"{sum(of['trusted'] for of in said)} of {len(said)}")
            line.append(pages.spread((of["seconds"] for of in said), 1))
        lines.append(line)
    of_run = ["off, s.e.", "trusted", "CPU s"]
    heads = ["target", "exact, %", "mcmc, %", *of_run, "fit, %", *of_run]
    near = sum(row["fit"]["off"] <= 3 for row in rows)
    count = f"{near} of {len(rows)} fits have shares within 3 standard errors of exact ones."
    return f"{pages.table(heads, lines)}\n\n{count}"


def percent(shares: list[float]) -> str:
    return "/".join(f"{100 * share:.1f}" for share in shares)


TABLES = {"found": table_of_symmetries, "draws": table_of_draws, "modes": table_of_modes}


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("parts", nargs="*", choices=[[], *RUNS], default=[])
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *TARGETS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(**options.one)))
        return
    texts = []
    for part in options.parts or RUNS:
        names = [name for name in options.models or KNOWN[part] if name in KNOWN[part]]
        wanted = [
            {"what": part, "model": name, "dtype": dtype, "seed": seed}
            for name, dtype, seed in product(names, options.dtypes, options.seeds)
        ]
        rows = runs.collect(options.results, wanted, runs.in_processes(__file__))
        texts.append(TABLES[part]([row for run in wanted for row in runs.known(rows, run)]))
    parser.show("\n\n".join(texts), options)


if __name__ == "__main__":
    main()
