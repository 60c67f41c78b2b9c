# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The models and flows that a guide takes and refuses, at its set-up and later."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import SVI, Trace_ELBO, config_enumerate, reparam
from pyro.infer.autoguide import init_to_feasible, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import Adam
from torch import nn
from torch.distributions import ComposeTransform

from pyro_artransform import affine_autoregressive, conditional_affine_autoregressive, iaf
from pyro_artransform.flows.transforms import AutoregressiveTransform, MonotonicAffineTransform
from pyro_artransform.guides import AutoAmortized, AutoAutoregressive, AutoIAF, AutoStructuredFlow
from pyro_artransform.model import LogJoint
from tests.flows.transforms.metas import Shift
from tests.guides import models
from tests.guides.training import train


def refuses(model, message, *args, error=ValueError, kind=AutoIAF, **options):
    guide = kind(model, **options)
    for _ in range(2):
        # the second call must not find half a guide
        with pytest.raises(error, match=message):
            guide(*args)


def normal(name, scale=1.0):
    return pyro.sample(name, dist.Normal(0.0, scale))


def in_a_sequential_plate():
    for i in pyro.plate("loop", 2):
        normal(f"z{i}")


def in_a_subsampled_plate():
    """F24: Pyro's guides are off by 21.5 nats here and say nothing."""
    with pyro.plate("items", 20, subsample_size=5):
        normal("z")


def comes_and_goes():
    if normal("a", 1e-6) < 1e-3:
        normal("b")


def of_another_shape():
    size = 1 + int(normal("a", 1e-6) > 1e-3)
    pyro.sample("b", dist.Normal(torch.zeros(size), 1).to_event(1))


def of_another_support():
    """F28."""
    pyro.sample("b", dist.Uniform(0.0, pyro.sample("a", dist.LogNormal(0, 1))))


def of_another_support_in_an_event():
    scale = pyro.sample("a", dist.LogNormal(0, 1))
    pyro.sample("b", dist.Pareto(scale * torch.ones(3), 2.0).to_event(1))


def draw(fn):
    return lambda: pyro.sample("z", fn)


BAD_MODELS = [
    (
        draw(dist.Categorical(torch.ones(3))),
        r"'z' is a discrete latent; if it is data, pass it as obs=.* with the data first.*hide=\['z'",
    ),
    (draw(dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)), "'z' is a discrete latent"),
    (of_another_support, "(?i)support of site 'b' depends on other latents: .*interval.* a fixed"),
    (of_another_support_in_an_event, "support of site 'b' depends on other latents: .*Independent"),
    (comes_and_goes, "site 'b' exists only for some values of the other latents"),
    (of_another_shape, r"shape of site 'b' depends on other latents: .*\(1,\) and \(2,\)"),
    (in_a_subsampled_plate, r"'z' is in .* plate 'items' \(5 of 20\).*AutoAmortized\(model, "),
    (in_a_sequential_plate, r"'z0' is in the sequential plate 'loop'.* range\(2\)"),
    # PyTorch says that it is an interval up to infinity, and draws would be NaN
    (
        draw(dist.GeneralizedPareto(torch.zeros(()), torch.ones(()), 0.2)),
        "site 'z': expected a support .* got Interval",
    ),
]


@pytest.mark.parametrize(("model", "message"), BAD_MODELS)
def test_models_that_are_refused(model, message):
    refuses(model, message)


def test_starting_value_outside_the_support():
    message = r"site 'z': expected a starting value inside .* got 0\.0"
    refuses(draw(dist.HalfNormal(1.0)), message, init_loc_fn=lambda site: torch.zeros(()))


def test_an_error_of_pyro_stays_pyros():
    with pytest.raises(RuntimeError, match="found no latent variables"):
        AutoIAF(models.no_latents)(models.data())


def test_enumerated_and_hidden_latents_are_left_alone():
    for model in (
        config_enumerate(models.mixture),
        config_enumerate(models.mixture, default="sequential"),
        poutine.block(models.mixture, hide=["kind"]),
    ):
        assert set(AutoIAF(model, hidden_dims=8)(models.data())) == {"locs", "probs"}


def test_supports_that_depend_on_data_or_chance_are_fine():
    def model(values):
        a = pyro.sample("a", dist.Uniform(values.min(), values.max() + torch.rand(())))
        with pyro.plate("data", len(values), subsample_size=3) as index:
            pyro.sample("obs", dist.Normal(a, 1), obs=values[index])
        pyro.sample("b", dist.Uniform(values[index].min() - 1.0, 10.0))

    assert set(AutoIAF(model, hidden_dims=8)(models.data())) == {"a", "b"}


def test_other_shapes_of_the_latents():
    """A batch of one would broadcast, and give a wrong loss and no sign of it."""
    guide = AutoIAF(models.locals_of)
    guide(models.data())
    for other in (models.data()[:1], models.data()[:3], models.data().repeat(2)):
        words = (
            rf"the model has the latents .*'z': \({len(other)},\)}}, the guide has .*'z': \(8,\)}}"
        )
        with pytest.raises(ValueError, match=words):
            guide(other)
        guide(models.data())
    guide()
    pyro.enable_validation(False)
    guide(models.data()[:1])


