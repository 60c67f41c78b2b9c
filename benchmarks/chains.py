# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How long until draws are right: `mcmc` and `fit` beside the NUTS of NumPyro and of nutpie; see chains.md.

    python benchmarks/chains.py [--posteriors NAME ...] [--subjects NAME ...] [--seeds N ...]
                                [--limit SECONDS] [--large FOLDER | --users FOLDER] [--write]

CPU seconds, compiling included and imports not, until the worst latent of the unconstrained space has 400
effective draws. Each run is a process of its own, one after the other, and a line of a file, so that a
run goes on where the last one ended (delete the file, or name another one with --results, after a
change). --large measures posteriors of a folder instead: its models.py has NAMES and make(name), which
returns one of the models of chains_models.py with its arguments; a score.py beside it has
score(name, draws). --users takes a folder whose models.py has a function for each of NAMES, which returns
a dictionary with `model`, `np_model` for NumPyro, and `data`. --write puts the table of all outcomes into
chains.md. It needs the extra [bench].
"""

import argparse
import importlib
import json
import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chains_models
import numpy as np
import pyro
import torch
from chains_table import PEERS, REFERENCE_ESS, cell, errors, table
from fit_subjects import ESS, NUM_WARM_UP, Enough, Record, in_torch
from marked_table import write
from results import Row, append, in_a_process, load
from torch.distributions import biject_to

HERE = Path(__file__).parent
#: acceptance rates that peers aim at, each in a run of its own, of which the faster one counts
TARGETS = (0.8, 0.9)
#: a peer's draws from one look to the next, at least, and how much more there are of them at each look
EVERY, GROWTH = 250, 1.05
#: latents whose effective draws are counted at once
CHUNK = 64
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


def from_folder(folder: Path, name: str = "models") -> Any:
    """A module of a folder."""
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def make(name: str, folder: Path | None, seed: int) -> Problem:
    """A posterior, and PyTorch as it is for all of them."""
    is_bound = not folder and name in chains_models.BOUND
    # called for the precision and the seed, whichever posterior it is
    model: Any = in_torch(chains_models.BOUND[name if is_bound else "chain"], seed)
    args, score = (), None
    if folder and not hasattr(models := from_folder(folder), "make"):
        found = getattr(models, name)()
        args = tuple(models.T(value) for value in found["data"])
        return Problem(name, found["model"], args, lambda: found["np_model"])
    if folder:
        model, args = models.make(name)
        has_score = (folder / "score.py").exists()
        score = from_folder(folder, "score").score if has_score else None
    elif not is_bound:
        model, args = chains_models.LARGE[name]()

    def peer() -> Callable[..., Any]:
        return importlib.import_module("chains_peers").peer(name, getattr(model, "__name__", ""))

    return Problem(name, model, args, peer, score)


def unconstrained(supports: Mapping[str, Any], draws: Arrays) -> np.ndarray:
    """Draws of each site in a row: shape ``(n, latents)``."""
    columns = [
        biject_to(support).inv(torch.as_tensor(draws[name]).double()).reshape(len(draws[name]), -1)
        for name, support in supports.items()
    ]
    return torch.cat(columns, 1).numpy()


def least_ess(draws: np.ndarray) -> float:
    """Of the worst latent, of draws of chains ``(chains, n, latents)``; a few at once, for memory."""
    from numpyro.diagnostics import effective_sample_size

    parts = range(0, draws.shape[2], CHUNK)
    found = [effective_sample_size(draws[..., start : start + CHUNK]) for start in parts]
    return float(np.nanmin(np.concatenate(found)))


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def accuracy(problem: Problem, draws: Arrays, flat: np.ndarray) -> Row:
    """Errors where something stored or exact is known, and moments to compare where it is not."""
    if problem.score:
        scores = problem.score(problem.name, draws)
        return {
            "errors": {key: scores[key] for key in ("mean_max", "mean_q95", "sd_max", "sd_q95")}
        }
    moments = {"mean": flat.mean(0), "sd": flat.std(0)}
    row: Row = {key: [float(f"{x:.6g}") for x in values] for key, values in moments.items()}
    if problem.name == "funnel":
        return {"errors": errors(row, FUNNEL_MOMENTS)}
    return {"moments": row}


def of_chains(chains: Any, problem: Problem) -> Row:
    """What chains of this package have to show; effective draws are those of their halves."""
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
        self.record = Record(math.nan, limit)

    def is_over(self) -> bool:
        return self.ess >= self._goal or self.record.seconds > self.record.limit

    def add(self, draws: Callable[[], Mapping[str, Any]]) -> None:
        """Draws of each site that came since the last call."""
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
    """NumPyro's NUTS, one chain, compiled once; where nothing better is known, on to a reference."""
    import jax
    import numpyro

    numpyro.enable_x64()
    args = tuple(np.asarray(arg) for arg in problem.args)
    kernel = numpyro.infer.NUTS(problem.peer(), target_accept_prob=target_accept)
    looks = Looks(problem, limit, ESS if problem.score else REFERENCE_ESS)
    state = kernel.init(jax.random.PRNGKey(seed), NUM_WARM_UP, None, args, {})
    constrain = jax.vmap(kernel.postprocess_fn(args, {}))

    @jax.jit
    def block(state: Any) -> Any:
        def draw(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, args, {})
            return state, (state.z, state.num_steps)

        state, (z, num_steps) = jax.lax.scan(draw, state, None, EVERY)
        return state, constrain(z), num_steps.sum()

    num_draws = 0
    while not looks.is_over():
        state, z, num_steps = block(state)
        num_draws, looks.gradients = num_draws + EVERY, looks.gradients + int(num_steps)
        if num_draws > NUM_WARM_UP:
            looks.add(lambda z=z: z)
    return looks.row()


