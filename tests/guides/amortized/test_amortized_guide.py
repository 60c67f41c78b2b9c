# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The amortized guide in Pyro: where it starts, plates, scales and gradients."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoGuideList,
    AutoNormal,
    init_to_mean,
    init_to_value,
)

from pyro_artransform import (
    AutoAmortized,
    conditional_iaf,
    conditional_maf,
    conditional_spline_autoregressive,
    maf,
)
from pyro_artransform.joint.protocols import (
    MinibatchGuide,
    PosteriorGuide,
    ReparametrizedGuide,
    ScaledSteps,
    SetUpGuide,
)
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import (
    Encoder,
    SubsamplingEncoder,
    data,
    redraw,
    traces,
    train,
)

# Where it starts


def test_start():
    """Normal(init_loc, init_scale); the locals at the mean over the elements, each the same."""
    values = {"mean": torch.tensor(2.0), "z": torch.linspace(0.0, 4.0, 12)}
    for encoder in (None, Encoder()):
        guide = AutoAmortized(
            hierarchies.groups, encoder, init_loc_fn=init_to_value(values=values), init_scale=0.3
        )
        draws = guide.sample_posterior(5_000, data())
        for draw in (draws["mean"][:, None], draws["z"]):
            # 5 standard errors of each of these
            assert (draw.mean(0) - 2.0).abs().max() < 5 * 0.3 / 5_000**0.5
            assert (draw.std(0) / 0.3 - 1).abs().max() < 5 / 10_000**0.5
        joint = torch.cat([draws["mean"][:, None], draws["z"]], 1)
        assert (joint.T.corrcoef() - torch.eye(13)).abs().max() < 0.08
        pyro.clear_param_store()


def test_start_of_constrained_locals():
    def model():
        with pyro.plate("items", 4, dim=-2):
            pyro.sample("s", dist.LogNormal(torch.linspace(0.0, 3.0, 4)[:, None], 1.0))

    guide = AutoAmortized(model, init_loc_fn=init_to_value(values={"s": torch.ones(4, 1) * 5.0}))
    median = guide.median(num_samples=5_000)["s"]
    assert median.shape == (4, 1)
    assert torch.allclose(median, torch.full_like(median, 5.0), rtol=0.03)


def test_promises():
    """It has no single latent vector, so it is no AutoContinuous; what a fit asks for, it has."""
    guide = AutoAmortized(hierarchies.groups)
    assert isinstance(guide, AutoGuide)
    assert not isinstance(guide, AutoContinuous)
    for protocol in (MinibatchGuide, ScaledSteps, SetUpGuide, PosteriorGuide):
        assert isinstance(guide, protocol)
    assert not isinstance(guide, ReparametrizedGuide)
    assert guide.needs_indices
    assert not AutoAmortized(hierarchies.groups, Encoder()).needs_indices


def test_step_scales():
    """The location in units of the scale; with mini-batches it goes faster, and the flow slower."""
    guide = AutoAmortized(hierarchies.groups)
    guide(data())
    globals_ = guide.transform.globals
    ((parameter, scale),) = guide.step_scales().items()
    assert parameter is globals_.affine.loc
    assert torch.allclose(scale, torch.full((1,), 0.2))
    guide = AutoAmortized(hierarchies.minibatch)
    guide(data(16))
    globals_ = guide.transform.globals
    scales = guide.step_scales()
    flow = list(globals_.transform.transforms[:-1].parameters())
    assert set(scales) == {globals_.affine.loc, *flow}
    assert torch.allclose(scales[globals_.affine.loc], torch.full((1,), 0.4))
    assert all(torch.allclose(scales[p], torch.tensor(0.5)) for p in flow)


def test_start_near_draws():
    """The globals have the moments of the draws, but for the share; elements depend on them."""
    n = 5_000
    mean = 3.0 + 0.2 * torch.randn(n)
    z = 1.0 + 0.5 * (mean[:, None] - 3.0) + 0.3 * torch.randn(n, 12)
    guide = AutoAmortized(hierarchies.groups)
    guide.set_up(data())
    guide.start_near({"mean": mean, "z": z}, share=0.25)
    draws = guide.sample_posterior(n)
    # five standard errors
    assert (draws["mean"].mean() - 3.0).abs() < 5 * 0.25 / n**0.5
    assert (draws["mean"].std() / 0.1 - 1).abs() < 5 / n**0.5
    assert (draws["z"].mean() - 1.0).abs() < 5 * 0.35 / n**0.5
    rest = draws["z"] - 1.0 - 0.5 * (draws["mean"][:, None] - 3.0)
    assert (rest.std() / 0.3 - 1).abs() < 0.02
    with pytest.raises(ValueError, match=r"expected the sites \['mean', 'z'\]"):
        guide.start_near({"z": z})


