# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models of Pyro's examples: density, SVI, `fit`, predictions and relations, as with Pyro's guides."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.inspect import get_model_relations
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

from pyro_artransform import AutoIAF, AutoStructuredFlow
from pyro_artransform.model import LogJoint
from pyro_artransform.sampling import ensemble
from tests.guides.idioms.models import GUIDES, examples
from tests.inference.conftest import QUICK, quick_fit
from tests.model.models import by_trace

LEAN = {**QUICK, "evaluation.evaluate._NUM_SAMPLES": 200}

#: that of each model as it is written; "plate" is faster, and wants indices such as ``a[..., county]``
STRATEGIES = {
    "baseball": "plate",
    **dict.fromkeys(("correlation", "process", "network", "radon", "items"), "vmap"),
    "ordinal": "loop",
}
every_example = pytest.mark.parametrize("name", STRATEGIES)
every_guide = pytest.mark.parametrize("kind", GUIDES)


@every_example
def test_many_draws_at_once(name):
    """Draws at once are those in turn, near the start and far away."""
    example = examples()[name]
    log_joint = LogJoint(example.model, example.with_data())
    assert log_joint.strategy == STRATEGIES[name], log_joint.reason
    z = torch.tensor([0.1, 1.0])[:, None] * torch.randn(2, log_joint.latents.latent_dim)
    z = log_joint.start + z
    expected = [by_trace(lambda: example.model(*example.with_data()), row) for row in z]
    assert torch.allclose(log_joint(z), torch.stack(expected), rtol=1e-10)


def steps(example, guide, count=3):
    """Steps of Pyro's SVI."""
    svi = SVI(example.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(*example.with_data()) for _ in range(count)]


@every_guide
@every_example
def test_steps_and_predictions(name, kind):
    """And what `pyro.render_model` draws of a model and of its guide."""
    example = examples()[name]
    guide = GUIDES[kind](example.model)
    assert all(math.isfinite(loss) for loss in steps(example, guide))
    relations = get_model_relations(example.model, example.with_data())
    found = get_model_relations(guide, example.with_data())
    latents = set(guide(*example.with_data()))
    assert latents <= set(relations["sample_sample"])
    assert set(found["sample_sample"]) <= latents | {f"_{kind}_latent"}
    if name == "correlation":
        return  # it takes its data to know their shape
    predictive = Predictive(example.model, guide=guide, num_samples=4)
    drawn = predictive(*example.args)
    (observed,) = {"obs", "log_radon", "y", "answer"} & drawn.keys()
    assert drawn[observed].shape == (4, len(example.data))
    assert drawn[observed].double().std() > 0
    if example.rows:
        assert set(guide(*example.new_args())) == set(guide(*example.args)) == latents
        assert predictive(*example.new_args())[observed].shape == (4, example.rows)


@every_guide
def test_predictions_in_parallel(kind):
    example = examples()["baseball"]
    guide = GUIDES[kind](example.model)
    steps(example, guide)
    predictive = Predictive(example.model, guide=guide, num_samples=500, parallel=True)
    drawn = predictive(*example.args)
    assert drawn["obs"].shape == drawn["alpha"].shape == (500, 6)
    # each number of hits belongs to its own draw: six standard errors of the mean of their differences
    expected = 45 * drawn["alpha"].sigmoid()
    error = (expected * (1 - expected / 45) / 500).mean(0).sqrt()
    assert ((drawn["obs"] - expected).mean(0).abs() < 6 * error).all()


@pytest.mark.filterwarnings("ignore:the model cannot be evaluated at many draws at once")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, AutoIAF) for name in ("baseball", "correlation", "radon", "items")),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                *((name, AutoIAF) for name in ("process", "network", "ordinal")),
                ("radon", AutoStructuredFlow),
            )
        ),
    ],
)
def test_fit(name, kind, monkeypatch):
    """Without another warning, at once where it can; the guide that a fit chooses is `AutoIAF`."""
    monkeypatch.setattr(ensemble, "_MOST_GRADIENTS", 1000)  # units of a network switch for ever
    example = examples()[name]
    guides = [] if kind is AutoIAF else [GUIDES["AutoStructuredFlow"](example.model)]
    num_steps = 5 if STRATEGIES[name] == "loop" else 20
    options = {"numbers": LEAN, "num_steps": num_steps, "progress": False}
    result = quick_fit(example.model, *guides, *example.with_data(), **options)
    assert type(result.guide) is kind
    assert bool(result.one_at_a_time) == (STRATEGIES[name] == "loop")
    assert result.num_skipped == 0
    # the evidence bounds the ELBO; three standard errors
    assert result.elbo < result.log_evidence + 3 * result.elbo_se
    draws = result.guide.sample_posterior(5)
    sites = LogJoint(example.model, example.with_data()).latents.sites
    assert {k: v.shape[1:] for k, v in draws.items()} == {k: s.shape for k, s in sites.items()}


