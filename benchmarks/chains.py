# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How long until draws are right: `fit` with draws beside NumPyro's NUTS; see chains.md.

    python benchmarks/chains.py [--posteriors NAME ...] [--subjects NAME ...] [--limit SECONDS] [--write]

CPU seconds, compiling included and imports not, until the worst latent of the unconstrained space has 400
effective draws. Each run is a process of its own, one after the other, and a line of a file, so that a
run goes on where the last one ended (delete the file, or name another one with --results, after a
change). --large FOLDER measures posteriors of a folder instead: its models.py has NAMES and make(name),
which returns one of the models of chains_models.py with its arguments; a score.py beside it has
score(name, draws). --write puts the table into chains.md. It needs the extra [bench].
"""

import argparse
import importlib
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import chains_models
import numpy as np
import pyro
import torch
from fit import best, seconds_to_goal
from fit_posteriors import POSTERIORS
from fit_subjects import ESS, NUM_WARM_UP, Record, in_torch
from marked_table import write
from pyro.poutine.messenger import Messenger
from results import Row, append, in_a_process, load
from torch.distributions import biject_to

HERE = Path(__file__).parent
FUNNEL, FUNNEL_ESS = "funnel", 1_000
OWN = [*chains_models.LARGE, *POSTERIORS, FUNNEL]
#: acceptance rates that NUTS aims at, each in a run of its own, of which the faster one counts
TARGETS = (0.8, 0.9)
#: effective draws of NUTS that make it the reference, and its draws from one look to the next
REFERENCE_ESS, EVERY = 2_000, 250
#: mean and sd of the funnel's v, the first latent
FUNNEL_MOMENTS = {"mean": [0.0], "sd": [3.0]}
Arrays = Mapping[str, np.ndarray]


class GradientCount(Messenger):
    """Counts the draws at which the gradient by a scalar latent is computed."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site, self.count = site, 0

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.site and msg["value"].requires_grad:
            msg["value"].register_hook(self._add)

    def _add(self, gradient: torch.Tensor) -> None:
        self.count += gradient.numel()


def make(name: str, large: Path | None, seed: int) -> chains_models.Subject:
    """A model with its arguments, and PyTorch as it is for all of them."""
    is_bound = not large and name in POSTERIORS
    # called for the precision and the seed, whichever posterior it is
    model = in_torch(POSTERIORS[name if is_bound else "chain"], seed)
    if is_bound:
        return model, ()
    if large:
        sys.path.insert(0, str(large))
        return importlib.import_module("models").make(name)
    return {**chains_models.LARGE, FUNNEL: chains_models.funnel}[name]()