def test_list_with_indices_that_the_model_gives():
    def model(y, index):
        with pyro.plate("groups", 12, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def plates(y, index):
        return pyro.plate("groups", 12, subsample=index)

    index = torch.tensor([3, 1, 7])
    for create_plates in (None, plates):
        guide = AutoGuideList(model, create_plates=create_plates)
        guide.append(AutoAmortized(model))
        if create_plates is None:
            with pytest.raises(ValueError, match="gives the indices of plate 'groups' itself"):
                guide(data(), index)
        else:
            assert guide(data(), index)["z"].shape == (3,)


# Plates and scales


def standard_guide(**options):
    return AutoAmortized(hierarchies.standard, init_scale=1.0, init_loc_fn=init_to_mean, **options)


def test_prior_without_data_gives_exactly_zero():
    """F24: stock flow guides are off by 21.5 nats here."""
    guide = standard_guide()
    for _ in range(5):
        guide_trace, model_trace = traces(hierarchies.standard, guide)
        assert abs(model_trace.log_prob_sum() - guide_trace.log_prob_sum()) < 1e-12
        for name, size in (("items", 5), ("inner", 2)):
            mine = guide_trace.nodes[name]["value"]
            assert mine.shape == (size,)
            assert torch.equal(mine, model_trace.nodes[name]["value"])
    guide_trace, _ = traces(hierarchies.standard, guide)
    assert guide_trace.nodes["_AutoAmortized_items_latent"]["scale"] == 4
    assert guide_trace.nodes["_AutoAmortized_inner_latent"]["scale"] == 8
    assert guide_trace.nodes["_AutoAmortized_latent"]["scale"] == 1


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO])
def test_prior_without_data_with_particles(elbo):
    guide = standard_guide()
    for particles in (1, 7):
        objective = elbo(
            num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=2
        )
        assert abs(objective.loss(hierarchies.standard, guide)) < 1e-11


def fixed_noise(monkeypatch, noise):
    """Base draws by element: the same for an element in whatever mini-batch it comes."""
    index = {}

    def rsample(self, sample_shape=()):
        shape = self.base_dist.loc.shape
        if len(shape) == 1:
            return noise["global"]
        return noise["local"][index["now"]]

    monkeypatch.setattr(torch.distributions.Independent, "rsample", rsample)
    return index


