# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits that are shared by processes: run as a module in each of them, with the names of cases."""

import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from torch import distributed

from pyro_artransform import AutoAmortized, AutoStructuredFlow
from pyro_artransform.inference import parallel
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


def smoke(folder: Path) -> Outcome:
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


def fails(folder: Path) -> None:
    """The second process has an error of its own."""

    def callback(step: int, elbo: float) -> None:
        if RANK == 1 and step == 2:
            raise ZeroDivisionError("of the second process")

    quick_fit(models.location, small(models.location), num_steps=4, callback=callback, **SOME)


def amortized(model: Any) -> AutoAmortized:
    return AutoAmortized(model, loaders.Mean(), flow=None, local_flow=None)


def hierarchy(folder: Path) -> Outcome:
    """43 groups in 9 batches, the last of them short: the processes take turns at having five of them."""
    loader = shuffled(rows()[1], batch_size=5)
    numbers = {**with_step_size(0.04), "optimization.minibatches._NUM_DRAWS": 4000}
    options = {**SOME, "num_particles": 8, "epochs": 40, "numbers": numbers}
    return outcome(quick_fit(loaders.groups, amortized(loaders.groups), loader=loader, **options))


def other_guides(folder: Path) -> dict[str, Outcome]:
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


def skipped(folder: Path) -> Outcome:
    """The model of the second process fails twice."""
    steps = [0]

    def model() -> None:
        models.location()
        bad = RANK == 1 and steps[0] in (3, 5)
        pyro.factor("odd", torch.tensor(math.nan if bad else 0.0))

    def callback(step: int, elbo: float) -> None:
        steps[0] = step

    with pyro.validation_enabled(False):
        options = {**SOME, "num_steps": 8, "seed": 1, "callback": callback}
        return outcome(quick_fit(model, small(model), **options))


def resumed(folder: Path) -> Outcome:
    """A fit that was stopped at the end of an epoch goes on from the file of the first process."""
    found, path = {}, folder / "fit.pt"
    stop = {"callback": lambda step, elbo: step == 3, "checkpoint": path}
    for name, options in {"part": stop, "rest": {"resume": path}}.items():
        pyro.clear_param_store()
        model, loader = loaders.regression, shuffled(*rows())
        given = {**SOME, "num_steps": 12, "loader": loader, **options}
        found[name] = outcome(quick_fit(model, small(model), **given))
    return found


def error_of(**options: Any) -> str:
    model, args = models.regression, options.pop("args", ())
    try:
        quick_fit(model, small(model), *args, **{**SOME, "num_steps": 5, **options})
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors(folder: Path) -> dict[str, str]:
    return {
        "options": error_of(num_steps=5 + RANK),
        "data": error_of(args=(models.data() + RANK,)),
        "checkpoint": error_of(resume=folder / "missing.pt"),
    }


MORE = {case.__name__: case for case in (hierarchy, other_guides, skipped, resumed, errors)}
CASES = {"smoke": smoke, "fails": fails, **MORE}


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
        found[name] = CASES[name](Path(folder))
    torch.save(found, Path(folder) / f"process {RANK}.pt")


if __name__ == "__main__":
    main()
