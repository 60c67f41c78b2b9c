# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate, reparam
from pyro.infer.autoguide import init_to_feasible
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import Adam

from pyro_artransform.guides import AutoAmortized, AutoIAF, AutoStructuredFlow
from pyro_artransform.guides.prototype import SiteShape
from pyro_artransform.joint import LogJoint
from tests.guides import models


def refuses(model, message, *args):
    guide = AutoIAF(model, hidden_dims=8)
    for _ in range(2):
        # the second call must not find half a guide
        with pytest.raises(ValueError, match=message):
            guide(*args)


@pytest.mark.parametrize(
    "fn",
    [dist.Categorical(torch.ones(3)), dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)],
    ids=lambda fn: type(fn).__name__,
)
def test_discrete_latent(fn):
    def model():
        pyro.sample("z", dist.Normal(0, 1))
        pyro.sample("k", fn)

    refuses(model, r"site 'k' is discrete.*config_enumerate\(model\).*hide=\['k'\]")


def test_enumerated_and_hidden_latents_are_left_alone():
    for model in (
        config_enumerate(models.mixture),
        config_enumerate(models.mixture, default="sequential"),
        poutine.block(models.mixture, hide=["kind"]),
        poutine.block(config_enumerate(models.mixture), hide=["kind"]),
    ):
        assert set(AutoIAF(model, hidden_dims=8)(models.data())) == {"locs", "probs"}


@pytest.mark.parametrize(
    ("fn", "support"),
    [
        (lambda a: dist.Uniform(0.0, a), "interval"),
        (lambda a: dist.Pareto(a * torch.ones(3), 2.0).to_event(1), "independent"),
    ],
)
def test_support_that_depends_on_a_latent(fn, support):
    """F28. The site and its two supports are in the message."""

    def model():
        a = pyro.sample("a", dist.LogNormal(0, 1))
        pyro.sample("b", fn(a))

    refuses(model, f"(?i)support of site 'b' depends on other latents: .*{support}.* a fixed scale")


def test_supports_that_depend_on_data_or_chance_are_fine():
    def model(values):
        upper = values.max() + torch.rand(())
        a = pyro.sample("a", dist.Uniform(values.min(), upper))
        with pyro.plate("data", len(values), subsample_size=3) as index:
            pyro.sample("obs", dist.Normal(a, 1), obs=values[index])
            lowest = values[index].min()
        pyro.sample("b", dist.Uniform(lowest - 1.0, 10.0))

    assert set(AutoIAF(model, hidden_dims=8)(models.data())) == {"a", "b"}


def test_sites_that_come_and_go():
    def model():
        a = pyro.sample("a", dist.Normal(0, 1e-6))
        if a < 1e-3:
            pyro.sample("b", dist.Normal(0, 1))

    refuses(model, "site 'b' is there for some values of the other latents only")


def test_shape_that_depends_on_a_latent():
    def model():
        a = pyro.sample("a", dist.Normal(0, 1e-6))
        pyro.sample("b", dist.Normal(torch.zeros(1 + int(a > 1e-3)), 1).to_event(1))

    refuses(model, r"shape of site 'b' depends on other latents: .*\(1,\) and \(2,\)")


def test_subsampled_plate():
    """F24: Pyro's guides are off by 21.5 nats here and say nothing."""

    def model():
        pyro.sample("global", dist.Normal(0, 1))
        with pyro.plate("items", 20, subsample_size=5):
            pyro.sample("z", dist.Normal(0, 1))

    refuses(
        model, r"site 'z' is in the sub-sampled plate 'items' \(5 of 20\).*AutoAmortized\(model, "
    )


def test_starting_value_outside_the_support():
    def model():
        pyro.sample("s", dist.HalfNormal(1.0))

    guide = AutoIAF(model, init_loc_fn=lambda site: torch.zeros(()))
    with pytest.raises(ValueError, match=r"site 's': expected a starting value inside .* got 0\.0"):
        guide()


def test_an_error_of_pyro_stays_pyros():
    with pytest.raises(RuntimeError, match="found no latent variables"):
        AutoIAF(models.no_latents)(models.data())


def test_latents_in_a_sequential_plate():
    def sequential():
        for i in pyro.plate("loop", 2):
            pyro.sample(f"z{i}", dist.Normal(0, 1))

    guide = AutoIAF(sequential)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"'z0' is in the sequential plate 'loop'.* range\(2\)"
        ):
            guide()


def test_other_shapes_of_the_latents():
    """A batch of one would broadcast, and give a wrong loss and no sign of it."""
    guide = AutoIAF(models.locals_of)
    guide(models.data())
    for other in (models.data()[:1], models.data()[:3], models.data().repeat(2)):
        with pytest.raises(ValueError, match=rf"site 'z': .* \(8,\), .* \({len(other)},\)"):
            guide(other)
        guide(models.data())
    guide()
    pyro.enable_validation(False)
    guide(models.data()[:1])


