# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Whether the exact answers of coverage_models.py are right, by the models alone, without this package.

The latents that data were drawn with are draws of the posterior given these data. So the mean of
(latent - exact mean) / exact sd over data sets is 0, and that of its square 1; where moments are few, in
the same family with lighter tails. And draws of the prior, weighted by the likelihood, are draws of a
posterior: where enough of them count, they say what its means and sds are.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import coverage_models as models
import pyro
import torch
from coverage_regressions import conjugate
from coverage_subjects import Family, Subject
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

_LIGHT = (12.0, 24.0)
_LIGHTER = {
    "conjugate": partial(conjugate, _LIGHT),
    "students": partial(models.students, _LIGHT),
    "cauchy": partial(models.students, _LIGHT),
    "joint_student": partial(models.joint_student, _LIGHT),
    "pairs": partial(models.pairs, _LIGHT),
}
_NUM_DRAWS, _MIN_ESS = 200_000, 1_000
_MOST = 4.5  #: standard errors, of some hundred numbers


class Checked(NamedTuple):
    """How far means and sds (or mean squares) are off in standard errors, and by how much of an sd."""

    what: str
    mean: float
    sd: float
    noise: float

    @property
    def is_right(self) -> bool:
        return max(abs(self.mean), abs(self.sd)) < _MOST


def by_truths(family: str, num_data_sets: int) -> Checked:
    """By latents that data were drawn with."""
    make: Callable[[], Family] = _LIGHTER.get(family, models.FAMILIES[family])
    means, squares = [], []
    for i in range(num_data_sets):
        subject = models.subject(f"{family}_{i}", make)
        errors = torch.cat(
            [
                ((latent - subject.moments[name].mean) / subject.moments[name].sd).reshape(-1)
                for name, latent in subject.latents.items()
            ]
        )
        # latents of one data set depend on each other
        means.append(errors.mean())
        squares.append(errors.square().mean() - 1)
    mean, square = torch.stack(means), torch.stack(squares)
    ses = [value.std() / num_data_sets**0.5 for value in (mean, square)]
    what = f"{family}, {num_data_sets:,} data sets"
    return Checked(
        what, (mean.mean() / ses[0]).item(), (square.mean() / ses[1]).item(), max(ses).item()
    )


def weighted_prior(subject: Subject) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of the prior on the unconstrained space, and the weights of the data."""
    with pyro.plate("draws", _NUM_DRAWS, dim=-3):
        trace = poutine.trace(subject.model).get_trace(*subject.args)
    trace.compute_log_prob()
    data = trace.nodes["y"]["log_prob"].reshape(_NUM_DRAWS, -1).sum(1)
    draws = {}
    for name in subject.moments:
        node = trace.nodes[name]
        latent = biject_to(node["fn"].support).inv(node["value"])
        draws[name] = latent.reshape(_NUM_DRAWS, -1)
    return draws, data.softmax(0)


def by_weights(name: str) -> Checked | None:
    """By draws of the prior, where these are enough."""
    subject = models.subject(name)
    if not subject.has_data:
        return None
    draws, weights = weighted_prior(subject)
    ess = 1 / weights.square().sum()
    if ess < _MIN_ESS:
        return None
    worst = [0.0, 0.0]
    for site, (mean, sd) in subject.moments.items():
        error = (draws[site] - mean.reshape(-1)) / sd.reshape(-1)
        for i, value in enumerate((error, error.square() - 1)):
            found = weights @ value
            noise = (weights.square() @ (value - found).square()).sqrt()
            worst[i] = max(worst[i], (found / noise).abs().max().item())
    return Checked(f"{name}, ESS {ess:,.0f}", worst[0], worst[1], ess.item() ** -0.5)


def checks(num_data_sets: int = 500) -> Iterator[Checked]:
    for family in models.FAMILIES:
        yield by_truths(family, num_data_sets)
    for name in models.MODELS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = by_weights(name)
        if found is not None:
            yield found


def check() -> None:
    """Prints how far the exact answers are off.

    :raises RuntimeError: if one is wrong.
    """
    wrong = []
    for found in checks():
        print(
            f"{found.what:40} means {found.mean:5.2f} se, sds {found.sd:5.2f} se, "
            f"of {found.noise:.4f}",
            flush=True,
        )
        if not found.is_right:
            wrong.append(found.what)
    if wrong:
        raise RuntimeError(f"expected exact moments, got others of {wrong}")
