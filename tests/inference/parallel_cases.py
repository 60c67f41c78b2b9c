# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits that are shared by processes: run as a module in each of them, with the names of cases."""

import math
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, distributed
from torch.utils.data import DataLoader

from pyro_artransform import AutoAmortized, AutoStructuredFlow
from pyro_artransform._base import processes as parallel
from pyro_artransform.inference import all_batches
from pyro_artransform.inference.all_batches import full_data_density
from pyro_artransform.inference.initialization.natural_gradient import fit_gaussian
from pyro_artransform.inference.loader import BatchStream
from pyro_artransform.model import LogJoint
from pyro_artransform.model.coordinates.centering import non_centered
from pyro_artransform.model.elements import ElementTerms
from pyro_artransform.model.graphs.dependencies import value_and_gradient
from tests.inference import loaders, models
from tests.inference.conftest import quick_fit, with_step_size
from tests.inference.loaders import rows, shuffled, small

RANK = int(os.environ.get("RANK", "0"))
SOME = {"num_particles": 4, "progress": False}
Outcome = dict[str, Any]


def outcome(result: Any) -> Outcome:
    """What has to be the same in all processes: the parameters, and the result but for guide and model."""
    store = pyro.get_param_store()
    fields = dict(vars(result))
    del fields["guide"], fields["model"]
    for name in ("importance", "marginals", "elements", "chains", "judged"):
        fields[name] = repr(fields[name])
    return {"parameters": [store[name].tolist() for name in sorted(store.keys())], **fields}


def smoke() -> Outcome:
    """The second process is late at a step, and stops both of them."""
    told = []

    def callback(step: int, elbo: float) -> bool:
        told.append(step)
        time.sleep(0.5 * (RANK == 1 and step == 3))
        return RANK == 1 and step == 5

    parallel._PATIENCE = 0.2
    options = {"num_particles": 31, "num_steps": 8, "callback": callback, "seed": 1}
    found = outcome(quick_fit(models.regression, small(models.regression), **options))
    return {**found, "told": told, "is_closed": not distributed.is_initialized()}


def fails() -> None:
    """The second process has an error of its own."""

    def callback(step: int, elbo: float) -> None:
        if RANK == 1 and step == 2:
            raise ZeroDivisionError("of the second process")

    quick_fit(models.location, small(models.location), num_steps=4, callback=callback, **SOME)


def amortized(model: Any) -> AutoAmortized:
    return AutoAmortized(model, loaders.Mean(), flow=None, local_flow=None)


def hierarchy() -> Outcome:
    """43 groups in 9 batches, the last of them short: the processes take turns at having five of them."""
    loader = shuffled(rows()[1], batch_size=5)
    numbers = {**with_step_size(0.04), "optimization.minibatches._NUM_DRAWS": 4000}
    options = {**SOME, "num_particles": 8, "epochs": 40, "numbers": numbers}
    return outcome(quick_fit(loaders.groups, amortized(loaders.groups), loader=loader, **options))


def other_guides() -> dict[str, Outcome]:
    """One of Pyro's, one with a graph, one that scales its steps by the size of a batch, a decoder's."""
    batches = {"loader": rows()[1].split(10)}
    cases = {
        "stock": (models.regression, AutoNormal, {}),
        "structured": (models.gaussian, AutoStructuredFlow, {}),
        "amortized": (loaders.groups, amortized, batches),
        "decoder": (models.Decoder(), small, {}),
    }
    found = {}
    for name, (model, kind, options) in cases.items():
        pyro.clear_param_store()
        found[name] = outcome(quick_fit(model, guide=kind(model), num_steps=6, **SOME, **options))
    return found


def skipped() -> Outcome:
    """The model of the second process fails twice; it reads a tensor, also if its operations are replayed."""
    odd = torch.zeros(())

    def model() -> None:
        models.location()
        pyro.factor("odd", 1 * odd)

    def callback(step: int, elbo: float) -> None:
        odd.fill_(math.nan if RANK == 1 and step in (3, 5) else 0.0)

    with pyro.validation_enabled(False):
        options = {**SOME, "num_steps": 8, "seed": 1, "callback": callback}
        return outcome(quick_fit(model, small(model), **options))


ROWS, NUM_USERS, NUM_ITEMS = 400, 20, 35


