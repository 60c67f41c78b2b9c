# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How long until draws are right: `mcmc` and `fit` beside NUTS of NumPyro and nutpie; see chains.md.

    python benchmarks/chains.py [--posteriors NAME ...] [--subjects NAME ...] [--seeds N ...]
                                [--limit SECONDS] [--large FOLDER | --users FOLDER] [--write]

CPU seconds, compiling included, until the worst latent has 400 effective draws. Each run is a process of its
own, one after the other. --large measures posteriors of a folder instead: its models.py has NAMES and
make(name), which returns a model with its arguments; a score.py beside it has score(name, draws). --users
takes a folder whose models.py has a function for each of NAMES, which returns a dictionary with `model`,
`np_model` for NumPyro, and `data`. It needs the extra [bench].
"""

import importlib
import json
import math
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro
import torch
from measuring import pages, runs
from measuring.clock import ESS, Record
from measuring.runs import Row
from models import posteriors
from models.library import PYRO, Subject, from_folder
from torch.distributions import biject_to

ENSEMBLE, NUTS, NUTPIE = "ensemble", "NumPyro NUTS", "nutpie"
PEERS = (NUTS, NUTPIE)
#: acceptance rates that peers aim at, each in a run of its own, of which the faster one counts
TARGETS = (0.8, 0.9)
#: draws of a peer's warm-up, from one look to the next, at least, and how much more there are at each look
NUM_WARM_UP, EVERY, GROWTH = 500, 250, 1.05
#: effective draws of NUTS that make it the reference
REFERENCE_ESS = 2_000
#: posteriors whose labels can be exchanged, so that latents one by one have no reference
SYMMETRIC = {"gmm3"}
#: mean and sd of the funnel's v, the first latent
FUNNEL_MOMENTS = {"mean": [0.0], "sd": [3.0]}
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """A posterior for both libraries.

    :param peer: makes the NumPyro model, which takes the same arguments as arrays.
    :param score: compares draws of each site with a reference, if there is one.
    """

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    peer: Callable[[], Callable[..., Any]]
    score: Callable[[str, Arrays], Row] | None = None

    def supports(self) -> dict[str, Any]:
        """The supports of all continuous sites that are not observed."""
        nodes = pyro.poutine.trace(self.model).get_trace(*self.args).nodes
        return {
            name: site["fn"].support
            for name, site in nodes.items()
            if site["type"] == "sample"
            and not site["is_observed"]
            and type(site["fn"]).__name__ != "_Subsample"
            and not site["fn"].support.is_discrete
        }


def set_up(seed: int) -> None:
    """PyTorch as it is for all runs."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    pyro.enable_validation(False)


def make(name: str, folder: Path | None) -> Problem:
    if folder and not hasattr(given := from_folder(folder), "make"):
        found = getattr(given, name)()
        args = tuple(given.T(value) for value in found["data"])
        return Problem(name, found["model"], args, lambda: found["np_model"])
    subject: Subject
    if folder:
        subject = given.make(name)
    elif name in posteriors.BOUND:
        subject = posteriors.BOUND[name](PYRO), ()
    else:
        subject = posteriors.LARGE[name]()
    has_score = folder and (folder / "score.py").exists()

    def peer() -> Callable[..., Any]:
        of_name = getattr(subject[0], "__name__", "")
        return importlib.import_module("models.in_numpyro").peer(name, of_name)

    return Problem(name, *subject, peer, from_folder(folder, "score").score if has_score else None)


def unconstrained(supports: Mapping[str, Any], draws: Arrays) -> np.ndarray:
    """Draws of each site in a row: shape ``(n, latents)``."""
    columns = [
        biject_to(support).inv(torch.as_tensor(draws[name]).double()).reshape(len(draws[name]), -1)
        for name, support in supports.items()
    ]
    return torch.cat(columns, 1).numpy()


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def accuracy(problem: Problem, draws: Arrays, flat: np.ndarray) -> Row:
    """Errors where something stored or exact is known, and moments to compare where it is not."""
    if problem.score:
        scores = problem.score(problem.name, draws)
        names = ("mean_max", "mean_q95", "sd_max", "sd_q95")
        return {"errors": {key: scores[key] for key in names}}
    moments = {"mean": flat.mean(0), "sd": flat.std(0)}
    row: Row = {key: [float(f"{x:.6g}") for x in values] for key, values in moments.items()}
    if problem.name == "funnel":
        return {"errors": errors(row, FUNNEL_MOMENTS)}
    return {"moments": row}


