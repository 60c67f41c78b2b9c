# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What bugs.py compares with: moments by long runs of NumPyro's NUTS or by quadrature, into a file.

    python benchmarks/bugs_reference.py [MODEL ...] [--what reference nuts]

`reference` are moments of all latents in unconstrained coordinates: logs of
positive ones, logits of those in an interval. Long runs have effects of groups non-centred. `nuts` times
NUTS with its own settings on the models as they are written: CPU seconds of one chain, compiling included,
until the worst latent has 400 effective draws.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import numpy as np
import numpyro
import torch
from measuring.clock import Record
from measuring.nuts import CHUNK, blocks, least_ess, long_run
from measuring.references import Row, stored, write
from models import bugs
from models.library import in_numpyro
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.handlers import reparam
from numpyro.infer.reparam import LocScaleReparam
from torch import Tensor

from pyro_artransform.model import LogJoint

REFERENCE = Path(__file__).parent / "bugs_reference.json"
#: of the long runs
NUM_CHAINS, NUM_WARM_UP, NUM_DRAWS = 4, 3000, 10_000
THINNED = {"lsat": 4}
WHAT = ["reference", "nuts"]
STEP = 0.1  # of grids of log precisions
#: effects of groups that a long run moves as white noise
NON_CENTERED = {
    "seeds": ("b",),
    "surgical": ("b",),
    "magnesium": ("theta",),
    "salm": ("lambda",),
    "equiv": ("delta",),
    "epil": ("b1", "b"),
    "blocker": ("delta", "delta_new"),
    "oxford": ("b",),
    "kidney": ("b",),
    "leukfr": ("b",),
}
#: coefficients of correlated columns, with a covariance of their own in a long run
DENSE = {
    "salm": [("alpha", "beta", "gamma")],
    "kidney": [("alpha", "beta_age", "beta_sex", "beta_disease", "r")],
    "mice": [("beta", "r")],
}
#: draws of NUTS as it is: of the warm-up, between looks; and the most CPU seconds
WARM_UP, EVERY, LIMIT = 1000, 500, 300.0


def subject(name: str) -> tuple[LogJoint, tuple[np.ndarray, ...]]:
    """The density by Pyro, and arguments for NumPyro."""
    model, data = bugs.subject(name)
    return LogJoint(model, data), tuple(np.asarray(value) for value in data)


def peer(name: str) -> Any:
    return bugs.subject(name, in_numpyro())[0]


def draws_of(name: str) -> dict[str, np.ndarray]:
    """Draws of all latents by a long run."""
    log_joint, data = subject(name)
    sites = NON_CENTERED.get(name, ())
    model = reparam(peer(name), config=dict.fromkeys(sites, LocScaleReparam(0)))
    sizes = {"num_warmup": NUM_WARM_UP, "num_samples": NUM_DRAWS, "num_chains": NUM_CHAINS}
    sizes["thinning"] = THINNED.get(name, 1)
    found, _ = long_run(model, data, 1, sizes, dense_mass=DENSE.get(name, False))
    return {site: found[site] for site in log_joint.latents.sites}


def unconstrained(log_joint: LogJoint, draws: dict[str, np.ndarray]) -> np.ndarray:
    """Draws `(chains, draws, latents)`."""
    values = {site: torch.tensor(of_site).flatten(0, 1) for site, of_site in draws.items()}
    count = len(next(iter(draws.values())))
    return log_joint.latents.unconstrain(values).unflatten(0, (count, -1)).numpy()


def by_columns(fn: Any, z: np.ndarray) -> np.ndarray:
    """Of a few latents at once, for memory."""
    parts = range(0, z.shape[2], CHUNK)
    return np.concatenate([np.asarray(fn(z[..., at : at + CHUNK])) for at in parts])