def ratings(user: Tensor, item: Tensor, y: Tensor) -> None:
    """Users and items in crossed plates, with a scale of users."""
    if RANK == 1 and AILMENT:
        raise ZeroDivisionError(AILMENT[0])
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("users", NUM_USERS):
        a = pyro.sample("a", dist.Normal(mean, scale))
    with pyro.plate("items", NUM_ITEMS):
        b = pyro.sample("b", dist.Normal(0.0, 0.7))
    with pyro.plate("rows", ROWS, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(a[..., user] + b[..., item], 0.5), obs=y)


AILMENT: list[str] = []  # why the model fails in the second process


def rated() -> DataLoader[Any]:
    """Batches of 60 rows; the last has 40."""
    generator = torch.Generator().manual_seed(0)
    user = torch.randint(NUM_USERS, (ROWS,), generator=generator)
    item = torch.randint(NUM_ITEMS, (ROWS,), generator=generator)
    y = (user % 5 - item % 3) / 2 + 0.5 * torch.randn(ROWS, generator=generator)
    return shuffled(user, item, y.double(), batch_size=60)


def passes(log_joint: LogJoint, stream: BatchStream) -> Any:
    """All that a fit needs of all data, to be computed in the first process."""
    density = full_data_density(log_joint, stream)
    terms = ElementTerms.of(density, density.parts, stream.processes)

    def found() -> list[list[Any]]:
        given = non_centered(density)
        generator = torch.Generator().manual_seed(0)
        z = 0.3 * torch.randn(6, density.latents.latent_dim, generator=generator)
        gaussian = fit_gaussian(density, terms)[0]
        mapped = value_and_gradient(given, z)
        values = density.checked(z, torch.zeros(6))[0], *value_and_gradient(density, z), *mapped
        moments = gaussian.loc, gaussian.precision.times(z.T), gaussian.sd
        return [value.tolist() for value in (*values, *moments)]

    return found


def shares() -> dict[str, Any]:
    """Each of two processes evaluates its own batches; and one of them all."""
    pyro.set_rng_seed(0)  # as a fit does
    with parallel.open_processes() as processes, patch(f"{all_batches.__name__}._ROWS", 100):
        whole = BatchStream(rated())
        log_joint = LogJoint(ratings, *next(whole.one_pass(1)))
        by_one = passes(log_joint, whole)()
        stream = whole.share(processes, 0)
        by_two = passes(log_joint, stream)
        found = {"by one": by_one, "by two": processes.first("numbers", by_two)}
        AILMENT.append("of the second process")
        with suppress(RuntimeError):
            processes.first("an error", by_two)
        AILMENT.clear()
        again = processes.first("numbers", by_two)
        held = [len(batch.args[-1]) for batch in stream.all_batches]
        return {**found, "again": again, "rows": processes.gather("rows", held)}


def crossed() -> Outcome:
    """A guide that starts at the Gaussian of all data, and takes a few steps."""
    return outcome(quick_fit(ratings, loader=rated(), num_steps=5, seed=1, progress=False))


def chains() -> Outcome:
    """Chains of the first process, with all data at each gradient."""
    model, loader = loaders.regression, shuffled(*rows())
    result = quick_fit(model, small(model), loader=loader, draws=50, progress=False)
    return {**outcome(result), "draws": {k: v.tolist() for k, v in result.draws.items()}}


def error_of(**options: Any) -> str:
    model, args = options.pop("model", models.regression), options.pop("args", ())
    try:
        quick_fit(model, small(model), *args, **{**SOME, "num_steps": 5, **options})
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors() -> dict[str, str]:
    order = shuffled(*rows(), generator=torch.Generator().manual_seed(RANK))
    return {
        "options": error_of(num_steps=5 + RANK),
        "data": error_of(args=(models.data() + RANK,)),
        "order": error_of(model=loaders.regression, loader=order),
    }


MORE = {f.__name__: f for f in (hierarchy, other_guides, skipped, errors, crossed, chains)}
CASES = {"smoke": smoke, "fails": fails, "shares": shares, **MORE}


def main() -> None:
    """Runs cases, one after the other, and leaves what they return in a file of this process."""
    folder, *names = sys.argv[1:]
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = {}
    for name in names:
        pyro.clear_param_store()
        torch.manual_seed(RANK)
        found[name] = CASES[name]()
    torch.save(found, Path(folder) / f"process {RANK}.pt")


if __name__ == "__main__":
    main()
