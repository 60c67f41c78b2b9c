# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Verdicts on fits by mini-batches of nested plates, with known answers and planted faults; see nested.md.

    python benchmarks/nested.py [CASE ...] [--seeds 1] [--write]

A guide is right if its ELBO is within 0.15 nats of the exact evidence, up to noise, and all means of latents
are within 0.25 sds and all sds within 15 %, by 4,000 draws. A verdict is right if it trusts the guides that
are, and no fit with a fault. That steps ended at a requested number is no reason for distrust here.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from measuring import pages
from models import nested
from pyro.distributions import Delta, MultivariateNormal
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform import AutoAmortized, fit
from pyro_artransform.diagnostics import Check

_NUM_DRAWS, _MOST_GAP, _MOST_SDS, _MOST_PERCENT = 4000, 0.15, 0.25, 15
_ROUND_OFF = 0.01  # of log densities in float32
AMORTIZED = {"num_steps": 1500, "num_particles": 8}
FEW = {"num_steps": 100, "num_particles": 8}


class Case(NamedTuple):
    """What is fitted, and the model of all data, whose posterior is the answer."""

    model: nested.Model
    options: dict[str, Any]
    answer: nested.Model
    data: tuple[Tensor, ...]
    is_subsampled: bool = False


def batches(data: tuple[Tensor, ...], size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_size=size, shuffle=True, **options)


def of_rows(
    model: nested.Model, data: tuple[Tensor, ...], answer: nested.Model | None = None, **more: Any
) -> Case:
    return Case(model, {"loader": batches(data, 90), **more}, answer or model, data)


def school_features(y: Tensor) -> dict[str, Tensor]:
    return {"schools": y.mean((1, 2))[:, None], "classes": y.mean(2)[..., None]}


def of_other_school(y: Tensor) -> dict[str, Tensor]:
    """Each school has the features of the one before it in the batch."""
    return {name: features.roll(1, 0) for name, features in school_features(y).items()}


def group_feature(y: Tensor) -> Tensor:
    return pyro.subsample(y, event_dim=0)[:, None]


def one_class_wrong(model: nested.Model, data: tuple[Tensor, ...]) -> Callable[..., None]:
    """The exact posterior as a guide, but with class 17 shifted by one sd given all other latents."""
    exact = nested.exact(model, *data)
    places, loc = dict[str, slice](), torch.cat([m.flatten() for m in exact.mean.values()])
    for name, mean in exact.mean.items():
        start = places[next(reversed(places))].stop if places else 0
        places[name] = slice(start, start + mean.numel())
    at = places["v"].start + 17
    loc[at] += exact.covariance.inverse()[at, at].rsqrt()

    def guide(*_: Tensor) -> None:
        moved = loc.float() + 0 * pyro.param("unused", torch.tensor(0.0))
        z = pyro.sample(
            "_all",
            MultivariateNormal(moved, exact.covariance.float()),
            infer={"is_auxiliary": True},
        )
        pyro.sample("mean", Delta(z[..., 0]))
        for name, plate in (("u", "schools"), ("v", "classes")):
            own = z[..., places[name]]
            with pyro.plate(plate, own.shape[-1]):
                pyro.sample(name, Delta(own))

    return guide


def cases() -> dict[str, Callable[[], Case]]:
    """The cases by name; the last ones have a fault."""
    y, rows, measures, groups = (
        nested.scores(),
        nested.student_rows(),
        nested.measure_rows(),
        nested.group_means(),
    )
    few = tuple(each[: 20 * nested.NUM_TIMES] for each in measures)
    schools, students, subjects = nested.by_school, nested.by_student, nested.by_subject

    def amortized(model: nested.Model, encoder: Any, data: Tensor, size: int, **more: Any) -> Case:
        guide = AutoAmortized(model, encoder)
        options = {"guide": guide, "loader": batches((data,), size), **AMORTIZED, **more}
        return Case(model, options, model, (data,))

    def inside(model: nested.Model, whole: nested.Model, *data: Tensor, **more: Any) -> Case:
        return Case(model, more, whole, data, is_subsampled=True)

    all_groups = partial(nested.subsampled_groups, size=nested.NUM_GROUPS)
    joined = partial(nested.subsampled_groups, is_joined=True)
    all_schools = partial(nested.subsampled_schools, size=nested.NUM_SCHOOLS)
    all_measures = partial(nested.subsampled_measures, size=len(few[0]))
    return {
        "classes in schools, batches of schools, encoder": lambda: amortized(
            schools, school_features, y, 8
        ),
        "students index classes and schools": lambda: of_rows(students, rows),
        "students, classes of unequal sizes": lambda: of_rows(students, nested.student_rows(False)),
        "students, plates of classes in schools": lambda: of_rows(
            nested.by_student_in_nested_plates, rows
        ),
        "students, classes given schools": lambda: of_rows(nested.by_student_centred, rows),
        "repeated measures, rows": lambda: of_rows(nested.by_measure, measures),
        "repeated measures, correlated": lambda: of_rows(nested.by_measure_correlated, measures),
        "repeated measures, batches of subjects, encoder": lambda: amortized(
            subjects, lambda y: y, nested.measures(), 10
        ),
        "subsampled groups, embeddings": lambda: inside(
            nested.subsampled_groups, all_groups, groups, **AMORTIZED
        ),
        "subsampled groups, encoder": lambda: inside(
            nested.subsampled_groups,
            all_groups,
            groups,
            guide=AutoAmortized(nested.subsampled_groups, group_feature),
            **AMORTIZED,
        ),
        "subsampled schools with classes": lambda: inside(
            nested.subsampled_schools, all_schools, y, **AMORTIZED
        ),
        "subsampled rows of 20 subjects": lambda: inside(
            nested.subsampled_measures, all_measures, *few
        ),
        "fault: class 17 wrongly placed": lambda: of_rows(
            students, rows, guide=one_class_wrong(students, rows), num_steps=1
        ),
        "fault: a plate of twice the rows": lambda: of_rows(
            partial(students, size=2 * len(rows[0])), rows, students, num_steps=100
        ),
        "fault: batches leave rows out": lambda: Case(
            students,
            {"loader": batches(rows, 100, drop_last=True), "num_steps": 100},
            students,
            rows,
        ),
        "fault: centred within the batch": lambda: of_rows(
            partial(students, is_centred=True), rows, students, num_steps=100
        ),
        "fault: groups depend on each other": lambda: inside(joined, all_groups, groups, **FEW),
        "fault: an encoder sees another school": lambda: amortized(schools, of_other_school, y, 8),
    }


