# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Fits that are shared by processes: run as a module in each of them, with the names of cases."""

import math
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import distributed

from pyro_artransform import AutoAmortized, AutoIAF, AutoStructuredFlow
from pyro_artransform.inference.config import EvaluationConfig, FitConfig
from tests.guides.amortized.hierarchies import minibatch
from tests.inference import loaders, models
from tests.inference.conftest import QUICK, quick_fit
from tests.inference.loaders import listed, rows, shuffled, small

RANK = int(os.environ.get("RANK", "0"))
SOME = {"num_particles": 4, "progress": False}
EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
OFTEN = replace(QUICK, optimization=replace(QUICK.optimization, checkpoint_every=5))

Outcome = dict[str, Any]


def outcome(result: Any) -> Outcome:
    """What has to be the same in all processes: the parameters, and the result but for the guide."""
    store = pyro.get_param_store()
    parameters = {name: store[name].detach().clone() for name in sorted(store.keys())}
    fields = {name: value for name, value in vars(result).items() if name != "guide"}
    if result.importance is not None:
        fields["importance"] = result.importance.log_weights
    if result.marginals is not None:
        fields["marginals"] = vars(result.marginals)
    return {"parameters": parameters, **fields}


def eight_schools() -> None:
    """In the non-centred form, whose posterior is easy."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        unit = pyro.sample("unit", dist.Normal(0.0, 1.0))
        effects, errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)
        pyro.sample("y", dist.Normal(mu + tau * unit, errors), obs=effects)


def schools(folder: Path) -> Outcome:
    guide, config = AutoIAF(eight_schools), FitConfig(evaluation=EvaluationConfig(num_samples=4001))
    options = {"num_steps": 200, "num_particles": 31, "seed": 1, "progress": True}
    return outcome(quick_fit(eight_schools, guide, config=config, **options))


def hierarchy(folder: Path) -> Outcome:
    """43 groups in batches of 5: a share has 22 of them, one of which is in both."""
    _, y = rows()
    guide = AutoAmortized(loaders.groups, loaders.Mean(), flow=None, local_flow=None)
    optim = partial(torch.optim.Adam, lr=0.04)
    options = {**SOME, "num_particles": 8, "seed": 0, "optim": optim, "epochs": 40}
    result = quick_fit(loaders.groups, guide, loader=shuffled(y, batch_size=5), **options)
    return outcome(result)


def batches_of_a_list(folder: Path) -> Outcome:
    """Five batches: two processes take turns at having three of them in an epoch."""
    guide = small(loaders.regression)
    options = {**SOME, "num_particles": 16, "epochs": 80, "seed": 0}
    return outcome(quick_fit(loaders.regression, guide, loader=listed(*rows()), **options))


def short_batch(folder: Path) -> Outcome:
    """One process has the short one, by which the guide would scale its steps otherwise."""
    guide = AutoAmortized(loaders.groups, loaders.Mean(), flow=None, local_flow=None)
    _, y = rows()
    return outcome(quick_fit(loaders.groups, guide, loader=y.split(10), num_steps=9, **SOME))


def walk() -> None:
    """Few dependencies for each of its steps."""
    z = pyro.sample("z", dist.Normal(torch.zeros(6), 3.0).to_event(1))
    pyro.factor("steps", -(z[1:] - z[:-1]).square().sum() - z.cos().sum())


def other_guides(folder: Path) -> dict[str, Outcome]:
    """One of Pyro's with an optimizer of the user's, one with a graph, one that is chosen, a decoder's."""
    cases = {
        "stock": (models.regression, AutoNormal, {"optim": ClippedAdam({"lr": 0.01})}),
        "structured": (walk, AutoStructuredFlow, {}),
        "chosen": (models.regression, lambda model: None, {}),
        "decoder": (models.Decoder(), small, {}),
        "its own mini-batches": (partial(minibatch, models.data()), AutoAmortized, {}),
    }
    found = {}
    for name, (model, kind, options) in cases.items():
        pyro.clear_param_store()
        given = {**SOME, "num_steps": 6, "guide": kind(model), **options}
        found[name] = outcome(quick_fit(model, **given))
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


def stopped(folder: Path) -> Outcome:
    """Only the second process has a callback."""
    callback = stop_at(4) if RANK == 1 else None
    options = {**SOME, "num_steps": 30, "callback": callback}
    return outcome(quick_fit(models.regression, small(models.regression), **options))


def stopped_when_told(folder: Path) -> Outcome:
    """Callbacks that gather something hear of the same steps; those of the search are told afterwards."""

    def model() -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        loc = pyro.sample("loc", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(3.0))

    told = []

    def callback(step: int, elbo: float) -> bool:
        told.append(step)
        elbos = torch.tensor([elbo])
        distributed.all_reduce(elbos)
        return RANK == 1 and step == 2

    return {**outcome(quick_fit(model, small(model), callback=callback, **SOME)), "told": told}