class LastLayerLatent(PyroModule):
    """The first layer is trained, the last one is latent."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(1, 4)
        self.out = PyroModule[nn.Linear](4, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.out(self.hidden(x).tanh()).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)
        return mean


def curve():
    x = torch.linspace(-1.0, 1.0, 30)[:, None]
    return x, (2 * x[:, 0]).sin()


def test_network_with_a_latent_last_layer():
    """The other layer is trained along, and the predictions come near the data."""
    torch.manual_seed(1)
    model, (x, y) = LastLayerLatent(), curve()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    guide = GUIDES["AutoIAF"](model)
    result = quick_fit(model, guide, x, y, num_steps=60, progress=False)
    assert not result.one_at_a_time
    predictive = Predictive(model, guide=guide, num_samples=50, return_sites=["_RETURN"])
    mean = predictive(x)["_RETURN"].reshape(50, -1).mean(0)
    assert (mean - y).square().mean() < 0.02  # of a variance of 0.5
    assert set(before) == {"hidden.weight", "hidden.bias"}
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_network_of_pytorch_with_a_prior_for_each_parameter():
    network = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    to_pyro_module_(network)
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
            setattr(module, name, PyroSample(prior))

    def model(x, y=None):
        mean = network(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)

    log_joint = LogJoint(model, curve())
    assert log_joint.latents.latent_dim == 10
    assert log_joint.strategy == "vmap"
    guide = GUIDES["AutoIAF"](model)
    guide(*curve())
    predictive = Predictive(model, guide=guide, num_samples=5)
    assert predictive(torch.zeros(7, 1))["obs"].shape == (5, 7)


# What Pyro builds on a fitted guide: chains in its base space, and forecasts


@pytest.mark.parametrize(
    "kind", ["AutoIAF", pytest.param("AutoStructuredFlow", marks=pytest.mark.slow)]
)
def test_nuts_from_a_fitted_guide(kind):
    """A model with a plate; the chain's energy is minus the density of the guide's space."""
    example = examples()["baseball"]
    guide = GUIDES[kind](example.model)
    quick_fit(example.model, guide, *example.with_data(), num_steps=10, progress=False)

    neutra = NeuTraReparam(guide.requires_grad_(False))
    kernel = NUTS(poutine.reparam(example.model, config=lambda _: neutra), max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=8, warmup_steps=4, disable_progbar=True)

    mcmc.run(*example.with_data())
    base = mcmc.get_samples()["loc_shared_latent"]
    # a plate of the model is one more dimension on its right
    samples = neutra.transform_sample(base.unsqueeze(-2))
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        **{"loc": (8, 1), "scale": (8, 1), "alpha": (8, 6)}
    }
    assert base.std() > 0.1
    transform = guide.get_transform()
    z = transform(base)
    log_joint = LogJoint(example.model, example.with_data())
    for name, value in log_joint.latents.constrain(z).items():
        assert torch.allclose(value, samples[name].reshape(value.shape))
    expected = log_joint(z) + transform.log_abs_det_jacobian(base, z)
    found = [-kernel.potential_fn({"loc_shared_latent": row}) for row in base]
    assert torch.allclose(torch.stack(found), expected)


class Walk(ForecastingModel):
    """A random walk with noise, as Pyro's tutorial on forecasting has it."""

    def model(self, zero_data, covariates):
        start = pyro.sample("start", dist.Normal(0.0, 10.0).expand([1]).to_event(1))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(torch.zeros(1), 0.3).to_event(1))
        self.predict(dist.Normal(torch.zeros(1), 0.1), drift.cumsum(-2) + start)


@pytest.mark.parametrize("kind", [AutoIAF, AutoStructuredFlow])
def test_forecast(kind):
    """The posterior is a Gaussian, which a fit finds without steps."""
    data, covariates = torch.linspace(3.0, 5.0, 10)[:, None], torch.zeros(14, 0)
    model = Walk()
    guide = kind(model)
    quick_fit(model, guide, data, covariates[:10], num_steps=1, progress=False)
    options = {"guide": guide, "num_steps": 0, "log_every": 0}
    drawn = Forecaster(model, data, covariates[:10], **options)(data, covariates, num_samples=400)
    assert drawn.shape == (400, 4, 1)
    # from the last datum on, 0.3 a step; the last state is known to 0.1, as the noise is. Five standard
    # errors of 400 draws
    for step in range(4):
        sd = drawn[:, step].std()
        assert abs(drawn[:, step].mean() - 5.0) < 0.05 + 5 * sd / 20
        expected = (0.09 * (step + 1) + 0.02) ** 0.5
        assert abs(sd / expected - 1) < 5 / 800**0.5
