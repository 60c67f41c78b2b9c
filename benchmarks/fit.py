# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How long until a guide is good: `fit` beside guides and chains of Pyro and NumPyro; see fit.md.

    python benchmarks/fit.py [--posteriors NAME ...] [--subjects NAME ...] [--limit SECONDS] [--write]

CPU seconds, compiling included, until the ELBO is within 0.05 nats of the log evidence, until the end of
`fit` with its verdict, and until 400 effective draws of NUTS. Each run is a process of its own on one
core, one after the other; the clock starts after imports, and stands still while the ELBO or the effective
sample size is measured. --write makes the picture, too. It needs the extra [bench].
"""

import importlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from measuring import pages, runs
from measuring.clock import ESS, GAP, Record
from measuring.runs import Row
from models.library import PYRO, Model, Posterior, in_numpyro
from models.posteriors import SMALL as POSTERIORS

STEP_SIZES = (1e-2, 1e-3)
#: draws a step of all guides, and fresh draws that their ELBO is measured by
NUM_PARTICLES, NUM_DRAWS = 16, 4000
#: steps or draws between two looks, at least, and the growth of steps from one look to the next
EVERY, GROWTH = 50, 1.1
NUM_WARM_UP, MAX_TREE = 500, 10


def looks() -> Iterator[int]:
    """The steps after which a guide is looked at, all of them multiples of some number."""
    step = EVERY
    while True:
        yield step
        step = max(step + EVERY, EVERY * round(GROWTH * step / EVERY))


def in_pyro(posterior: Posterior, seed: int) -> Model:
    """The model, and PyTorch as it is for all subjects of Pyro."""
    import pyro
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    pyro.enable_validation(False)
    return posterior.bind(PYRO)


def this_package(name: str, posterior: Posterior, seed: int, **run: Any) -> dict[str, Any]:
    """`fit` with nothing set, to its end."""
    import torch

    import pyro_artransform
    from pyro_artransform.diagnostics import importance

    model = in_pyro(posterior, seed)
    record, coming = Record(**run), looks()
    waited_for = [1]

    def elbo() -> float:
        with torch.random.fork_rng():
            return importance(model, guide, NUM_DRAWS).elbo

    def look(step: int, _: float) -> None:
        if step >= waited_for[0]:
            record.note_gap(step, elbo)
            waited_for[0] = next(coming)

    guide = getattr(pyro_artransform, name)(model)
    result = pyro_artransform.fit(model, guide, callback=look, progress=False)
    record.note_gap(result.num_steps, elbo)
    found = {"verdict": result.verdict, "trusted": result.trusted, "khat": result.khat}
    found |= {"marginals_trusted": result.marginals_trusted, "start": result.start}
    return {"rows": record.rows, **found}


def pyro_guide(
    name: str, posterior: Posterior, seed: int, step_size: float, **run: Any
) -> dict[str, Any]:
    """A guide of Pyro by its own ELBO."""
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO, autoguide

    model = in_pyro(posterior, seed)
    losses = [
        Trace_ELBO(count, max_plate_nesting=1, vectorize_particles=True)
        for count in (NUM_PARTICLES, NUM_DRAWS)
    ]
    # as many layers as the other flows have; Pyro's networks may not be narrower than their input
    options = {"num_transforms": 3, "hidden_dim": [max(64, posterior.dim)] * 2}
    record = Record(**run)
    guide = getattr(autoguide, name)(model, **(options if name == "AutoIAFNormal" else {}))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": step_size}), losses[0])

    def elbo() -> float:
        with torch.random.fork_rng(), torch.no_grad():
            return -losses[1].loss(model, guide)

    done = 0
    for step in looks():
        for _ in range(done, step):
            svi.step()
        if record.note_gap(done := step, elbo):
            return {"rows": record.rows}
    raise AssertionError("looks never end")


def numpyro_guide(
    name: str, posterior: Posterior, seed: int, step_size: float, **run: Any
) -> dict[str, Any]:
    """A guide of NumPyro by its own ELBO, in compiled blocks of steps."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    model = posterior.bind(in_numpyro())
    record = Record(**run)
    guide = getattr(autoguide, name)(model)
    svi = SVI(model, guide, numpyro.optim.Adam(step_size), Trace_ELBO(NUM_PARTICLES))
    state = svi.init(jax.random.PRNGKey(seed))

    @jax.jit
    def block(state: Any) -> Any:
        return jax.lax.fori_loop(0, EVERY, lambda _, state: svi.update(state)[0], state)

    @jax.jit
    def loss(state: Any) -> Any:
        key, params = jax.random.PRNGKey(1000 + seed), svi.get_params(state)
        return Trace_ELBO(NUM_DRAWS).loss(key, params, model, guide)

    done = 0
    for step in looks():
        for _ in range(done, step, EVERY):
            state = block(state)
        jax.block_until_ready(state)
        if record.note_gap(done := step, lambda: -loss(state)):  # noqa: B023
            return {"rows": record.rows}
    raise AssertionError("looks never end")


