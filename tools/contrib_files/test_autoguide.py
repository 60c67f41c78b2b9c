# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import functools
import io
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam
from pyro_artransform.autoguide import AutoIAF
from torch import nn
from torch.distributions import constraints

ELBOS = [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO]
GUIDES = [
    AutoIAF,
    functools.partial(AutoIAF, num_transforms=1, hidden_dims=[8, 8], full_rank=False),
]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.:DeprecationWarning", "ignore:.torch.jit.:FutureWarning"
)


@pytest.fixture(autouse=True)
def _fresh_start():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)


def three_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0))


def regression(x, y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(x @ slope, scale), obs=y)


class Linear(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        weight = dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2)
        self.linear.weight = PyroSample(weight)
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, scale), obs=y)


def train(model, guide, num_steps, *args, elbo=None, lr=0.01):
    svi = SVI(model, guide, Adam({"lr": lr}), elbo or Trace_ELBO())
    losses = [svi.step(*args) for _ in range(num_steps)]
    assert all(math.isfinite(loss) for loss in losses)
    return losses


@pytest.mark.parametrize("make", GUIDES)
def test_scores(make):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([10]).to_event(1))

    guide = make(model)
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace()
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    latent = f"_{type(guide).__name__}_latent"
    assert latent not in model_trace.nodes
    assert guide_trace.nodes[latent]["infer"]["is_auxiliary"]
    assert guide_trace.nodes[latent]["log_prob_sum"].item() != 0.0
    assert model_trace.nodes["z"]["log_prob_sum"].item() != 0.0
    assert guide_trace.nodes["z"]["log_prob_sum"].item() == 0.0


@pytest.mark.parametrize("elbo", ELBOS)
def test_factor(elbo):
    def model(log_factor):
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.factor("f1", log_factor)
        with pyro.plate("plate", 3):
            pyro.factor("f2", log_factor)
            pyro.sample("z2", dist.Normal(torch.zeros(3), torch.ones(3)))

    guide = AutoIAF(model)
    elbo = elbo(strict_enumeration_warning=False)
    losses = []
    for value in (0.0, 5.0, 4.0):
        pyro.set_rng_seed(123)
        losses.append(elbo.loss(model, guide, torch.tensor(value)))
    assert losses[1] - losses[2] == pytest.approx(-4, abs=1e-4)


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("init", [init_to_feasible, init_to_mean, init_to_median, init_to_sample])
def test_shapes(init, elbo):
    def model():
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("plate", 3):
            pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))
        pyro.sample("z4", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
        pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
        masked = dist.Normal(0, 1).expand((2,)).mask(torch.arange(2) > 0)
        pyro.sample("z6", masked.to_event(1))
        pyro.sample("z7", dist.LKJCholesky(3, torch.tensor(1.0)))

    guide = AutoIAF(model, init_loc_fn=init)
    elbo = elbo(strict_enumeration_warning=False)
    assert math.isfinite(elbo.loss(model, guide))
    trace = poutine.trace(model).get_trace()
    for name, value in guide.quantiles([0.1, 0.5, 0.9]).items():
        assert value.shape == (3, *trace.nodes[name]["value"].shape)


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("make", GUIDES)
def test_median_and_quantiles(make, elbo):
    guide = make(three_latents)
    options = {"num_particles": 100, "vectorize_particles": True}
    elbo = elbo(strict_enumeration_warning=False, **options)
    train(three_latents, guide, 150, elbo=elbo, lr=0.03)
    median = guide.median()
    assert abs(median["x"]) < 0.15
    assert abs(median["y"] - 1) < 0.15
    assert abs(median["z"] - 0.5) < 0.1
    quantiles = guide.quantiles([0.1, 0.5, 0.9])
    low, middle, high = ({k: v[i] for k, v in quantiles.items()} for i in range(3))
    assert -3.0 < low["x"] < middle["x"] - 0.9 < high["x"] - 1.8 < 1.2
    assert 0.01 < low["y"] < middle["y"] / 2 < high["y"] / 4
    assert 0.01 < low["z"] < middle["z"] - 0.1 < high["z"] - 0.2 < 0.79


@pytest.mark.parametrize("init_scale", [1e-1, 1e-4])
def test_new_guide_is_a_normal(init_scale):
    inits = {"x": torch.randn(()), "y": torch.rand(()), "z": torch.rand(())}
    guide = AutoIAF(
        three_latents, init_loc_fn=lambda site: inits[site["name"]], init_scale=init_scale
    )
    median = guide.median()
    for name, value in inits.items():
        assert abs(median[name] - value) < 0.1 * init_scale
    posterior = guide.get_posterior()
    latent = posterior.sample((100,))
    loc = torch.stack([inits["x"], inits["y"].log(), inits["z"].logit()])
    expected = dist.Normal(loc, init_scale).to_event(1).log_prob(latent)
    assert torch.allclose(posterior.log_prob(latent), expected, atol=0.05)


def test_serialization():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 2):
            pyro.sample("y", dist.LogNormal(0.0, 1.0))

    guide = AutoIAF(model)
    guide()
    pyro.set_rng_seed(0)
    expected = guide.call()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    pyro.set_rng_seed(0)
    for one, other in zip(expected, loaded.call()):
        assert torch.allclose(one, other)
    assert dict(loaded.named_parameters()).keys() == dict(guide.named_parameters()).keys()


