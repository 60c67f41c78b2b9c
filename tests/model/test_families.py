# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A prior is mapped only where its density is known: the density in coordinates is the model's as written."""

import itertools
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from torch.distributions import biject_to, constraints

from pyro_artransform.model import LogJoint
from pyro_artransform.model.coordinates.centering import non_centered
from pyro_artransform.model.coordinates.coordinates import Coordinates
from pyro_artransform.model.coordinates.families import PriorScale
from pyro_artransform.sampling import mcmc

MASK = torch.tensor([True, False, True])
# units in the last place, of sums and of quantiles
_ROUND_OFF = 1e4


def _pairs(m):
    return torch.stack([m, -m], -1)


def _tril(s):
    return torch.stack([torch.stack([s, 0 * s], -1), torch.stack([s - 1, s + 1], -1)], -2)


def _mvn(m, s):
    return dist.MultivariateNormal(_pairs(m), scale_tril=_tril(s))


def _transformed(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


@pytest.fixture(autouse=True)
def _without_validation():
    """Sites in no plate have batch dimensions here, which Pyro's validation refuses."""
    pyro.enable_validation(False)


#: all that are mapped, of a location m and a scale s that depend on latents
FAMILIES = {
    "Normal": dist.Normal,
    "LogNormal": dist.LogNormal,
    "StudentT": partial(dist.StudentT, 3.0),
    "Laplace": dist.Laplace,
    "Cauchy": dist.Cauchy,
    "Gumbel": dist.Gumbel,
    "Logistic": dist.Logistic,
    "SoftLaplace": dist.SoftLaplace,
    "HalfNormal": lambda m, s: dist.HalfNormal(s),
    "HalfCauchy": lambda m, s: dist.HalfCauchy(s),
    "Exponential": lambda m, s: dist.Exponential(s),
    "Gamma": lambda m, s: dist.Gamma(2.0, s),
    "InverseGamma": lambda m, s: dist.InverseGamma(2.0, s),
    "Uniform": lambda m, s: dist.Uniform(torch.zeros_like(m), 2.0),
    "MultivariateNormal": _mvn,
    "exp of MultivariateNormal": lambda m, s: _transformed(_mvn(m, s), T.ExpTransform()),
    "affine": lambda m, s: _transformed(dist.Normal(0 * m, 1.0), T.AffineTransform(m, -s)),
    "mirrored StudentT": lambda m, s: _transformed(
        dist.StudentT(3.0, 0 * m, 1.0), T.AffineTransform(m, -s)
    ),
    "exp of affine": lambda m, s: _transformed(
        dist.Laplace(0 * m, 1.0), T.AffineTransform(m, s), T.ExpTransform()
    ),
}


def as_it_is(make, m, s):
    return pyro.sample("z", make(m, s))


def of(change):
    """A form that changes the distribution."""
    return lambda make, m, s: pyro.sample("z", change(make(m, s)))


def under(handler):
    """A form with a handler around the site."""

    def form(make, m, s):
        with handler():
            return as_it_is(make, m, s)

    return form


def in_plate(make, m, s, **options):
    with pyro.plate("groups", **{"size": 3, **options}):
        return as_it_is(make, m, s)


def beside_others(make, m, s):
    """Beside a site that is conditioned, one that is hidden, and a factor."""

    def others():
        with poutine.block(hide=["hidden"]):
            pyro.sample("hidden", dist.Normal(0.0, 1.0))
        return pyro.sample("other", dist.Normal(m, s).to_event(1))

    poutine.condition(others, {"other": m})()
    z = as_it_is(make, m, s)
    pyro.factor("beside", -0.1 * torch.tanh(z).sum())
    return z


def replaced(name, change):
    """A form with an attribute of the instance in the place of the class's."""

    def changed(fn):
        setattr(fn, name, change(getattr(fn, name)))
        return fn

    return of(changed)


def subclass(**methods):
    """Changes the class of a distribution to one of the user's."""

    def changed(fn):
        parent = type(fn)
        fn.__class__ = type(parent)("Own", (parent,), {"parent": parent, **methods})
        return fn

    return changed


def half_log_prob(self, value):
    return 0.5 * self.parent.log_prob(self, value)


def half_rsample(self, sample_shape=()):
    return 0.5 * self.parent.rsample(self, sample_shape)


def expand(fn):
    return dist.ExpandedDistribution(fn, (2, 3)).to_event(2)


def of_no_transform(fn):
    return dist.TransformedDistribution(fn, [])


#: of which the density is known
MAPPED = {
    "plain": as_it_is,
    "plate": in_plate,
    "subsample": partial(in_plate, size=6, subsample=torch.arange(3)),
    "expand": lambda make, m, s: pyro.sample("z", make(m, s).expand([2, 3]).to_event(2)),
    "ExpandedDistribution": of(expand),
    "to_event": of(lambda fn: fn.to_event(1)),
    "validate_args": replaced("_validate_args", lambda _: False),
    "infer": lambda make, m, s: pyro.sample("z", make(m, s), infer={"is_auxiliary": True}),
    "poutine.scale": under(partial(poutine.scale, scale=0.3)),
    "poutine.mask of a proper prior": under(partial(poutine.mask, mask=MASK)),
    "condition of another": beside_others,
}
own = subclass(log_prob=half_log_prob)
#: with another density than the family's, or one that is not known to be the family's
AS_WRITTEN = {
    "mask(True)": of(lambda fn: fn.mask(True)),
    "mask(False)": of(lambda fn: fn.mask(False)),
    "mask": of(lambda fn: fn.mask(MASK)),
    "mask, to_event": of(lambda fn: fn.mask(MASK).to_event(1)),
    "to_event, mask": of(lambda fn: fn.to_event(1).mask(False)),
    "mask, expanded": of(lambda fn: expand(fn.mask(MASK))),
    "mask by a latent": lambda make, m, s: pyro.sample("z", make(m, s).mask(m > 0)),
    "mask as a base": of(lambda fn: of_no_transform(fn.mask(MASK))),
    "poutine.mask(False)": under(partial(poutine.mask, mask=False)),
    "log_prob of the instance": replaced("log_prob", lambda f: lambda value: 0.5 * f(value)),
    "subclass": of(own),
    "subclass, expanded": of(lambda fn: expand(own(fn))),
    "subclass, to_event": of(lambda fn: own(fn).to_event(1)),
    "subclass as a base": of(lambda fn: of_no_transform(own(fn))),
    "subclass of a wrapper": of(lambda fn: own(fn.to_event(1))),
    "subclass with a sampler": of(subclass(rsample=half_rsample)),
    "subclass of the same density": of(subclass()),
}


def model_of(family, form, dtype=torch.float64):
    def model():
        zeros = torch.zeros(3, dtype=dtype)
        m = pyro.sample("m", dist.Normal(zeros[0], 1.0))
        s = pyro.sample("s", dist.LogNormal(zeros[0], 0.5))
        return {**MAPPED, **AS_WRITTEN}[form](FAMILIES[family], m + zeros, s + zeros)

    return model


def check_map(family, form, dtype, centered=None, with_location=True):
    """The density, the inverse and the log-determinant of the map against the density as written.

    Lambda is random for each element unless it is given.
    """
    written = LogJoint(model_of(family, form, dtype))
    # one without parents has coordinates where others depend on latents
    assert written.mapped_sites().get("z") or family == "Uniform", (family, form)
    ones = torch.ones_like(written.start)
    generator = torch.Generator().manual_seed(1)
    lam = torch.rand(len(ones), dtype=dtype, generator=generator) if centered is None else centered
    mapped = Coordinates(written.latents, {"z": with_location}, lam * ones, 0.7 * ones)
    density = written.with_coordinates(mapped)
    x = 0.7 * torch.randn(3, len(ones), dtype=dtype, generator=torch.Generator().manual_seed(3))
    u, ladj = density.to_unconstrained(x)
    back, inverse_ladj = density.from_unconstrained(u)
    jacobian = torch.autograd.functional.jacobian(
        lambda v: density.to_unconstrained(v[None])[0][0], x[0]
    )
    slack = _ROUND_OFF * torch.finfo(dtype).eps
    close = partial(torch.allclose, rtol=slack, atol=slack)
    assert u.dtype == dtype
    assert close(density.start, density.from_unconstrained(written.start[None])[0][0])
    assert close(density(x), written(u) + ladj), (family, form, centered)
    assert close(back, x), (family, form, centered)
    assert close(inverse_ladj, -ladj), (family, form, centered)
    assert close(torch.linalg.slogdet(jacobian)[1], ladj[0]), (family, form, centered)


@pytest.mark.parametrize(
    ("family", "form", "with_location"),
    [
        *((name, "plate", flag) for name in FAMILIES for flag in (True, False)),
        *itertools.product(["Normal", "HalfCauchy"], MAPPED, [True]),
    ],
)
def test_a_density_in_coordinates_is_the_one_as_written(family, form, with_location):
    check_map(family, form, torch.float64, with_location=with_location)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centered", [0.0, 0.5, 1.0])
def test_all_forms_of_all_families_are_as_written(family, dtype, centered):
    for form in MAPPED:
        check_map(family, form, dtype, centered)


@pytest.mark.parametrize("form", AS_WRITTEN)
@pytest.mark.parametrize(
    "family",
    [each if each == "Normal" else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES],
)
def test_a_model_with_other_densities_has_no_coordinates(family, form):
    assert LogJoint(model_of(family, form)).mapped_sites() == {}


class Bent(T.AffineTransform):
    """With a log-determinant of its own."""

    def log_abs_det_jacobian(self, x, y):
        return super().log_abs_det_jacobian(x, y) + 1.0


class Squared(T.ExpTransform):
    def _call(self, x):
        return super()._call(2 * x)


def with_own(part, name, value):
    setattr(part, name, value)
    return part


ONE = torch.ones(3)
NORMAL = partial(dist.Normal, ONE, ONE)
ATTACKS = {
    "support of an instance": lambda: with_own(NORMAL(), "support", constraints.positive),
    "no rsample": lambda: NORMAL().has_rsample_(False),
    "log_prob of a base": lambda: _transformed(
        with_own(NORMAL(), "log_prob", lambda value: value), T.ExpTransform()
    ),
    "log_prob in an expanded one": lambda: dist.ExpandedDistribution(
        with_own(NORMAL(), "log_prob", lambda value: value), (2, 3)
    ),
    "an affine transform's own Jacobian": lambda: _transformed(NORMAL(), Bent(ONE, ONE)),
    "an exponential of twice": lambda: _transformed(NORMAL(), Squared()),
    "a method of a transform": lambda: _transformed(
        NORMAL(), with_own(T.AffineTransform(ONE, ONE), "_inverse", lambda y: y)
    ),
    "softplus": lambda: _transformed(NORMAL(), T.SoftplusTransform()),
    "exponential before affine": lambda: _transformed(
        NORMAL(), T.ExpTransform(), T.AffineTransform(ONE, ONE)
    ),
    "exponential twice": lambda: _transformed(NORMAL(), T.ExpTransform(), T.ExpTransform()),
    "a mirrored Gumbel": lambda: _transformed(dist.Gumbel(ONE, ONE), T.AffineTransform(ONE, -ONE)),
    "a user's transformed distribution": lambda: subclass()(_transformed(NORMAL())),
    "a user's expanded distribution": lambda: subclass()(expand(NORMAL())),
    "Pyro's subclass of Gamma": lambda: dist.Chi2(ONE),
    "an affine Weibull": lambda: dist.Weibull(ONE, ONE),
    "masked inside and outside": lambda: expand(NORMAL().mask(MASK)).mask(True),
    "a mixture": lambda: dist.MaskedMixture(MASK, NORMAL(), NORMAL()),
    "a point": lambda: dist.Delta(ONE),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_may_have_another_density_has_no_scale(attack):
    assert PriorScale.of(ATTACKS[attack]()) is None


def test_a_matrix_that_no_density_reads_is_not_read():
    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        fn = dist.MultivariateNormal(torch.zeros(2), scale_tril=s[..., None, None] * torch.eye(2))
        fn.scale_tril = 2 * fn.scale_tril
        pyro.sample("z", fn)

    written = LogJoint(model)
    x = torch.randn(3, 3)
    density = non_centered(written)
    u, ladj = density.to_unconstrained(x)
    assert density.coordinates is not None
    assert torch.allclose(density(x), written(u) + ladj)


def test_another_bijection_of_positive_numbers_is_not_taken_for_the_exponential(monkeypatch):
    written = LogJoint(model_of("LogNormal", "plain"))
    assert written.mapped_sites() == {"z": True}
    softplus = {type(constraints.positive): lambda _: T.SoftplusTransform()}
    monkeypatch.setattr(biject_to, "_registry", {**biject_to._registry, **softplus})
    assert LogJoint(model_of("LogNormal", "plain")).mapped_sites() == {}


LOW, HIGH = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 5.0, 0.5])
OF_VECTORS = {
    "Pareto": (lambda: dist.Pareto(torch.tensor([0.5, 1.0, 20.0]), 3.0), False),
    "Pareto with an event dimension": (lambda: dist.Pareto(HIGH, 3.0).to_event(1), True),
    "Uniform": (lambda: dist.Uniform(LOW, HIGH), False),
    "Uniform from zero": (lambda: dist.Uniform(torch.zeros(3), HIGH), False),
    "Uniform with an event dimension": (lambda: dist.Uniform(LOW, HIGH).to_event(1), True),
}


@pytest.mark.parametrize("name", OF_VECTORS)
def test_bounds_of_vectors(name):
    """Beside a hierarchy, whose coordinates leave the density as written."""
    make, is_event = OF_VECTORS[name]

    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("groups", 3):
            x = pyro.sample("x", dist.Normal(0.0, s))
            z = x if is_event else pyro.sample("z", make())
            pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.ones(3))
        if is_event:
            pyro.sample("z", make())

    pyro.enable_validation(True)
    written = LogJoint(model)
    density = non_centered(written, with_shapes=True)
    assert density.coordinates is not None
    x = torch.randn(5, 7)
    u, ladj = density.to_unconstrained(x)
    assert torch.allclose(density(x), written(u) + ladj)
    if name == "Uniform":
        chains = mcmc(model, draws=20, seed=0, progress=False)
        assert chains.trusted, chains
        assert make().support.check(chains.draws["z"]).all()
