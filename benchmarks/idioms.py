# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""`fit` with nothing set on models as users write them, beside two of Pyro's guides; see idioms.md.

OMP_NUM_THREADS=1 python benchmarks/idioms.py [MODEL ...] [--guides GUIDE ...] [--limit SECONDS] [--write]
"""

import time
import warnings

import pyro
import torch
from measuring import pages, runs
from measuring.runs import Row
from models.idioms import MODELS
from models.library import Subject
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_artransform import fit
from pyro_artransform.diagnostics import importance
from pyro_artransform.model import LogJoint

PEERS = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}
GUIDES = ("chosen by fit", *PEERS)
STEP_SIZE, NUM_DRAWS = 0.01, 10_000


def set_up(name: str) -> Subject:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return MODELS[name][1]()


def fitted(run: Row) -> Row:
    """`fit` of a guide that it chooses, with nothing set."""
    model, args = set_up(run["model"])
    began = time.process_time()
    result = fit(model, *args, progress=False)
    return {
        "seconds": time.process_time() - began,
        "latents": LogJoint(model, args).latents.latent_dim,
        "chosen": type(result.guide).__name__,
        "steps": result.num_steps,
        "elbo": result.elbo,
        "elbo_se": result.elbo_se,
        "khat": result.khat,
        "ok": result.ok,
        "trusted": result.trusted,
        "marginals_trusted": result.marginals_trusted,
        "slow": result.one_at_a_time,
        "verdict": result.verdict,
    }


def by_svi(run: Row, limit: float) -> Row:
    """A guide of Pyro by its SVI with Adam for so many CPU seconds; then its weights."""
    model, args = set_up(run["model"])
    began, num_steps = time.process_time(), 0
    guide = PEERS[run["guide"]](model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": STEP_SIZE}), Trace_ELBO())
    try:
        while time.process_time() - began < limit:
            svi.step(*args)
            num_steps += 1
    except (ValueError, RuntimeError) as error:
        lines = str(error).splitlines()
        return {"seconds": limit, "steps": num_steps, "error": lines[0][:60]}
    seconds = time.process_time() - began
    found = importance(model, guide, NUM_DRAWS, *args)
    return {
        "seconds": seconds,
        "steps": num_steps,
        "elbo": found.elbo,
        "elbo_se": found.elbo_se,
        "khat": found.khat,
    }


def find(rows: list[Row], model: str, guide: str) -> Row:
    """The row of a model and a guide, empty where there is none."""
    return next(iter(runs.known(rows, {"model": model, "guide": guide})), {})


def is_trusted(row: Row) -> str:
    checked = {"draws": row["ok"], "guide": row["trusted"], "marginals": row["marginals_trusted"]}
    answers = {None: "not checked", False: "no", True: "yes"}
    return ", ".join(f"{name} {answers[answer]}" for name, answer in checked.items())


def numbers(row: Row, own: Row) -> list[str]:
    """The ELBO, of a peer as a difference, and k-hat; or why a peer has none."""
    if "error" in row:
        return [f"ended: {row['error']}", "-"]
    elbo = f"{row['elbo']:.3f} ± {row['elbo_se']:.3f}"
    if row is not own:
        elbo = f"{row['elbo'] - own['elbo']:+.2f}"
    return [elbo, f"{row['khat']:.2f}"]


def table(rows: list[Row]) -> str:
    """A line for each model and guide; the ELBO of peers as a difference."""
    heads = ["model, latents", "guide", "CPU s", "steps", "ELBO", "k-hat", "trusted"]
    lines = []
    for row in (find(rows, model, guide) for model in MODELS for guide in GUIDES):
        if not row:
            continue
        own = find(rows, row["model"], GUIDES[0])
        name, guide, trusted = "", row["guide"], "no verdict"
        if row is own:
            name = f"{MODELS[row['model']][0]}, {row['latents']}"
            guide, trusted = f"`{row['chosen']}`", is_trusted(row)
        cells = [name, guide, f"{row['seconds']:.1f}", f"{row['steps']:,}", *numbers(row, own)]
        lines.append([*cells, trusted])
    return pages.table(heads, lines)


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_names("models", MODELS)
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--limit", type=float, default=15.0, help="CPU seconds of a peer at most")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    own, *peers = (
        [{"model": model, "guide": guide} for model in options.models] for guide in GUIDES
    )
    rows = runs.collect(options.results, own, fitted)

    def by_peer(run: Row) -> Row:
        """For as long as `fit` took, within the limit."""
        return by_svi(run, min(find(rows, run["model"], GUIDES[0])["seconds"], options.limit))

    asked = [run for of_guide in peers for run in of_guide if run["guide"] in options.guides]
    parser.show(table(runs.collect(options.results, asked, by_peer)), options)


if __name__ == "__main__":
    main()