def row(name: str, make: Callable[[], Case], seed: int) -> tuple[bool, list[str]]:
    """Whether the verdict is right, and the cells of the table."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    case = make()
    exact = nested.exact(case.answer, *case.data)
    began, args = time.process_time(), case.data if case.is_subsampled else ()
    result = fit(case.model, *args, seed=seed, progress=False, **case.options)
    took = time.process_time() - began
    draws = draws_of(result.guide, exact, case.data)
    sds, percent = errors(draws, exact)
    below = exact.log_evidence - result.elbo
    is_close = below + 4 * result.elbo_se > -_ROUND_OFF and below < _MOST_GAP + 4 * result.elbo_se
    is_good = is_close and sds < _MOST_SDS and percent < _MOST_PERCENT and "fault" not in name
    failed = [each for each in result.judged.failed if each.check is not Check.CUT_SHORT]
    by_plate = (
        f"{plate}: {int(e.trusted.sum())} of {len(e.gap)}, gap {float(e.gap.max()):.2f}"
        for plate, e in result.elements.items()
    )
    is_right = is_good != bool(failed)
    return is_right, [
        name,
        result.guide_class,
        f"{took:.0f}",
        f"{below:.2f} ± {result.elbo_se:.2f}",
        f"{sds:.2f}",
        f"{percent:.0f}",
        "no" if failed else "yes",
        "yes" if is_right else "**no**",
        "; ".join(by_plate) or "-",
        "; ".join(each.sentence for each in failed).partition(":")[0] or "-",
    ]


def draws_of(guide: Any, exact: nested.Moments, data: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if hasattr(guide, "sample_posterior"):
        return guide.sample_posterior(_NUM_DRAWS, *data)
    runs = [pyro.poutine.trace(guide).get_trace(*data).nodes for _ in range(_NUM_DRAWS)]
    return {name: torch.stack([nodes[name]["value"] for nodes in runs]) for name in exact.mean}


def errors(draws: dict[str, Tensor], exact: nested.Moments) -> tuple[float, float]:
    """The largest error of a mean, in sds, and of an sd, in percent."""
    sds, percent = [0.0], [0.0]
    for name, mean in exact.mean.items():
        found, sd = draws[name].double().reshape(_NUM_DRAWS, -1), exact.sd[name].flatten()
        sds.append(float(((found.mean(0) - mean.flatten()) / sd).abs().max()))
        percent.append(float((100 * (found.std(0) / sd - 1)).abs().max()))
    return max(sds), max(percent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="words in the names of cases; by default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["case", "guide", "CPU s", "below the evidence", "means, sds", "sds, %", "trusted"]
    heads += ["verdict is right", "elements trusted, largest gap", "why not"]
    rows, num_right = list[list[str]](), 0
    for name, make in cases().items():
        if args.cases and not any(word in name for word in args.cases):
            continue
        for seed in range(args.seeds):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                is_right, cells = row(name, make, seed)
            num_right += is_right
            rows.append(cells)
            print(pages.row(cells), flush=True)
    text = f"{pages.table(heads, rows)}\n\n{num_right} of {len(rows)} verdicts are right."
    print(text.splitlines()[-1])
    if args.write:
        pages.write(text, Path(__file__).with_suffix(".md"))


if __name__ == "__main__":
    main()