def test_other_shapes_run_the_model_once():
    runs = []

    def model(values, scale=None):
        runs.append(len(values))
        models.regression(values)

    guide = AutoIAF(model)
    guide(models.data())
    runs.clear()
    for values in (models.data(), models.data()[:3], models.data()[:3], models.data()):
        guide(values)
        guide(values, scale=None) if len(runs) > 5 else None
    assert runs == [3, 8]


def test_the_prototype_holds_neither_data_nor_graph():
    scale = torch.ones((), requires_grad=True)

    def model(values):
        pyro.sample("a", dist.Normal(0, 2 * scale))
        pyro.sample("b", dist.Uniform(-(scale**2), values.max()))

    guide = AutoIAF(model)
    guide(models.data())
    assert list(guide.prototype_trace.nodes) == ["a", "b"]
    for site in guide.prototype_trace.nodes.values():
        assert isinstance(site["fn"], SiteShape)
        assert not site["value"].requires_grad
    support = guide.prototype_trace.nodes["b"]["fn"].support
    assert not support.lower_bound.requires_grad
    assert support.upper_bound.item() == pytest.approx(3.1)


@pytest.mark.parametrize("kind", [AutoIAF, AutoAmortized])
def test_improper_priors_start_at_the_origin(kind):
    def model(values):
        fn = dist.ImproperUniform(dist.constraints.positive, torch.Size(), torch.Size([2]))
        scale = pyro.sample("scale", fn)
        with pyro.plate("data", len(values)):
            loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (8,), ()))
            pyro.sample("obs", dist.Normal(loc, scale.sum()), obs=values)

    torch.set_default_device(None)  # after which older PyTorch cannot name it
    guide = kind(model, init_scale=1e-6)
    draw = guide(models.data())
    assert torch.allclose(draw["scale"], torch.ones(2), atol=1e-4)
    assert torch.allclose(draw["loc"], torch.zeros(8), atol=1e-4)
    assert math.isfinite(SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(models.data()))


def test_a_support_that_cannot_be_mapped():
    """PyTorch says that it is an interval up to infinity, and draws would be NaN."""

    def model():
        pyro.sample("z", dist.GeneralizedPareto(torch.zeros(()), torch.ones(()), 0.2))

    with pytest.raises(ValueError, match=r"site 'z': expected a support .* got Interval"):
        AutoIAF(model).sample_posterior(3)


REPARAMETERIZED = {
    "a direction": (
        dist.ProjectedNormal(torch.tensor([2.0, 0.0])),
        reparam.ProjectedNormalReparam(),
    ),
    "stable": (dist.Stable(1.5, 0.5), reparam.LatentStableReparam()),
    "a simplex": (
        dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(3)),
        reparam.GumbelSoftmaxReparam(),
    ),
    "two parts": (
        dist.Normal(torch.zeros(4), 1.0).to_event(1),
        reparam.SplitReparam([1, 3], -1),
    ),
    "by itself": (dist.Gamma(2.0, 1.0), reparam.AutoReparam()),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, AutoIAF) for name in REPARAMETERIZED), ("a direction", AutoStructuredFlow)],
)
def test_a_site_that_a_reparameterization_replaces(name, kind):
    """Its own support does not matter, as that of a direction, onto which there is no bijection."""
    fn, handler = REPARAMETERIZED[name]

    def original():
        pyro.sample("z", fn)

    is_strategy = isinstance(handler, reparam.strategies.Strategy)
    model = poutine.reparam(original, config=handler if is_strategy else {"z": handler})
    started = InitMessenger(init_to_feasible)(model)
    latents = poutine.trace(started).get_trace().stochastic_nodes
    guide = kind(model)
    assert guide().keys() == set(latents)
    assert math.isfinite(SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step())


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (dist.Wishart(torch.tensor(5.0), torch.eye(2)), "with a bijection .* LKJCholesky"),
        (
            dist.MixtureSameFamily(
                dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)
            ),
            "with a bijection .* a mixture as a Categorical",
        ),
        (dist.ProjectedNormal(torch.zeros(2)), "with a bijection .* with ProjectedNormalReparam"),
        (dist.Delta(torch.ones(2)).to_event(1), r"is a Delta.* pyro.deterministic\('z', ...\)"),
    ],
    ids=lambda fn: type(fn).__name__,
)
@pytest.mark.filterwarnings("ignore:Singular sample detected")
def test_a_latent_without_a_density_on_the_reals(fn, message):
    def model():
        pyro.sample("z", fn)

    refuses(model, f"site 'z'.* {message}")
    with pytest.raises(ValueError, match=f"site 'z'.* {message}"):
        LogJoint(model)