def by_nuts(name: str) -> Row:
    """Moments with their standard errors by a long run."""
    log_joint, _ = subject(name)
    z = unconstrained(log_joint, draws_of(name))
    ess, rhat = (by_columns(fn, z) for fn in (effective_sample_size, split_gelman_rubin))
    mean, sd = z.mean((0, 1)), z.std((0, 1))
    squares = (z - mean) ** 2
    se = squares.std((0, 1)) / np.sqrt(by_columns(effective_sample_size, squares)) / (2 * sd)
    moments = {"mean": mean, "sd": sd, "mean_se": sd / np.sqrt(ess), "sd_se": se}
    found = {"by": "NUTS", "rhat": round(float(rhat.max()), 5), "ess": round(float(ess.min()))}
    return found | {"sites": by_site(log_joint, moments)}


def by_site(log_joint: LogJoint, moments: dict[str, np.ndarray]) -> Row:
    """Numbers of latents, by site and by name of the moment."""
    sites: Row = {site: {} for site in log_joint.latents.sites}
    for key, values in moments.items():
        for site, part in log_joint.latents.split(torch.tensor(values)).items():
            sites[site][key] = [float(f"{value:.5g}") for value in part.flatten().tolist()]
    return sites


class Linear(NamedTuple):
    """Data that are Gaussian, with linear means, given the two precisions, in the order of a model's sites.

    Columns are those of coefficients with known sds and of effects with the precision of groups; rows of
    `to_sites` make the model's other latents of them.
    """

    y: Tensor
    columns: Tensor
    sds: list[float]
    to_sites: Tensor
    order: list[str]
    of_groups: tuple[float, float]  #: the range of the log precision of groups
    noise: tuple[float, float]


def dyes() -> Linear:
    (y,) = bugs.dyes()[1]
    count, size = y.shape
    columns = torch.eye(count).repeat_interleave(size, 0)
    columns = torch.cat([torch.ones(len(columns), 1), columns], 1)
    to_sites = torch.eye(count + 1)
    to_sites[1:, 0] = 1.0
    order = ["theta", "mu", "tau_btw", "tau_with"]
    return Linear(y.flatten(), columns, [1e5], to_sites, order, (-22.0, 12.0), (-12.0, -4.0))


def equiv() -> Linear:
    treatment, period, y = bugs.equiv()[1]
    fixed = torch.stack([torch.ones_like(y), treatment / 2, (period / 2).expand_as(y)], -1)
    columns = [fixed.flatten(0, 1), torch.eye(len(y)).repeat_interleave(y.shape[1], 0)]
    order = ["mu", "phi", "pi", "delta", "tau2", "tau1"]
    to_sites, ranges = torch.eye(len(y) + 3), ((-12.0, 12.0), (-4.0, 10.0))
    return Linear(y.flatten(), torch.cat(columns, 1), [1e3] * 3, to_sites, order, *ranges)


def by_quadrature(name: str) -> Row:
    """Moments on a grid of the logs of both precisions."""
    log_joint, _ = subject(name)
    model = {"dyes": dyes, "equiv": equiv}[name]()
    of_groups = torch.arange(*model.of_groups, STEP)
    total, sums, highest = torch.tensor(0.0), torch.tensor(0.0), None
    for noise in torch.arange(*model.noise, STEP):
        log_density, mean, variance = given_precisions(model, of_groups, noise)
        highest = log_density.max() if highest is None else highest
        weights = (log_density - highest).exp()
        z = torch.cat([mean, of_groups[:, None], noise.expand(len(of_groups), 1)], 1)
        variance = torch.cat([variance, torch.zeros(len(z), 2)], 1)
        total = total + weights.sum()
        sums = sums + torch.stack([weights @ z, weights @ (z**2 + variance)])
    first, second = sums / total
    parts = zip(("mean", "sd"), (first, (second - first**2).sqrt()))
    sizes = [log_joint.latents.sites[site].size for site in model.order]
    found: Row = {"by": "quadrature", "sites": {site: {} for site in model.order}}
    for key, values in parts:
        for site, part in zip(model.order, values.split(sizes)):
            found["sites"][site] |= {
                key: [float(f"{value:.6g}") for value in part.tolist()],
                f"{key}_se": [0.0] * len(part),
            }
    return found


