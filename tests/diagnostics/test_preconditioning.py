# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics.chains import (
    PulledBack,
    Stretched,
    guide_transform,
    misjudged_directions,
)
from pyro_artransform.joint import LogJoint


def gaussian(precision):
    """A Gaussian posterior of this precision, in the base space of the identity."""
    dim = len(precision)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1).mask(False))
        pyro.factor("density", -((z @ precision) * z).sum(-1) / 2)

    return PulledBack(LogJoint(model), lambda x: (x, torch.zeros(len(x))))


def directions(dim, count):
    return torch.linalg.qr(torch.randn(dim, count)).Q


def test_stretched_and_back():
    axes, factors, x = directions(6, 2), torch.tensor([10.0, 0.1]), torch.randn(5, 6)
    stretched = Stretched(axes, factors)
    assert torch.allclose(stretched(x) @ axes, (x @ axes) * factors)
    rest = torch.eye(6) - axes @ axes.T
    assert torch.allclose(stretched(x) @ rest, x @ rest)
    assert torch.allclose(stretched.inverse(stretched(x)), x)


def test_nothing_is_stretched_where_the_guide_is_right():
    found = misjudged_directions(gaussian(torch.eye(50)), torch.randn(32, 50))
    assert found.directions.shape == (50, 0)
    x = torch.randn(3, 50)
    assert torch.equal(found(x), x)


def test_wide_and_narrow_directions_are_found():
    """Two among 300, one a hundred times too wide and one ten times too narrow."""
    axes = directions(300, 2)
    change = torch.tensor([1e-4, 100.0]) - 1
    precision = torch.eye(300) + axes @ change.diag() @ axes.T
    found = misjudged_directions(gaussian(precision), torch.randn(32, 300))
    assert torch.allclose(found.factors.sort().values, torch.tensor([0.1, 100.0]), rtol=1e-3)
    # what is left is a standard normal
    image = found(torch.eye(300))
    assert torch.allclose(image @ precision @ image.T, torch.eye(300), atol=1e-3)


def test_points_without_a_density_are_left_out():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 2.0).to_event(1))
        pyro.factor("edge", torch.where(z[..., 0] > 3, torch.nan, 0.0))

    target = PulledBack(LogJoint(model), lambda x: (x, torch.zeros(len(x))))
    points = torch.randn(32, 4)
    points[0, 0] = 3.5
    found = misjudged_directions(target, points)
    assert torch.allclose(found.factors, torch.tensor(2.0))


def _model():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_transforms_of_guides():
    """The density that a transform gives is the guide's."""
    for make in (AutoIAF, AutoDiagonalNormal, AutoMultivariateNormal):
        guide = make(_model, init_scale=0.5)
        guide()
        transform, x = guide_transform(guide, (), {}), torch.randn(7, 3)
        latent, ladj = transform(x)
        assert latent.shape == (7, 3)
        expected = guide.get_posterior().log_prob(latent)
        assert torch.allclose(dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - ladj, expected)


def test_guides_without_a_transform():
    for make in (AutoNormal, AutoLowRankMultivariateNormal):
        guide = make(_model)
        guide()
        assert guide_transform(guide, (), {}) is None
    assert guide_transform(_model, (), {}) is None