def stop_at(at: int) -> Callable[[int, float], bool]:
    return lambda step, elbo: step == at


LOADERS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "shuffled": shuffled,
    "list": listed,
    "weighted": loaders.weighted,
}


def resumed(folder: Path) -> dict[str, list[Outcome]]:
    """For each loader a whole fit, and one in two parts."""
    found = {}
    for name, loader in LOADERS.items():
        parts = []
        path = folder / f"{name}.pt"
        for options in ({}, {"callback": stop_at(7), "checkpoint": path}, {"resume": path}):
            pyro.clear_param_store()
            torch.manual_seed(RANK)
            model = models.regression if loader is None else loaders.regression
            batches = {"loader": loader(*rows())} if loader is not None else {}
            seed = {} if "resume" in options else {"seed": 3}
            given = {**SOME, **seed, **batches, **options, "num_steps": 12}
            parts.append(outcome(quick_fit(model, small(model), **given)))
        found[name] = parts
    return found


def no_seed(folder: Path) -> list[Any]:
    """The generators of all processes are as apart afterwards as they were before."""
    torch.manual_seed(RANK)
    histories = []
    for _ in range(2):
        pyro.clear_param_store()
        guide = small(models.regression)
        histories.append(quick_fit(models.regression, guide, num_steps=3, **SOME).history)
    return [*histories, torch.rand(1).item()]


def error_of(**options: Any) -> str:
    model, args = options.pop("model", models.regression), options.pop("args", ())
    try:
        quick_fit(model, small(model), *args, **{**SOME, "num_steps": 5, **options})
    except ValueError as error:
        return str(error)
    return ""


def impossible() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("never", -torch.inf + 0 * loc)


def errors(folder: Path) -> dict[str, str]:
    alone = folder / "alone.pt"
    return {
        "options": error_of(num_steps=5 + RANK),
        "start": error_of(model=impossible),
        "number": error_of(resume=alone) if alone.exists() else "",
        "data": error_of(args=(models.data() + RANK,)),
        "place": error_of(checkpoint=folder / "missing" / "fit.pt"),
    }


def group_of_the_user(folder: Path) -> Outcome:
    """The group is used, and left as it is."""
    place = {"rank": RANK, "world_size": int(os.environ["WORLD_SIZE"])}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", **place)
    found = outcome(quick_fit(models.location, small(models.location), num_steps=3, **SOME))
    assert distributed.is_initialized()
    distributed.destroy_process_group()
    return found


def killed(folder: Path) -> tuple[str, bool]:
    """The second process is killed; the first says what has happened, and whether the group is gone."""
    groups = []

    def kill(step: int, elbo: float) -> None:
        groups[:] = [weakref.ref(distributed.group.WORLD)]
        if step == 7 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    guide = small(models.regression)
    options = {**SOME, "num_steps": 12, "seed": 3, "checkpoint": folder / "killed.pt"}
    try:
        quick_fit(models.regression, guide, callback=kill, config=OFTEN, **options)
    except distributed.DistError as error:
        said = str(error)
    return said, groups[0]() is None


def restarted(folder: Path) -> Outcome:
    """The second process is killed once, and torchrun begins again."""
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    path = folder / "restarted.pt"

    def kill(step: int, elbo: float) -> None:
        if step == 7 and RANK == 1 and is_first:
            os.kill(os.getpid(), signal.SIGKILL)

    options = {**SOME, "num_steps": 12, "seed": 3, "callback": kill, "checkpoint": path}
    resume = None if is_first else path
    guide = small(models.regression)
    return outcome(quick_fit(models.regression, guide, config=OFTEN, resume=resume, **options))


def after_the_kill(folder: Path) -> list[Outcome]:
    """The same fit from its checkpoint, and one that nobody killed."""
    found = []
    for options in ({"resume": folder / "killed.pt"}, {"seed": 3}):
        pyro.clear_param_store()
        guide, given = small(models.regression), {**SOME, "num_steps": 12, **options}
        found.append(outcome(quick_fit(models.regression, guide, config=OFTEN, **given)))
    return found


CASES = {
    "schools": schools,
    "hierarchy": hierarchy,
    "list": batches_of_a_list,
    "short batch": short_batch,
    "other guides": other_guides,
    "skipped": skipped,
    "stopped": stopped,
    "stopped when told": stopped_when_told,
    "resumed": resumed,
    "no seed": no_seed,
    "errors": errors,
    "after the kill": after_the_kill,
    "restarted": restarted,
    "group of the user": group_of_the_user,
    "killed": killed,
}


def main() -> None:
    """Runs cases, one after the other, and leaves what they return in a file of this process."""
    folder, *names = sys.argv[1:]
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(True)
    found = {}
    for name in names:
        pyro.clear_param_store()
        torch.manual_seed(RANK)
        found[name] = CASES[name](Path(folder))
    torch.save(found, Path(folder) / f"process {RANK}.pt")


if __name__ == "__main__":
    main()