def test_other_shapes_run_the_model_once():
    runs = []

    def model(values):
        runs.append(len(values))
        models.regression(values)

    guide = AutoIAF(model)
    guide(models.data())
    runs.clear()
    for values in (models.data(), models.data()[:3], models.data()[:3], models.data()):
        guide(values)
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
        assert isinstance(site["fn"], dist.ImproperUniform)
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


REPARAMETERIZED = {
    "a direction": (
        dist.ProjectedNormal(torch.tensor([2.0, 0.0])),
        reparam.ProjectedNormalReparam(),
    ),
    "two parts": (dist.Normal(torch.zeros(4), 1.0).to_event(1), reparam.SplitReparam([1, 3], -1)),
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
        (dist.ProjectedNormal(torch.zeros(2)), "with a bijection .* with ProjectedNormalReparam"),
        (dist.Delta(torch.ones(2)).to_event(1), r"is a Delta.* pyro.deterministic\('z', ...\)"),
    ],
    ids=lambda fn: type(fn).__name__,
)
@pytest.mark.filterwarnings("ignore:Singular sample detected")
def test_a_latent_without_a_density_on_the_reals(fn, message):
    refuses(draw(fn), f"site 'z'.* {message}")
    with pytest.raises(ValueError, match=f"site 'z'.* {message}"):
        LogJoint(draw(fn))


# Arguments


def test_bad_kinds():
    with pytest.raises(TypeError, match="model: expected a callable, got str"):
        AutoIAF("model")
    with pytest.raises(TypeError, match="flow: expected a callable, got int"):
        AutoAutoregressive(models.regression, flow=3)
    with pytest.raises(TypeError, match="got the module AutoregressiveTransform; write flow="):
        AutoAutoregressive(models.regression, flow=affine_autoregressive(2))
    for flag in ("full", 1.0):
        with pytest.raises(ValueError, match=f"full_rank: expected True or False, got {flag!r}"):
            AutoIAF(models.regression, full_rank=flag)
    for scale in (0, float("nan"), True):
        with pytest.raises(ValueError, match="init_scale: expected a positive finite number, got"):
            AutoIAF(models.regression, init_scale=scale)


@pytest.mark.parametrize("transform", [iaf(3), conditional_affine_autoregressive(3, 2)])
def test_a_transform_in_place_of_the_model(transform):
    name = type(transform).__name__
    with pytest.raises(TypeError, match=rf"a Pyro model.*transform {name}.*AutoAutoregressive\("):
        AutoIAF(transform)


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda dim: transforms.affine_autoregressive(dim).inv, "got _?Inverse"),
        (lambda d: ComposeTransform([affine_autoregressive(d)]), r"got ComposeTransform.*chain\("),
        (lambda dim: nn.Linear(dim, dim), "got Linear"),
        (lambda d: affine_autoregressive(d).requires_grad_(False), "to train, got one without"),
    ],
)
def test_flows_that_are_refused(flow, message):
    """F16: in Pyro such a guide runs and nothing learns."""
    options = {"error": TypeError, "kind": AutoAutoregressive, "flow": flow}
    refuses(models.regression, message, models.data(), **options)


class Unmasked(nn.Linear):
    def forward(self, x):
        shift, scale = super().forward(x).chunk(2, -1)
        return MonotonicAffineTransform(shift, scale)


def test_flow_that_is_not_autoregressive():
    options = {
        "kind": AutoAutoregressive,
        "flow": lambda d: AutoregressiveTransform(Unmasked(d, 2 * d)),
    }
    refuses(models.regression, r"not autoregressive.*\[0, 1\]", models.data(), **options)


def test_flow_follows_the_models_device_not_the_default():
    guide = AutoIAF(models.regression, hidden_dims=8)
    with torch.device("meta"):
        guide.set_up(models.data().new_zeros(3, device="cpu"))
    assert {p.device.type for p in guide.parameters()} == {"cpu"}


def test_a_flow_that_preserves_volume():
    flow = partial(iaf, num_transforms=2, hidden_dims=8, univariate=Shift)
    guide = AutoAutoregressive(models.gaussian, flow=flow)
    assert all(math.isfinite(loss) for loss in train(guide, 3, models.gaussian))


def test_initial_values_that_distributions_reject():
    """Medians of vague priors may overflow; the model is fine elsewhere."""

    def vague():
        log_scale = pyro.sample("log_scale", dist.Normal(torch.full((2,), 900.0), 1e3).to_event(1))
        pyro.sample("y", dist.Weibull((-log_scale).exp(), 1.0).to_event(1), obs=torch.ones(2))

    with pytest.raises(ValueError, match="Expected parameter scale"):
        poutine.trace(InitMessenger(init_to_median)(vague)).get_trace()
    draws = AutoIAF(vague).sample_posterior(3)
    assert draws["log_scale"].shape == (3, 2)