def latent_supports(model: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """The supports of all sites that are not observed."""
    nodes = pyro.poutine.trace(model).get_trace(*args).nodes
    return {
        name: site["fn"].support
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and type(site["fn"]).__name__ != "_Subsample"
    }


def unconstrained(supports: Mapping[str, Any], draws: Arrays) -> np.ndarray:
    """Draws of each site in a row: shape ``(n, latents)``."""
    columns = [
        biject_to(support).inv(torch.as_tensor(draws[name]).double()).reshape(len(draws[name]), -1)
        for name, support in supports.items()
    ]
    return torch.cat(columns, 1).numpy()


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


def accuracy(name: str, large: Path | None, draws: Arrays, flat: np.ndarray) -> Row:
    """Errors where something stored or exact is known, and moments to compare where it is not."""
    moments = {"mean": flat.mean(0), "sd": flat.std(0)}
    row: Row = {key: [float(f"{x:.6g}") for x in values] for key, values in moments.items()}
    if large and (large / "score.py").exists():
        scores = importlib.import_module("score").score(name, draws)
        return {
            "errors": {key: scores[key] for key in ("mean_max", "mean_q95", "sd_max", "sd_q95")}
        }
    if name == FUNNEL:
        return {"errors": errors(row, FUNNEL_MOMENTS)}
    return {"moments": row}


def by_fit(name: str, large: Path | None, seed: int, limit: float) -> Row:
    """`fit` with draws and nothing else set."""
    from pyro_artransform import fit

    model, args = make(name, large, seed)
    count = GradientCount("v")
    if name == FUNNEL:
        model = count(model)
    began = time.process_time()
    result: Any = fit(
        model,
        *args,
        draws=FUNNEL_ESS if name == FUNNEL else ESS,
        seed=seed,
        progress=False,
        callback=lambda *_: time.process_time() - began > limit,
    )
    row: Row = {"seconds": time.process_time() - began, "all_gradients": count.count}
    row |= {key: getattr(result, key) for key in ("elbo", "khat", "trusted", "verdict")}
    row |= {"guide": type(result.guide).__name__, "steps": result.num_steps}
    chains = result.chains
    row |= {key: getattr(chains, key) for key in ("min_ess", "max_rhat")}
    row |= {"gradients": chains.num_gradients, "seconds_of_chains": chains.seconds}

    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    supports = latent_supports(model, args)
    by_chain = {site: chains.by_chain[site].detach().cpu().numpy() for site in supports}
    draws = {site: z.reshape(-1, *z.shape[2:]) for site, z in by_chain.items()}
    flat = unconstrained(supports, draws)
    cube = flat.reshape(*next(iter(by_chain.values())).shape[:2], -1)
    row |= {"num_chains": cube.shape[0], "draws_of_a_chain": cube.shape[1]}
    row |= {"latents": cube.shape[2], "ess": float(np.nanmin(effective_sample_size(cube)))}
    row["rhat"] = float(np.nanmax(split_gelman_rubin(cube)))
    return row | accuracy(name, large, draws, flat)


def by_nuts(name: str, large: Path | None, seed: int, limit: float, target_accept: float) -> Row:
    """NumPyro's NUTS, one chain, compiled once; where nothing better is known, on to a reference."""
    import jax
    from chains_peers import peer
    from numpyro.diagnostics import effective_sample_size
    from numpyro.infer import NUTS

    model, torch_args = make(name, large, seed)
    supports = latent_supports(model, torch_args)
    model_name = getattr(model, "__name__", "")
    args = tuple(np.asarray(arg) for arg in torch_args)
    is_known = bool(large and (large / "score.py").exists())
    kernel = NUTS(peer(name, model_name), target_accept_prob=target_accept)
    record = Record(math.nan, limit)
    state = kernel.init(jax.random.PRNGKey(seed), NUM_WARM_UP, None, args, {})
    constrain = jax.vmap(kernel.postprocess_fn(args, {}))

    @jax.jit
    def block(state: Any) -> Any:
        def draw(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, args, {})
            return state, (state.z, state.num_steps, state.diverging)

        state, (z, num_steps, diverging) = jax.lax.scan(draw, state, None, EVERY)
        return state, constrain(z), num_steps.sum(), diverging.sum()

    gradients = 0
    for _ in range(0, NUM_WARM_UP, EVERY):
        state, _, num_steps, _ = block(state)
        gradients += int(num_steps)
    warm_up, blocks, flat, divergent, row = record.seconds, [], [], 0, {}
    ess = 0.0
    while ess < (ESS if is_known else REFERENCE_ESS) and record.seconds < limit:
        state, z, num_steps, diverging = block(state)
        gradients, divergent = gradients + int(num_steps), divergent + int(diverging)

        def look(z: Any = z) -> float:
            blocks.append({site: np.array(z[site]) for site in supports})
            flat.append(unconstrained(supports, blocks[-1]))
            return float(np.nanmin(effective_sample_size(np.concatenate(flat)[None])))

        ess = record.note(EVERY * (len(blocks) + 1), look)
        if ess >= ESS and not row:
            row = {"gradients": gradients}
    draws = {site: np.concatenate([one[site] for one in blocks]) for site in supports}
    together = np.concatenate(flat) if flat else np.zeros((0, 0))
    row |= {"rows": record.rows, "warm_up": warm_up, "divergent": divergent, "ess": ess}
    row |= {"latents": together.shape[1]}
    return row | (accuracy(name, large, draws, together) if flat else {})


SUBJECTS: dict[str, Callable[..., Row]] = {"NumPyro NUTS": by_nuts, "fit": by_fit}


def runs(options: argparse.Namespace) -> Iterator[Row]:
    """What there is to run: NUTS first, which is the reference of some."""
    for name in options.posteriors:
        for subject in options.subjects:
            run: Row = {"posterior": name, "subject": subject, "seed": options.seed}
            if subject == "fit":
                yield run
            elif name != FUNNEL:
                yield from (run | {"target_accept": target} for target in TARGETS)


def one(run: Row, large: Path | None) -> Row:
    """A run in this process."""
    warnings.simplefilter("ignore")
    rest = {key: value for key, value in run.items() if key not in ("posterior", "subject")}
    return SUBJECTS[run["subject"]](run["posterior"], large, **rest)


def collect(options: argparse.Namespace) -> list[Row]:
    """All outcomes, those of the file and those that it lacks."""
    outcomes = load(options.results)
    large = ["--large", str(options.large)] if options.large else []
    for run in runs(options):
        if any(run.items() <= outcome.items() for outcome in outcomes):
            continue
        limited = run | {"limit": options.limit}
        outcome = limited | in_a_process(__file__, "--one", json.dumps(limited), *large)
        outcomes.append(outcome)
        append(options.results, outcome)
        shown = {key: value for key, value in outcome.items() if key not in ("rows", "moments")}
        print(shown, outcome.get("rows", [])[-1:], file=sys.stderr, flush=True)
    return outcomes


def reference(outcomes: list[Row], posterior: str) -> Row | None:
    """The moments of the NUTS with the most effective draws, where these are enough."""
    found = [
        outcome
        for outcome in outcomes
        if outcome["posterior"] == posterior
        and outcome["subject"] == "NumPyro NUTS"
        and outcome.get("ess", 0) >= REFERENCE_ESS
    ]
    return max(found, key=lambda outcome: outcome["ess"])["moments"] if found else None


def of_fit(outcomes: list[Row], posterior: str) -> list[str]:
    """Seven cells: seconds, steps, gradients, ESS, R-hat, and errors of means and sds."""
    found = [o for o in outcomes if (o["posterior"], o["subject"]) == (posterior, "fit")]
    if not found or "error" in found[0]:
        return [found[0]["error"] if found else "not run", *["-"] * 6]
    row, gradients = found[0], f"{found[0]['gradients']:,}"
    if row["all_gradients"]:
        gradients += f" ({row['all_gradients']:,} in all)"
    cells = [f"{row['seconds']:.1f}", f"{row['steps']:,}", gradients]
    cells += [f"{row['ess']:,.0f}", f"{row['rhat']:.3f}"]
    truth = reference(outcomes, posterior)
    off = row.get("errors") or (truth and errors(row["moments"], truth))
    if not off:
        return [*cells, "-", "-"]
    return [
        *cells,
        *(f"{off[f'{key}_max']:.2f} ({off[f'{key}_q95']:.2f})" for key in ("mean", "sd")),
    ]


def of_nuts(outcomes: list[Row], posterior: str) -> list[str]:
    """Four cells: seconds until there are enough effective draws, gradients, their number, the target."""
    row = best(outcomes, posterior, "NumPyro NUTS")
    if row is None or not row["rows"]:
        return ["not run" if row is None else row.get("error", "no draws"), "-", "-", "-"]
    seconds, gradients = seconds_to_goal(row), f"{row.get('gradients', 0):,}"
    if math.isinf(seconds):
        return [
            f"not in {row['rows'][-1][1]:.0f}",
            "-",
            f"{row['ess']:.0f}",
            f"{row['target_accept']}",
        ]
    reached = next(ess for _, _, ess in row["rows"] if ess >= ESS)
    return [f"{seconds:.1f}", gradients, f"{reached:.0f}", f"{row['target_accept']}"]


def table(outcomes: list[Row]) -> str:
    """A row for each posterior."""
    heads = ["posterior, latents", "`fit`, CPU s", "steps", "gradients of chains", "least ESS"]
    heads += ["R-hat", "means off, sds", "sds off"]
    heads += ["NUTS, CPU s", "gradients", "least ESS", "target"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---|" * (len(heads) - 1)]
    for name in dict.fromkeys(outcome["posterior"] for outcome in outcomes):
        sizes = {o["latents"] for o in outcomes if o["posterior"] == name and o.get("latents")}
        title = ", ".join([name, *(f"{size:,}" for size in sizes)])
        cells = [title, *of_fit(outcomes, name), *of_nuts(outcomes, name)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--posteriors", nargs="+", help="all by default")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--large", type=Path, metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "chains.jsonl")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.large)))
        return
    if options.large:
        sys.path.insert(0, str(options.large))
    names = importlib.import_module("models").NAMES if options.large else OWN
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