@pytest.mark.parametrize("encoder", [None, SubsamplingEncoder], ids=["embeddings", "encoder"])
@pytest.mark.parametrize("path", [False, True], ids=["total", "path"])
def test_gradient_of_mini_batches_averages_to_that_of_all_data(monkeypatch, encoder, path):
    y, batches = data(), torch.randperm(12).split(4)
    model, current = hierarchies.minibatch, {}

    def plates(y, size=4):
        return pyro.plate("groups", 12, subsample=current["index"], dim=-1)

    guide = AutoAmortized(model, encoder and encoder(), create_plates=plates)
    guide.path = path
    index = fixed_noise(monkeypatch, {"global": torch.randn(1), "local": torch.randn(12, 1)})

    def gradient(batch):
        current["index"] = index["now"] = batch
        loss = Trace_ELBO().differentiable_loss(model, guide, y, len(batch))
        parameters = [p for p in guide.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    current["index"] = index["now"] = batches[0]
    guide(y)
    redraw(guide)
    whole = gradient(torch.arange(12))
    average = torch.stack([gradient(batch) for batch in batches]).mean(0)
    assert whole.abs().max() > 0.1
    assert (average - whole).abs().max() < 1e-9 * whole.abs().max()


def test_vectorised_particles():
    """F26: the same mean of the loss, within five standard errors."""
    y = data()
    for encoder in (None, Encoder()):
        guide = AutoAmortized(hierarchies.groups, encoder)
        guide(y)
        redraw(guide)
        one = Trace_ELBO()
        loop = torch.tensor([one.loss(hierarchies.groups, guide, y) for _ in range(60)])
        many = Trace_ELBO(num_particles=60, vectorize_particles=True, max_plate_nesting=1)
        vectorised = torch.tensor(
            [many.loss(hierarchies.groups, guide, y) for _ in range(20)]
        ).mean()
        assert (loop.mean() - vectorised).abs() < 5 * loop.std() / 60**0.5
        pyro.clear_param_store()


def test_density_in_the_trace_is_that_of_log_prob():
    y = data()
    for encoder in (None, Encoder()):
        guide = AutoAmortized(hierarchies.groups, encoder)
        guide(y)
        redraw(guide)
        trace = poutine.trace(guide).get_trace(y)
        values = {name: trace.nodes[name]["value"][None] for name in ("mean", "z")}
        assert torch.allclose(guide.log_prob(values, y), trace.log_prob_sum(), atol=1e-8)
        pyro.clear_param_store()


FLOWS = {
    "iaf": {"local_flow": lambda d, c: conditional_iaf(d, c, 1, 8)},
    "maf": {"local_flow": lambda d, c: conditional_maf(d, c, 1, 8), "flow": lambda d: maf(d, 1, 8)},
    "spline": {"local_flow": lambda d, c: conditional_spline_autoregressive(d, c, 8)},
    "none": {"local_flow": None, "flow": None},
    "default": {},
}


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("path", [False, True], ids=["total", "path"])
def test_every_parameter_trains(options, path):
    guide = AutoAmortized(hierarchies.nested, **options)
    guide.path = path
    guide()
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    svi = SVI(hierarchies.nested, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    assert all(torch.tensor(svi.step()).isfinite() for _ in range(6))
    now = dict(guide.named_parameters())
    still = [name for name, value in before.items() if torch.equal(value, now[name])]
    # in one dimension nothing comes before, and the mask of a first layer is empty
    assert not [n for n in still if not n.endswith("layers.0.weight") or now[n].shape[1] > 1]
    assert len(still) < len(before) / 4
    assert all(value.isfinite().all() for value in now.values())


def test_jit():
    y = data()
    guide = AutoAmortized(hierarchies.groups, Encoder())
    guide(y)
    losses = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.set_rng_seed(1)
        elbo.loss(hierarchies.groups, guide, y)
        pyro.set_rng_seed(2)
        losses.append(elbo.loss(hierarchies.groups, guide, y))
    assert abs(losses[0] - losses[1]) < 1e-8


def test_enumerated_locals_are_left_alone():
    @config_enumerate
    def model(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("rows", len(y)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            kind = pyro.sample("kind", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(loc[kind] + shift, 1.0), obs=y)

    guide = AutoAmortized(model)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert torch.tensor([svi.step(data()) for _ in range(3)]).isfinite().all()


def test_in_a_guide_list():
    model = hierarchies.minibatch
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["mean"])))
    guide.append(AutoAmortized(poutine.block(model, expose=["z"])))
    losses = train(model, guide, data())
    assert torch.tensor(losses).isfinite().all()
    guide_trace, model_trace = traces(model, guide, data())
    assert torch.equal(*(t.nodes["groups"]["value"] for t in (guide_trace, model_trace)))


def test_many_globals_are_seen_as_a_summary():
    def model():
        pyro.sample("many", dist.Normal(torch.zeros(100), 1.0).to_event(1))
        with pyro.plate("items", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoAmortized(model)
    losses = train(model, guide)
    assert torch.tensor(losses).isfinite().all()
    assert guide.transform.locals[0].affine.linear.weight.shape == (1, 8 + 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_models(dtype):
    """F21, under either default dtype."""
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        pyro.clear_param_store()
        y = data().to(dtype)
        for encoder in (None, Encoder().to(dtype)):
            guide = AutoAmortized(hierarchies.groups, encoder)
            train(hierarchies.groups, guide, y, steps=2)
            assert {p.dtype for p in guide.parameters()} == {dtype}
            assert {v.dtype for v in guide.sample_posterior(2, y).values()} == {dtype}
            pyro.clear_param_store()


def test_latents_of_two_dtypes_share_one_inside():
    """As in other guides: the larger one, and each site has its own."""

    def mixed(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        with pyro.plate("groups", len(y)):
            z = pyro.sample("z", dist.Normal(mean.double(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = data().double()
    for path in (False, True):
        guide = AutoAmortized(mixed, lambda y: y[:, None])
        guide.path = path
        train(mixed, guide, y, steps=2)
        assert {p.dtype for p in guide.parameters()} == {torch.float64}
        draws = guide.sample_posterior(3, y)
        assert (draws["mean"].dtype, draws["z"].dtype) == (torch.float32, torch.float64)
        assert guide.log_prob(draws, y).isfinite().all()
        pyro.clear_param_store()