def test_jit():
    x = torch.randn(10, 2)
    y = x @ torch.tensor([1.0, -1.0])
    guide, compiled = AutoIAF(regression, hidden_dims=8), JitTrace_ELBO(ignore_jit_warnings=True)
    train(regression, guide, 3, x, y, elbo=compiled)
    losses = []
    for elbo in (Trace_ELBO(), compiled):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss_and_grads(regression, guide, x, y))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_discrete_parallel():
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0, 10).expand_by([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoGuideList(model)
    guide.append(AutoIAF(poutine.block(model, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert math.isfinite(elbo.loss_and_grads(model, guide, data))


@pytest.mark.parametrize("elbo", ELBOS)
def test_nested_guide_and_model_with_parameters(elbo):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(1.0))
            self.scale = PyroParam(torch.tensor(0.1), constraints.positive)

        def forward(self):
            pyro.sample("x", dist.Normal(self.loc, self.scale))
            with pyro.plate("plate", 2):
                pyro.sample("y", dist.Normal(2.0, 0.1))

    model = Model()
    guide, inner = AutoGuideList(model), AutoGuideList(poutine.block(model, expose=["y"]))
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    inner.z = AutoIAF(poutine.block(model, expose=["y"]))
    guide.append(inner)
    for name, part in guide.named_modules():
        if isinstance(part, AutoIAF):
            assert part.master is not None, name
            assert part.master() is guide, name
    train(model, guide, 20, elbo=elbo(strict_enumeration_warning=False), lr=0.005)
    trace = poutine.trace(guide).get_trace()
    assert all(p.startswith(("AutoGuideList.0", "AutoGuideList.1.z")) for p in trace.param_nodes)
    assert {"x", "y", "_AutoGuideList.1.z_latent"} <= set(trace.stochastic_nodes)
    single = AutoIAF(model)
    train(model, single, 20, lr=0.005)
    assert abs(single.median()["y"] - 2.0).max() < 0.1


def test_predictive_of_a_module():
    x, y = torch.randn(4, 3), torch.randn(4)
    model = Linear()
    guide = AutoIAF(model)
    guide(x, y)
    predictive = Predictive(model, guide=guide, num_samples=10)
    samples = predictive(x)
    assert {"linear.weight", "linear.bias", "scale", "obs"} <= set(samples)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False)
    assert len(traced.call(x)) == len(samples)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    x, y = torch.randn(4, 3), torch.randn(4)

    def model(x, y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=y)

    guide = AutoIAF(model)
    guide(x, y)
    predictive = Predictive(model, guide=guide, num_samples=10, parallel=parallel)
    for size in (4, 6):
        assert predictive(torch.randn(size, 3))["obs"].shape == (10, size)


def test_sub_sampled_data():
    def model(x, size):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=size) as index:
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=x[index])

    guide = AutoIAF(model)
    x = 3.0 + torch.randn(50)
    train(model, guide, 300, x, 20, lr=0.02)
    assert abs(guide.median()["loc"] - 50 / 51 * x.mean()) < 0.3


def test_state_dict_and_copies():
    x, y = torch.randn(10, 2), torch.randn(10)
    guide = AutoIAF(regression)
    train(regression, guide, 5, x, y)
    with pyro.settings.context(module_local_params=True):
        other = AutoIAF(regression)
        other(x, y)
    other.load_state_dict(guide.state_dict())
    for twin in (other, pickle.loads(pickle.dumps(guide))):
        for one, two in zip(guide.parameters(), twin.parameters()):
            assert torch.equal(one, two)
            assert one is not two


def test_neutra():
    guide = AutoIAF(three_latents)
    train(three_latents, guide, 5)
    neutra = NeuTraReparam(guide)
    trace = poutine.trace(neutra.reparam(three_latents)).get_trace()
    names = [n for n in trace.stochastic_nodes if n.endswith("_shared_latent")]
    latent = trace.nodes[names[0]]["value"]
    values = neutra.transform_sample(latent)
    assert torch.allclose(values["x"], trace.nodes["x"]["value"], atol=1e-4)