def by_nutpie(problem: Problem, seed: int, limit: float, target_accept: float) -> Row:
    """nutpie with NumPyro's log density, one chain, which is looked at as it is drawn."""
    import jax
    import numpyro
    import nutpie
    from numpyro.infer.util import initialize_model

    # else each call may wait for a thread, which takes up to three times as long
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    numpyro.enable_x64()
    args = tuple(np.asarray(arg) for arg in problem.args)
    began = time.process_time()
    info: Any = initialize_model(
        jax.random.PRNGKey(seed), problem.peer(), model_args=args, validate_grad=False
    )
    start, to_sites = jax.flatten_util.ravel_pytree(info.param_info.z)
    constrain = jax.jit(jax.vmap(lambda z: info.postprocess_fn(to_sites(z))))
    density = jax.jit(jax.value_and_grad(lambda z: -info.potential_fn(to_sites(z))))
    before = time.process_time() - began
    looks = Looks(problem, limit)
    kept: list[np.ndarray] = []

    def log_density(z: np.ndarray) -> tuple[float, np.ndarray]:
        looks.gradients += 1
        value, gradient = density(z)
        return float(value), np.asarray(gradient)

    def expand(z: np.ndarray) -> dict[str, np.ndarray]:
        """nutpie calls it with each draw, those of the warm-up too."""
        kept.append(np.array(z))
        num_draws = len(kept) - NUM_WARM_UP
        if num_draws > 0 and num_draws % EVERY == 0:
            looks.add(lambda: constrain(np.stack(kept[-EVERY:])))
        if looks.is_over():
            raise Enough
        return {"z": kept[-1]}

    functions = (lambda: log_density), (lambda *_: expand)
    dtype, size = np.dtype("float64"), len(start)
    model = nutpie.compiled_pyfunc.from_pyfunc(size, *functions, [dtype], [(size,)], ["z"])
    options: Any = {"tune": NUM_WARM_UP, "draws": 10**6, "seed": seed, "progress_bar": False}
    options |= {"chains": 1, "cores": 1, "save_warmup": False, "target_accept": target_accept}
    try:
        nutpie.sample(model, **options)
    except BaseException:  # what it makes of Enough is no Exception
        if not looks.is_over():
            raise
    return looks.row() | {"seconds_of_initialization": before}


SUBJECTS: dict[str, Callable[..., Row]] = {
    "NumPyro NUTS": by_nuts,
    "nutpie": by_nutpie,
    "fit": by_fit,
    "ensemble": by_ensemble,
}


def runs(options: argparse.Namespace) -> Iterator[Row]:
    """What there is to run: NUTS first, which is the reference of some."""
    for name in options.posteriors:
        for subject in options.subjects:
            for seed in options.seeds:
                run: Row = {"posterior": name, "subject": subject, "seed": seed}
                targets = TARGETS if subject in PEERS else ()
                yield from [run | {"target_accept": target} for target in targets] or [run]


def one(run: Row, folder: Path | None) -> Row:
    """A run in this process."""
    warnings.simplefilter("ignore")
    rest = {key: value for key, value in run.items() if key not in ("posterior", "subject")}
    return SUBJECTS[run["subject"]](make(run["posterior"], folder, run["seed"]), **rest)


def collect(options: argparse.Namespace) -> list[Row]:
    """All outcomes, those of the file and those that it lacks."""
    outcomes = load(options.results)
    folder = ["--large", str(options.folder)] if options.folder else []
    for run in runs(options):
        if not any(run.items() <= outcome.items() for outcome in outcomes):
            run |= {"limit": options.limit}
            outcomes.append(run | in_a_process(__file__, "--one", json.dumps(run), *folder))
            append(options.results, outcomes[-1])
            print(run, cell(outcomes[-1:]), file=sys.stderr, flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", nargs="+", help="all by default")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--large", "--users", dest="folder", type=Path, metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=HERE / "chains.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.folder)))
        return
    names = from_folder(options.folder).NAMES if options.folder else chains_models.NAMES
    options.posteriors = options.posteriors or names
    unknown = sorted(set(options.posteriors) - set(names))
    if unknown:
        parser.error(f"expected posteriors among {names}, got {unknown}")
    outcomes = collect(options)
    print(table(outcomes))
    if options.write:
        write(table(outcomes), HERE / "chains.md")


if __name__ == "__main__":
    main()
