# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Hierarchies of nested plates with normal latents and known scales, and their exact posteriors.

Students are in classes in schools, and repeated measures in subjects. Each model is of all data if its batch
size is that of all data.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

NUM_SCHOOLS, NUM_CLASSES, NUM_STUDENTS = 20, 3, 6
NUM_SUBJECTS, NUM_TIMES = 40, 6
NUM_GROUPS, GROUP_BATCH = 130, 40
TIMES = [-1.0, -0.6, -0.2, 0.2, 0.6, 1.0]
Model = Callable[..., object]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def scores() -> Tensor:
    """Scores of students ``(schools, classes, students)``."""
    u = 0.7 * torch.randn(NUM_SCHOOLS, 1, 1, generator=(generator := _generator()))
    v = 0.5 * torch.randn(NUM_SCHOOLS, NUM_CLASSES, 1, generator=generator)
    noise = torch.randn(NUM_SCHOOLS, NUM_CLASSES, NUM_STUDENTS, generator=generator)
    return 1 + u + v + noise


def student_rows(is_balanced: bool = True) -> tuple[Tensor, Tensor]:
    """The class of each student, and the score; in classes of equal sizes, or of up to 15 students."""
    y = scores().flatten()
    index = torch.arange(NUM_SCHOOLS * NUM_CLASSES).repeat_interleave(NUM_STUDENTS)
    if not is_balanced:
        weights = torch.arange(1.0, 1 + NUM_SCHOOLS * NUM_CLASSES)
        index = torch.multinomial(weights, len(y), replacement=True, generator=_generator())
    return index, y


def by_school(y: Tensor) -> None:
    """Batches of whole schools."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", NUM_SCHOOLS, subsample_size=len(y), dim=-3):
        u = pyro.sample("u", dist.Normal(mean, 0.7))
        _classes(u, y)


def _classes(u: Tensor, y: Tensor) -> None:
    students = pyro.plate("students", NUM_STUDENTS, dim=-1)
    with pyro.plate("classes", NUM_CLASSES, dim=-2):
        v = pyro.sample("v", dist.Normal(u, 0.5))
        with students:
            pyro.sample("y", dist.Normal(v, 1.0), obs=y)


def by_student(index: Tensor, y: Tensor, size: int = 0, is_centred: bool = False) -> None:
    """Batches of students, who index classes; effects of classes are added to those of schools."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", NUM_SCHOOLS):
        u = pyro.sample("u", dist.Normal(0.0, 0.7))
    with pyro.plate("classes", NUM_SCHOOLS * NUM_CLASSES):
        v = pyro.sample("v", dist.Normal(0.0, 0.5))
    with pyro.plate("students", size or len(scores().flatten()), subsample_size=len(y)):
        loc = mean + u[..., index // NUM_CLASSES] + v[..., index]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y - y.mean() if is_centred else y)


def by_student_in_nested_plates(index: Tensor, y: Tensor) -> None:
    """The same, with classes in plates of schools."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", NUM_SCHOOLS, dim=-2):
        u = pyro.sample("u", dist.Normal(mean, 0.7))
        with pyro.plate("classes", NUM_CLASSES, dim=-1):
            v = pyro.sample("v", dist.Normal(u, 0.5))
    with pyro.plate("students", len(scores().flatten()), subsample_size=len(y)):
        pyro.sample("y", dist.Normal(v.flatten(-2)[..., index], 1.0), obs=y)


def by_student_centred(index: Tensor, y: Tensor) -> None:
    """The same, with classes that index schools."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", NUM_SCHOOLS):
        u = pyro.sample("u", dist.Normal(mean, 0.7))
    school = torch.arange(NUM_SCHOOLS).repeat_interleave(NUM_CLASSES)
    with pyro.plate("classes", NUM_SCHOOLS * NUM_CLASSES):
        v = pyro.sample("v", dist.Normal(u[..., school], 0.5))
    with pyro.plate("students", len(scores().flatten()), subsample_size=len(y)):
        pyro.sample("y", dist.Normal(v[..., index], 1.0), obs=y)