def of_chains(chains: Any, problem: Problem) -> Row:
    """What chains of this package have to show; effective draws are those of their halves."""
    from measuring.nuts import least_ess

    row: Row = {"megabytes": megabytes(), "gradients": chains.num_gradients}
    row |= {key: getattr(chains, key) for key in ("min_ess", "max_rhat", "trusted", "verdict")}
    supports = problem.supports()
    by_chain = {site: chains.by_chain[site].detach().cpu().numpy() for site in supports}
    draws = {site: z.reshape(-1, *z.shape[2:]) for site, z in by_chain.items()}
    flat = unconstrained(supports, draws)
    num_chains, size = next(iter(by_chain.values())).shape[:2]
    halves = flat.reshape(num_chains, size, -1)[:, : size // 2 * 2]
    halves = halves.reshape(2 * num_chains, size // 2, -1)
    row |= {"num_chains": num_chains, "draws_of_a_chain": size, "latents": flat.shape[1]}
    return row | {"ess": least_ess(halves)} | accuracy(problem, draws, flat)


def by_ensemble(problem: Problem, seed: int, limit: float) -> Row:
    """`mcmc` with nothing else set; its limit is of wall time."""
    from pyro_artransform.sampling import mcmc

    began = time.process_time()
    options: Any = {"seed": seed, "progress": False, "max_seconds": limit}
    chains = mcmc(problem.model, *problem.args, draws=ESS, **options)
    return {"seconds": time.process_time() - began} | of_chains(chains, problem)


def by_fit(problem: Problem, seed: int, limit: float) -> Row:
    """`fit` with draws and nothing else set."""
    from pyro_artransform import fit

    began = time.process_time()
    options: Any = {"draws": ESS, "seed": seed, "progress": False}
    options["callback"] = lambda *_: time.process_time() - began > limit
    result: Any = fit(problem.model, *problem.args, **options)
    row: Row = {"seconds": time.process_time() - began, "steps": result.num_steps}
    row |= {"guide": type(result.guide).__name__, "khat": result.khat}
    return row | of_chains(result.chains, problem)


class Looks:
    """Draws of a peer's chain, and how many are effective, counted while its clock stands still."""

    def __init__(self, problem: Problem, limit: float, goal: float = ESS) -> None:
        self._problem, self._supports, self._goal = problem, problem.supports(), goal
        self._draws: list[Arrays] = []
        self._flat: list[np.ndarray] = []
        self._at_goal: int | None = None
        self._next, self.gradients, self.ess = 0, 0, 0.0
        self.record = Record(limit)

    def is_over(self) -> bool:
        return self.ess >= self._goal or self.record.seconds > self.record.limit

    def add(self, draws: Callable[[], Mapping[str, Any]]) -> None:
        """Draws of each site that came since the last call."""
        from measuring.nuts import least_ess

        with self.record.paused():
            found = draws()
            self._draws.append({site: np.array(found[site]) for site in self._supports})
            self._flat.append(unconstrained(self._supports, self._draws[-1]))
        size = EVERY * len(self._flat)
        if size < self._next:
            return
        self._next = int(GROWTH * size)
        self.ess = self.record.note(size, lambda: least_ess(np.concatenate(self._flat)[None]))
        if self.ess >= ESS and self._at_goal is None:
            self._at_goal = self.gradients

    def row(self) -> Row:
        row: Row = {"megabytes": megabytes(), "rows": self.record.rows, "ess": self.ess}
        row |= {"gradients": self._at_goal or self.gradients}
        if not self._flat:
            return row
        flat = np.concatenate(self._flat)
        draws = {site: np.concatenate([z[site] for z in self._draws]) for site in self._supports}
        return row | {"latents": flat.shape[1]} | accuracy(self._problem, draws, flat)


def by_nuts(problem: Problem, seed: int, limit: float, target_accept: float) -> Row:
    """NumPyro's NUTS, one chain; where nothing better is known, on to a reference."""
    from measuring.nuts import blocks

    args = tuple(np.asarray(arg) for arg in problem.args)
    looks = Looks(problem, limit, ESS if problem.score else REFERENCE_ESS)
    options = {"target_accept_prob": target_accept}
    for number, block in enumerate(
        blocks(problem.peer(), args, seed, NUM_WARM_UP, EVERY, **options)
    ):
        looks.gradients += int(block.num_gradients.sum())
        if number * EVERY >= NUM_WARM_UP:
            looks.add(lambda block=block: block.sites)
        if looks.is_over():
            break
    return looks.row()


def by_nutpie(problem: Problem, seed: int, limit: float, target_accept: float) -> Row:
    """nutpie, which is looked at as it draws."""
    from measuring.nuts import Enough, Nutpie

    args = tuple(np.asarray(arg) for arg in problem.args)
    peer = Nutpie(problem.peer(), args, seed)
    looks = Looks(problem, limit)

    def watch(num_draws: int, last: Callable[[int], Any]) -> None:
        looks.gradients = peer.num_gradients
        if num_draws > 0 and num_draws % EVERY == 0:
            looks.add(lambda: last(EVERY))
        if looks.is_over():
            raise Enough

    peer.run(watch, tune=NUM_WARM_UP, target_accept=target_accept)
    return looks.row() | {"seconds_of_initialization": peer.seconds_of_initialization}


SUBJECTS: dict[str, Callable[..., Row]] = {
    NUTS: by_nuts,
    NUTPIE: by_nutpie,
    "fit": by_fit,
    ENSEMBLE: by_ensemble,
}


def measured(run: Row, make: Callable[[str], Problem]) -> Row:
    """A run in this process."""
    set_up(run["seed"])
    rest = {key: value for key, value in run.items() if key not in ("posterior", "subject")}
    return SUBJECTS[run["subject"]](make(run["posterior"]), **rest)


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


def seconds(row: Row) -> float:
    """CPU seconds until there were enough effective draws; infinite where there never were."""
    if row["subject"] in PEERS:
        return next((at for _, at, ess in row["rows"] if ess >= ESS), math.inf)
    return row["seconds"] if row.get("trusted") else math.inf


def best(rows: list[Row], posterior: str, subject: str) -> list[Row]:
    """The runs of a subject, one for each seed: the best one of a peer's."""
    found: dict[int, Row] = {}
    of_subject = runs.known(rows, {"posterior": posterior, "subject": subject})
    for row in sorted(of_subject, key=lambda o: (o["seed"], seconds(o), -o.get("ess", 0.0))):
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


def of_draws(rows: list[Row], posterior: str) -> list[str]:
    """Four cells of all seeds: median gradients, least ESS, and largest errors of means and sds.

    Errors are against the NUTS with the most effective draws, where these are enough.
    """
    nuts = runs.known(rows, {"posterior": posterior, "subject": NUTS})
    ours = [row for row in best(rows, posterior, ENSEMBLE) if "error" not in row]
    if not ours:
        return ["-"] * 4
    gradients, ess = median(row["gradients"] for row in ours), min(row["ess"] for row in ours)
    longest = max(nuts, key=lambda row: row.get("ess", 0.0), default={})
    is_enough = longest.get("ess", 0.0) >= REFERENCE_ESS and posterior not in SYMMETRIC
    truth = longest.get("moments") if is_enough else None
    off = [row.get("errors") or (truth and errors(row["moments"], truth)) for row in ours]
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


def table(rows: list[Row]) -> str:
    """A row for each posterior."""
    heads = ["posterior, latents", "ensemble, CPU s", "gradients", "least ESS", "means off, sds"]
    heads += ["sds off", "`fit`, CPU s", "NUTS, CPU s", "nutpie, CPU s", "ensemble / faster peer"]
    lines = []
    for name in dict.fromkeys(row["posterior"] for row in rows):
        by = {subject: best(rows, name, subject) for subject in (ENSEMBLE, "fit", *PEERS)}
        sizes = {row["latents"] for found in by.values() for row in found if "latents" in row}
        cells = [", ".join([name, *(f"{size:,}" for size in sizes)]), cell(by[ENSEMBLE])]
        cells += [*of_draws(rows, name), *(cell(by[subject]) for subject in ("fit", *PEERS))]
        lines.append([*cells, ratio(by[ENSEMBLE], [by[subject] for subject in PEERS])])
    return pages.table(heads, lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("--posteriors", nargs="+", help="all by default")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--large", "--users", dest="folder", type=Path, metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    folder = options.folder
    if options.one:
        print(json.dumps(measured(options.one, lambda name: make(name, folder))))
        return
    names = from_folder(folder).NAMES if folder else posteriors.NAMES
    options.posteriors = options.posteriors or names
    if unknown := sorted(set(options.posteriors) - set(names)):
        parser.error(f"expected posteriors among {names}, got {unknown}")

    def wanted() -> Iterator[Row]:
        """NUTS first, which is the reference of some."""
        for name in options.posteriors:
            for subject in options.subjects:
                for seed in options.seeds:
                    run: Row = {"posterior": name, "subject": subject, "seed": seed}
                    run |= {"limit": options.limit}
                    targets = TARGETS if subject in PEERS else ()
                    yield from [run | {"target_accept": target} for target in targets] or [run]

    more = ["--large", str(folder)] if folder else []
    parser.show(
        table(runs.collect(options.results, wanted(), runs.in_processes(__file__, *more))), options
    )


if __name__ == "__main__":
    main()