def pyro_nuts(posterior: Posterior, seed: int, **run: Any) -> dict[str, Any]:
    """Pyro's NUTS, whose density is compiled; one chain of as many draws as it takes."""
    import torch
    from pyro.infer import MCMC, NUTS
    from pyro.ops.stats import effective_sample_size

    class Enough(Exception):
        """Ends the chain."""

    model = in_pyro(posterior, seed)
    record, draws = Record(**run), []

    def ess() -> torch.Tensor:
        return effective_sample_size(torch.stack(draws)[None], 0, 1).min() if draws else 0.0

    def look(kernel: object, sample: dict[str, torch.Tensor], stage: str, number: int) -> None:
        if stage == "Sample":
            draws.append(torch.cat([value.flatten() for value in sample.values()]))
        if (number + 1) % EVERY == 0 and record.note_ess(len(draws), ess):
            raise Enough

    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=MAX_TREE)
    chain = MCMC(kernel, 1_000_000, NUM_WARM_UP, hook_fn=look, disable_progbar=True)
    try:
        chain.run()
    except Enough:
        return {"rows": record.rows}
    raise AssertionError("the chain should have been long enough")


def numpyro_nuts(posterior: Posterior, seed: int, **run: Any) -> dict[str, Any]:
    """NumPyro's NUTS; one chain of as many draws as it takes."""
    import jax
    import numpy as np
    from measuring.nuts import blocks, least_ess

    record, kept = Record(**run), list[np.ndarray]()
    flat = jax.jit(jax.vmap(lambda z: jax.flatten_util.ravel_pytree(z)[0]))
    model = posterior.bind(in_numpyro())
    chain = blocks(model, (), seed, NUM_WARM_UP, EVERY, max_tree_depth=MAX_TREE)
    for number, block in enumerate(chain):
        if number * EVERY >= NUM_WARM_UP:
            kept.append(np.asarray(flat(block.unconstrained)))
        if record.note_ess(
            EVERY * len(kept), lambda: least_ess(np.concatenate(kept)[None]) if kept else 0.0
        ):
            break
    return {"rows": record.rows}


#: each subject, and whether it has step sizes to choose from
SUBJECTS: dict[str, tuple[Callable[..., dict[str, Any]], bool]] = {
    "AutoIAF by fit": (partial(this_package, "AutoIAF"), False),
    "AutoStructuredFlow by fit": (partial(this_package, "AutoStructuredFlow"), False),
    "Pyro AutoIAFNormal": (partial(pyro_guide, "AutoIAFNormal"), True),
    "Pyro AutoMultivariateNormal": (partial(pyro_guide, "AutoMultivariateNormal"), True),
    "NumPyro AutoIAFNormal": (partial(numpyro_guide, "AutoIAFNormal"), True),
    "NumPyro AutoBNAFNormal": (partial(numpyro_guide, "AutoBNAFNormal"), True),
    "Pyro NUTS": (pyro_nuts, False),
    "NumPyro NUTS": (numpyro_nuts, False),
}


def wanted(posteriors: list[str], subjects: list[str], seed: int) -> Iterator[Row]:
    """What there is to run: for each posterior all subjects take turns."""
    for posterior in posteriors:
        for size in range(len(STEP_SIZES)):
            for subject in subjects:
                has_sizes = SUBJECTS[subject][1]
                if size and not has_sizes:
                    continue
                # a graph of ten latents that all depend on each other is no structure
                if subject == "AutoStructuredFlow by fit" and posterior != "chain":
                    continue
                run: Row = {"posterior": posterior, "subject": subject, "seed": seed}
                yield run | ({"step_size": STEP_SIZES[size]} if has_sizes else {})


