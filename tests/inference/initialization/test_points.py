# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import torch
from pyro import distributions as dist

from pyro_artransform.inference.initialization.points import starting_points
from pyro_artransform.joint import LogJoint
from tests.inference import models


def test_starts_with_home_and_the_median():
    log_joint = LogJoint(models.regression)
    home = torch.tensor([5.0, 2.0])
    points = starting_points(log_joint, models.regression, home, 12)
    assert points.shape == (12, 2)
    assert torch.equal(points[0], home)
    assert torch.equal(points[1], log_joint.start)
    assert len({tuple(point) for point in points.tolist()}) == 12
    assert (points - home).norm(dim=-1).max() > 4


def test_few():
    log_joint = LogJoint(models.regression)
    for count in (1, 2, 3):
        points = starting_points(log_joint, models.regression, torch.zeros(2), count)
        assert len(points) == count


def test_draws_of_the_prior():
    def model():
        pyro.sample("z", dist.Normal(1000.0, 1.0))

    points = starting_points(LogJoint(model), model, torch.zeros(1), 12)
    assert ((points - 1000).abs() < 10).sum() >= 3


def test_points_without_a_density_are_drawn_home():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 100.0))
        pyro.factor("near", torch.where(z.abs() < 1, 0 * z, torch.nan * z))

    log_joint = LogJoint(model)
    points = starting_points(log_joint, model, torch.full((1,), 0.5), 12)
    assert len(points) == 12
    assert log_joint(points).isfinite().all()


def test_no_density_anywhere():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("nowhere", z * torch.nan)

    assert starting_points(LogJoint(model), model, torch.zeros(1), 5).shape == (0, 1)


def test_improper_prior_and_discrete_sites():
    model = models.two_modes(2, 4.0, 0.5)
    points = starting_points(LogJoint(model), model, torch.zeros(2), 12)
    assert points.shape == (12, 2)
    points = starting_points(LogJoint(models.mixture), models.mixture, torch.zeros(2), 6)
    assert points.shape == (6, 2)