def subsampled_schools(y: Tensor, size: int = 8) -> None:
    """The model draws the schools of a batch itself."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("schools", NUM_SCHOOLS, subsample_size=size, dim=-3):
        u = pyro.sample("u", dist.Normal(mean, 0.7))
        _classes(u, pyro.subsample(y, event_dim=0))


def measures() -> Tensor:
    """Repeated measures ``(subjects, times)``."""
    a = 2 + 0.8 * torch.randn(NUM_SUBJECTS, 1, generator=(generator := _generator()))
    b = 0.5 + 0.5 * torch.randn(NUM_SUBJECTS, 1, generator=generator)
    noise = 0.6 * torch.randn(NUM_SUBJECTS, NUM_TIMES, generator=generator)
    return a + b * torch.tensor(TIMES) + noise


def measure_rows() -> tuple[Tensor, Tensor, Tensor]:
    """The subject, the time and the measure of each row."""
    subject = torch.arange(NUM_SUBJECTS).repeat_interleave(NUM_TIMES)
    return subject, torch.tensor(TIMES).repeat(NUM_SUBJECTS), measures().flatten()


def by_measure(subject: Tensor, time: Tensor, y: Tensor) -> None:
    """Batches of measures, with an intercept and a slope for each subject."""
    mean_a = pyro.sample("mean_a", dist.Normal(0.0, 3.0))
    mean_b = pyro.sample("mean_b", dist.Normal(0.0, 3.0))
    with pyro.plate("subjects", NUM_SUBJECTS):
        a = pyro.sample("a", dist.Normal(mean_a, 0.8))
        b = pyro.sample("b", dist.Normal(mean_b, 0.5))
    with pyro.plate("rows", NUM_SUBJECTS * NUM_TIMES, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(a[..., subject] + b[..., subject] * time, 0.6), obs=y)


def by_measure_correlated(subject: Tensor, time: Tensor, y: Tensor) -> None:
    """The same, with a bivariate normal."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    lower = torch.tensor([[0.8, 0.0], [-0.4, 0.3]])
    with pyro.plate("subjects", NUM_SUBJECTS):
        both = pyro.sample("both", dist.MultivariateNormal(mean, scale_tril=lower))
    with pyro.plate("rows", NUM_SUBJECTS * NUM_TIMES, subsample_size=len(y)):
        own = both[..., subject, :]
        pyro.sample("y", dist.Normal(own[..., 0] + own[..., 1] * time, 0.6), obs=y)


def by_subject(y: Tensor) -> None:
    """Batches of subjects with all of their measures."""
    mean_a = pyro.sample("mean_a", dist.Normal(0.0, 3.0))
    mean_b = pyro.sample("mean_b", dist.Normal(0.0, 3.0))
    times = pyro.plate("times", NUM_TIMES, dim=-1)
    with pyro.plate("subjects", NUM_SUBJECTS, subsample_size=len(y), dim=-2):
        a = pyro.sample("a", dist.Normal(mean_a, 0.8))
        b = pyro.sample("b", dist.Normal(mean_b, 0.5))
        with times:
            pyro.sample("y", dist.Normal(a + b * torch.tensor(TIMES), 0.6), obs=y)


def subsampled_measures(subject: Tensor, time: Tensor, y: Tensor, size: int = 60) -> None:
    """An intercept for each of the first 20 subjects; the model draws rows itself."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("subjects", 20):
        a = pyro.sample("a", dist.Normal(mean, 0.8))
    with pyro.plate("rows", len(y), subsample_size=size) as row:
        loc = a[..., subject[row]] + 0.5 * time[row]
        pyro.sample("y", dist.Normal(loc, 0.6), obs=y[row])


def group_means() -> Tensor:
    return 3 + 1.4 * torch.randn(NUM_GROUPS, generator=_generator())


def subsampled_groups(y: Tensor, size: int = GROUP_BATCH, is_joined: bool = False) -> None:
    """A latent for each group; the model draws groups itself.

    :param is_joined: whether a group depends on the one before in the batch, against what the plate says.
    """
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("groups", NUM_GROUPS, subsample_size=size):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        loc = z + 0.5 * z.roll(1, -1) if is_joined else z
        pyro.sample("y", dist.Normal(loc, 1.0), obs=pyro.subsample(y, event_dim=0))


class Moments(NamedTuple):
    """Means and sds by site, the covariance of all latents, and the log evidence."""

    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    covariance: Tensor
    log_evidence: float


def exact(model: Model, *data: Tensor) -> Moments:
    """The posterior of a model of all data that is jointly normal, from derivatives at zero."""
    torch.set_default_dtype(torch.float64)
    try:
        data = tuple(each.double() if each.is_floating_point() else each for each in data)
        trace = poutine.trace(model).get_trace(*data)
        names = [n for n in trace.stochastic_nodes if not _is_plate(trace.nodes[n])]
        shapes = {name: trace.nodes[name]["value"].shape for name in names}

        def log_joint(z: Tensor) -> Tensor:
            parts = z.split([shape.numel() for shape in shapes.values()])
            values = {n: part.reshape(shape) for (n, shape), part in zip(shapes.items(), parts)}
            at = poutine.condition(model, values)
            return torch.as_tensor(poutine.trace(at).get_trace(*data).log_prob_sum())

        zero = torch.zeros(sum(shape.numel() for shape in shapes.values()), requires_grad=True)
        (gradient,) = torch.autograd.grad(log_joint(zero), zero)
        precision = -torch.autograd.functional.hessian(log_joint, zero)
        covariance = precision.inverse()
        mean, sizes = covariance @ gradient, [shape.numel() for shape in shapes.values()]
        log_det = precision.logdet() - len(zero) * math.log(2 * math.pi)
        evidence = float(log_joint(mean.detach()) - 0.5 * log_det)
        both = mean.split(sizes), covariance.diagonal().sqrt().split(sizes)
        means, sds = ({n: p.reshape(shapes[n]) for n, p in zip(names, parts)} for parts in both)
        return Moments(means, sds, covariance, evidence)
    finally:
        torch.set_default_dtype(torch.float32)


def _is_plate(node: dict) -> bool:
    return type(node["fn"]).__name__ == "_Subsample"