def one(run: Row) -> Row:
    """A run in this process, on one core, after the imports that its clock leaves out."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    package = {"NumPyro": "numpyro.infer.autoguide", "Pyro": "pyro.infer.autoguide"}
    importlib.import_module(package.get(run["subject"].split()[0], "pyro_artransform"))
    warnings.simplefilter("ignore")
    subject, _ = SUBJECTS[run["subject"]]
    posterior = POSTERIORS[run["posterior"]]
    rest = {key: value for key, value in run.items() if key not in ("posterior", "subject")}
    return subject(posterior=posterior, evidence=posterior.evidence(), **rest)


def seconds_to_goal(outcome: Row) -> float:
    """CPU seconds to the first row that is good enough; infinite where none is."""
    is_chain = outcome["subject"].endswith("NUTS")
    good = (
        seconds
        for _, seconds, value in outcome["rows"]
        if (value >= ESS if is_chain else value <= GAP)
    )
    return next(good, math.inf)


def best_value(outcome: Row) -> float:
    """The smallest gap, or minus the largest effective sample size, of all rows."""
    sign = -1 if outcome["subject"].endswith("NUTS") else 1
    values = (sign * value for _, _, value in outcome["rows"] if not math.isnan(value))
    return min(values, default=math.inf)


def best(outcomes: list[Row], posterior: str, subject: str) -> Row | None:
    """The run with the best of the step sizes: soonest at the goal, or else nearest to it."""
    found = [o for o in outcomes if (o["posterior"], o["subject"]) == (posterior, subject)]
    return min(found, key=lambda o: (seconds_to_goal(o), best_value(o)), default=None)


def cell(outcome: Row | None) -> str:
    if outcome is None:
        return "not run"
    if not outcome["rows"]:
        return outcome.get("error", "nothing")
    seconds, value = seconds_to_goal(outcome), best_value(outcome)
    if math.isfinite(seconds):
        return f"{seconds:.1f}"
    return f"not: {-value:.0f} draws" if value <= 0 else f"not: {value:.2f}"


def verdict(outcome: Row | None) -> str:
    """Seconds of the whole fit, the gap at its end, and whether it was trusted."""
    if outcome is None or not outcome["rows"]:
        return cell(outcome)
    _, seconds, gap = outcome["rows"][-1]
    return f"{seconds:.1f} ({gap:.3f}, {'trusted' if outcome['trusted'] else 'not trusted'})"


def table(outcomes: list[Row]) -> str:
    """A row for each subject, a column for each posterior."""
    posteriors = [name for name in POSTERIORS if runs.known(outcomes, {"posterior": name})]
    lines = []
    for subject in SUBJECTS:
        found = [best(outcomes, name, subject) for name in posteriors]
        if any(found):
            lines.append([subject, *map(cell, found)])
        if any(found) and subject.endswith("by fit"):
            lines.append(["its verdict", *map(verdict, found)])
    return pages.table(["", *(f"{n}, D={POSTERIORS[n].dim}" for n in posteriors)], lines)


def draw(outcomes: list[Row], path: Path) -> None:
    """Seconds to the goal by posterior; an open mark at the right edge where it was not reached."""
    from matplotlib import pyplot as plt

    posteriors = [name for name in POSTERIORS if any(o["posterior"] == name for o in outcomes)]
    edge = 2 * max(o["rows"][-1][1] for o in outcomes if o["rows"])
    figure, ax = plt.subplots(figsize=(9, 0.95 * len(posteriors) + 1.6), layout="constrained")
    for number, subject in enumerate(SUBJECTS):
        found = [(y, best(outcomes, name, subject)) for y, name in enumerate(posteriors)]
        rows = [(y, outcome) for y, outcome in found if outcome is not None]
        heights = [y + 0.095 * (number - 3.5) for y, _ in rows]
        times = [min(seconds_to_goal(outcome), edge) for _, outcome in rows]
        is_ours, is_chain = subject.endswith("by fit"), subject.endswith("NUTS")
        style: dict[str, Any] = {"marker": "D" if is_ours else "s" if is_chain else "o", "s": 30}
        color = f"C{number}"
        fills = [color if seconds < edge else "none" for seconds in times]
        ax.scatter(times, heights, color=fills, edgecolors=color, **style)
        ax.scatter([], [], label=subject, color=color, **style)
        for (_, outcome), height, seconds in zip(rows, heights, times):
            if is_ours and outcome["rows"]:
                end = outcome["rows"][-1][1]
                ax.plot([min(seconds, end), end], [height, height], color=color, linewidth=1.2)
                ax.plot(end, height, "|", color=color, markersize=8)
    ax.axvline(edge / 1.35, color="0.8", linewidth=0.8)
    ax.set(xscale="log", xlabel="CPU seconds; at the right edge: not reached")
    ax.set_yticks(range(len(posteriors)), posteriors)
    ax.set_ylim(len(posteriors) - 0.5, -0.5)
    for y in range(1, len(posteriors)):
        ax.axhline(y - 0.5, color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 3}
    figure.legend(frameon=False, fontsize=8, **place)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_argument("--posteriors", nargs="+", choices=POSTERIORS, default=list(POSTERIORS))
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds of a peer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    asked = wanted(options.posteriors, options.subjects, options.seed)
    limited = (run | {"limit": options.limit} for run in asked)
    outcomes = runs.collect(options.results, limited, runs.in_processes(__file__))
    parser.show(table(outcomes), options)
    if options.write:
        draw(outcomes, parser.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