def given_precisions(
    model: Linear, of_groups: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The log density of logs of precisions, and means and variances of the other latents."""
    num_effects = model.columns.shape[1] - len(model.sds)
    known = torch.tensor([sd**-2 for sd in model.sds]).expand(len(of_groups), -1)
    prior = torch.cat([known, of_groups.exp()[:, None].expand(-1, num_effects)], 1)
    tau = noise.exp()
    precision = prior.diag_embed() + tau * model.columns.T @ model.columns
    factor = torch.linalg.cholesky(precision)
    rhs = (tau * model.columns.T @ model.y).expand(len(prior), -1)[..., None]
    mean = torch.cholesky_solve(rhs, factor)[..., 0]
    log_density = 0.5 * prior.log().sum(1) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
    residual = model.y - mean @ model.columns.T
    exponent = tau * residual.square().sum(1) + (prior * mean**2).sum(1)
    log_density = log_density + 0.5 * len(model.y) * noise - 0.5 * exponent
    for log_precision in (of_groups, noise):
        log_density = log_density + 1e-3 * log_precision - 1e-3 * log_precision.exp()
    covariance = model.to_sites @ torch.cholesky_inverse(factor) @ model.to_sites.T
    return log_density, mean @ model.to_sites.T, covariance.diagonal(dim1=1, dim2=2)


def timed(name: str, reference: Row) -> Row:
    """NUTS of one chain with its own settings, until the worst latent has enough effective draws."""
    log_joint, data = subject(name)
    record, draws = Record(LIMIT), list[dict[str, Any]]()
    for number, block in enumerate(blocks(peer(name), data, 0, WARM_UP, EVERY)):
        if number * EVERY < WARM_UP:
            continue
        with record.paused():
            draws.append({site: block.sites[site] for site in log_joint.latents.sites})
            chain = {site: np.concatenate([z[site] for z in draws])[None] for site in draws[0]}
            flat = unconstrained(log_joint, chain)
        if record.note_ess(len(flat[0]), lambda: least_ess(flat)):  # noqa: B023
            break
    _, seconds, ess = record.rows[-1]
    row = {"seconds": round(seconds, 1), "ess": round(ess, 1)}
    return row | errors(flat[0], log_joint, reference)


def errors(z: np.ndarray, log_joint: LogJoint, reference: Row) -> Row:
    """The largest ones against the reference: of a mean in sds, and of an sd, relative."""
    columns = {
        key: np.concatenate([reference["sites"][site][key] for site in log_joint.latents.sites])
        for key in ("mean", "sd")
    }
    mean = np.abs(z.mean(0) - columns["mean"]) / columns["sd"]
    sd = np.abs(z.std(0) / columns["sd"] - 1)
    return {"mean": round(float(mean.max()), 3), "sd": round(float(sd.max()), 3)}


def store(name: str, row: Row) -> None:
    rows = stored(REFERENCE)
    rows[name] = rows.get(name, {}) | row
    write(REFERENCE, rows, bugs.EXAMPLES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *bugs.EXAMPLES], default=[])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    options = parser.parse_args()
    numpyro.enable_x64()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    for name in options.models or bugs.EXAMPLES:
        if "reference" in options.what:
            began = time.process_time()
            store(name, (by_quadrature if name in ("dyes", "equiv") else by_nuts)(name))
            row = {key: value for key, value in stored(REFERENCE)[name].items() if key != "sites"}
            print(name, row, round(time.process_time() - began), "s", flush=True)
        if "nuts" in options.what:
            store(name, {"nuts": timed(name, stored(REFERENCE)[name])})
            print(name, stored(REFERENCE)[name]["nuts"], flush=True)


if __name__ == "__main__":
    main()
