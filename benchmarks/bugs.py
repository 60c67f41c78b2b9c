# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Volume 1 of the BUGS examples in their own vague priors, by `mcmc` with nothing set; see bugs.md.

    python benchmarks/bugs.py [MODEL ...] [--seeds N ...] [--dtypes NAME ...] [--write]

Each run is a process of its own. Moments to compare with are those of bugs_reference.json.
"""

import json
import time
import warnings
from itertools import product
from pathlib import Path

import torch
from measuring import pages, runs
from measuring.runs import Row
from models.bugs import EXAMPLES, subject

from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import Chains, mcmc

HERE = Path(__file__).parent
DTYPES = {"float64": torch.float64, "float32": torch.float32}
NUM_DRAWS = 400
#: what the table shows of runs
COLUMNS = {
    "CPU s": ("seconds", "{:.1f}"),
    "gradients": ("gradients", "{:,}"),
    "mean off, s.e.": ("mean_se", "{:.1f}"),
    "mean off, sds": ("mean_sds", "{:.2f}"),
    "sd off": ("sd", "{:.0%}"),
    "R-hat": ("rhat", "{:.3f}"),
    "least ESS": ("ess", "{:.0f}"),
    "trusted": ("trusted", "{}"),
}
HEADS = ["model", "latents", "dtype", *COLUMNS, "NUTS, CPU s", "error or failed checks"]
#: errors of a mean, in sds, and of an sd, relative, beyond which draws are called far off
FAR_MEAN, FAR_SD = 0.2, 0.25


def one(run: Row) -> Row:
    """A run in this process: how far its moments are off, and what it says of itself."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(DTYPES[run["dtype"]])
    model, data = subject(run["model"])
    began = time.process_time()
    try:
        chains = mcmc(model, *data, draws=NUM_DRAWS, seed=run["seed"], progress=False)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        seconds = time.process_time() - began
        text = " ".join(str(error).split())
        return {"seconds": seconds, "error": f"{type(error).__name__}: {text}"}
    seconds = time.process_time() - began
    row: Row = {"seconds": seconds, "gradients": chains.num_gradients, "trusted": chains.trusted}
    row |= {"rhat": chains.max_rhat, "ess": chains.min_ess, "verdict": chains.verdict}
    row["failed"] = sorted({failed.check.name.lower() for failed in chains.failed})
    return row | errors(run["model"], chains)


def errors(name: str, chains: Chains) -> Row:
    """The largest ones of any latent, in unconstrained coordinates, and whose they are."""
    torch.set_default_dtype(torch.float64)
    latents = LogJoint(*subject(name)).latents
    stored, found = reference()[name]["sites"], []
    for site, of_site in latents.sites.items():
        values = chains.by_chain[site].double().flatten(0, 1)
        z = of_site.bijection.inv(values).reshape(len(values), -1)
        truth = {key: torch.tensor(stored[site][key]) for key in ("mean", "sd", "mean_se")}
        off = (z.mean(0) - truth["mean"]).abs()
        ess = chains.ess[site].double().flatten()
        standard_error = (truth["sd"] ** 2 / ess + truth["mean_se"] ** 2).sqrt()
        of_sd = (z.std(0) / truth["sd"] - 1).abs()
        found.append(torch.stack([off / standard_error, off / truth["sd"], of_sd]))
    columns = torch.cat(found, 1).nan_to_num(torch.inf, torch.inf)
    worst = {"mean_se": 0, "mean_sds": 1, "sd": 2}
    row: Row = {key: float(columns[at].max()) for key, at in worst.items()}
    row["worst"] = {key: latents.name_of(int(columns[at].argmax())) for key, at in worst.items()}
    return row


def reference() -> Row:
    return json.loads((HERE / "bugs_reference.json").read_text())


def number_of_latents(name: str) -> int:
    return sum(len(site["mean"]) for site in reference()[name]["sites"].values())


def table(rows: list[Row]) -> str:
    """A row for each model and dtype, with a value of each seed."""
    lines = []
    for name in EXAMPLES:
        for dtype in DTYPES:
            found = runs.known(rows, {"model": name, "dtype": dtype})
            found.sort(key=lambda row: row["seed"])
            if found:
                lines.append([name, number_of_latents(name), dtype, *cells(name, found)])
    return pages.table(HEADS, lines)


def cells(name: str, rows: list[Row]) -> list[str]:
    """Columns of runs of a model in a dtype."""
    values = [
        ", ".join(formatted(row, *of_column) for row in rows) for of_column in COLUMNS.values()
    ]
    whys = dict.fromkeys(why_not(row) for row in rows)
    return [*values, nuts_seconds(name), "; ".join(filter(None, whys))]


def why_not(row: Row) -> str:
    return shortened(row["error"]) if "error" in row else ", ".join(row["failed"])


def formatted(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "-"


def shortened(text: str, most: int = 110) -> str:
    text = text.replace("|", "/")
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nuts_seconds(name: str) -> str:
    """In brackets where its draws are wrong, or fewer than were asked for."""
    nuts = reference()[name]["nuts"]
    is_right = nuts["ess"] >= NUM_DRAWS and nuts["mean"] <= FAR_MEAN and nuts["sd"] <= FAR_SD
    return f"{nuts['seconds']:.1f}" if is_right else f"({nuts['seconds']:.1f})"


def summary(rows: list[Row]) -> str:
    """How many runs are trusted, and which of them are far off."""
    trusted = [row for row in rows if row.get("trusted")]
    far = [row for row in trusted if row["mean_sds"] > FAR_MEAN or row["sd"] > FAR_SD]
    names = ", ".join(f"{row['model']} ({row['dtype']}, seed {row['seed']})" for row in far)
    failed = sum("error" in row for row in rows)
    return (
        f"Of {len(rows)} runs {len(trusted)} are trusted and {failed} end with an error. Of trusted ones "
        f"{len(far)} have a mean off by more than {FAR_MEAN} sds or an sd by more than {FAR_SD:.0%}"
        + (f": {names}." if far else ".")
    )


def main() -> None:
    parser = runs.Parser(__doc__, __file__)
    parser.add_names("models", EXAMPLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    wanted = (
        {"model": name, "dtype": dtype, "seed": seed}
        for name, dtype, seed in product(options.models, options.dtypes, options.seeds)
    )
    rows = runs.collect(options.results, wanted, runs.in_processes(__file__))
    parser.show("\n\n".join([table(rows), summary(rows)]), options)


if __name__ == "__main__":
    main()
