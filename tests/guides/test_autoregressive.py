# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a guide is and offers, and that it goes wherever Pyro's autoguides do: ELBOs, lists, no growth."""

import copy
import math

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
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal

from pyro_artransform.flows.conditioners import Conditioner
from pyro_artransform.guides import AutoIAF, MixtureGuide
from tests.guides import models
from tests.guides.named import FOREIGN, GUIDES, own_guides, own_pairs, pairs
from tests.guides.training import parameters, redraw_after_call, train, trains, unmoved

# The start


@own_pairs
def test_a_new_guide_is_the_normal(new, model):
    """F9, exactly: the density at any point, and the map of each base draw."""
    guide = new(model, init_scale=0.3)
    guide(models.data())
    loc = guide._init_loc()
    latent = loc + torch.randn(20, guide.latent_dim).to(loc.dtype)
    expected = dist.Normal(loc, 0.3).to_event(1).log_prob(latent)
    assert torch.allclose(guide.get_posterior().log_prob(latent), expected, atol=1e-6)
    if isinstance(guide, MixtureGuide):  # without a transform
        return
    x = guide.get_base_dist().sample((20,))
    assert torch.allclose(guide.get_transform()(x), loc + 0.3 * x, atol=1e-6)


# Draws and densities


@pairs
def test_draws_and_their_densities(new, model):
    guide = redraw_after_call(new(model))
    draws = guide.sample_posterior(6)
    trace = poutine.trace(guide).get_trace(models.data())
    sites = guide.prototype_trace.nodes
    assert list(draws) == list(sites)
    for name, value in draws.items():
        assert value.shape == (6, *sites[name]["value"].shape)
        assert value.dtype == sites[name]["value"].dtype
        assert not value.requires_grad
        assert sites[name]["fn"].support.check(value).all()
    # the density of one draw, as Pyro has it from the guide's own trace
    own = {name: trace.nodes[name]["value"] for name in sites}
    atol = 1e-3 if model is models.mixed_dtypes else 1e-7
    assert torch.allclose(guide.log_prob(own), trace.log_prob_sum(), atol=atol)
    assert guide.log_prob(draws).shape == (6,)
    batch = {name: value.reshape((2, 3, *value.shape[1:])) for name, value in draws.items()}
    assert torch.allclose(guide.log_prob(batch).flatten(), guide.log_prob(draws))


def test_log_prob_of_no_draws_and_of_arrays():
    guide = redraw_after_call(GUIDES["iaf"](models.regression))
    draws = guide.sample_posterior(4)
    assert guide.log_prob({k: v[:0] for k, v in draws.items()}).shape == (0,)
    expected = guide.log_prob(draws)
    for convert in (torch.Tensor.numpy, torch.Tensor.tolist):
        got = guide.log_prob({k: convert(v) for k, v in draws.items()})
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"expected 'scale' inside its support .*, got -"):
        guide.log_prob({"loc": draws["loc"], "scale": -draws["scale"]})


def test_unconstrained_values_are_the_latents():
    guide = redraw_after_call(AutoIAF(models.regression, hidden_dims=8))
    latent, log_q = guide.rsample_and_log_prob(5)
    values = {"loc": latent[:, 0], "scale": latent[:, 1].exp()}
    found, ladj = guide.unconstrain(values)
    torch.testing.assert_close(found, latent)
    torch.testing.assert_close(ladj, latent[:, 1])  # the log of the slope of exp
    torch.testing.assert_close(guide.log_prob(values), log_q - ladj)


def test_arguments_set_the_guide_up():
    draws, data = {"loc": torch.zeros(2), "scale": torch.ones(2)}, models.data()
    for use in (
        lambda guide: guide.sample_posterior(2, data),
        lambda guide: guide.log_prob(draws, data),
        lambda guide: guide.quantiles([0.5], values=data, num_samples=10),
    ):
        guide = AutoIAF(models.regression, hidden_dims=8)
        use(guide)
        assert guide.latent_dim == 2
        transform = guide.get_transform()
        guide.set_up()
        assert guide.get_transform() is transform


def test_bad_counts():
    guide = AutoIAF(models.regression, hidden_dims=8)
    guide(models.data())
    for use in (guide.sample_posterior, guide.rsample_and_log_prob):
        with pytest.raises(ValueError, match="n: expected a positive integer, got True"):
            use(True)
    with pytest.raises(ValueError, match="num_samples: expected a positive integer, got 0"):
        guide.median(num_samples=0)


@pytest.mark.parametrize("model", [models.regression, models.shapes])
def test_quantiles(model):
    guide = redraw_after_call(AutoIAF(model, hidden_dims=8))
    levels = torch.tensor([0.05, 0.5, 0.95])
    found = guide.quantiles(levels, num_samples=4000)
    draws, medians = guide.sample_posterior(4000), guide.median(num_samples=10)
    for name, value in found.items():
        assert value.shape == (3, *draws[name].shape[1:])
        assert medians[name].shape == draws[name].shape[1:]
        below = (draws[name] <= value[:, None]).double().mean(1)
        # a strictly monotone coordinate is below its quantile as often as the level says; those of
        # a matrix that are fixed are always there. Four standard errors, of both samples
        fixed = draws[name].std(0) < 1e-9
        off = (below - levels.reshape((3,) + (1,) * (value.dim() - 1))).abs()[:, ~fixed]
        assert (off < 4 * math.sqrt(2 * 0.25 / 4000)).all(), name
    with pytest.raises(ValueError, match="quantiles: expected numbers between 0 and 1, got"):
        guide.quantiles([0.5, 1.5])


# dtypes and devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@own_guides
def test_dtype_is_the_models(new, dtype):
    """F21: and not the default."""
    torch.set_default_dtype(torch.float32 if dtype == torch.float64 else torch.float64)
    data = models.data(dtype)
    guide = new(models.regression)
    svi = SVI(models.regression, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(2):
        svi.step(data)
    assert {p.dtype for p in guide.parameters()} == {dtype}
    draws = guide.sample_posterior(3)
    z, log_q = guide.rsample_and_log_prob(3)
    results = [*guide(data).values(), *draws.values(), z, log_q, guide.log_prob(draws)]
    assert {value.dtype for value in results} == {dtype}


def test_moving_a_guide():
    """F22: every tensor goes along, the supports' bounds and the start too."""

    def model(values):
        pyro.sample("z", dist.Uniform(values.new_tensor([-1.0, 0.0]), values.max()).to_event(1))

    guide = AutoIAF(model, hidden_dims=8)
    guide(models.data(torch.float64))
    guide.float()
    assert {value.dtype for value in guide.sample_posterior(3).values()} == {torch.float32}
    guide.start_at(torch.zeros(2))
    guide.to("meta")
    assert {p.device.type for p in guide.parameters()} == {"meta"}
    site = guide.prototype_trace.nodes["z"]
    assert site["value"].device.type == "meta"
    assert site["fn"].support.base_constraint.lower_bound.device.type == "meta"


# What a fit uses


@pytest.mark.parametrize("name", ["iaf", "maf", "splines"])
def test_start_at(name):
    guide = redraw_after_call(GUIDES[name](models.gaussian))
    before = [id(p) for p in guide.parameters()]
    loc, scale_tril = torch.tensor([3.0, -2.0, 0.5]), models.gaussian_tril(torch.zeros(()))
    guide.start_at(loc, scale_tril)
    z, log_q = guide.rsample_and_log_prob(50)
    expected = dist.MultivariateNormal(loc, scale_tril=scale_tril).log_prob(z)
    assert torch.allclose(log_q, expected)
    assert [id(p) for p in guide.parameters()] == before
    train(guide, 3, models.gaussian)
    guide.start_at(loc)
    z, log_q = guide.rsample_and_log_prob(50)
    assert torch.allclose(log_q, dist.Normal(loc, 0.1).to_event(1).log_prob(z))


def test_start_at_takes_lists():
    guide = AutoIAF(models.regression, hidden_dims=8)
    guide(models.data(torch.float32))
    guide.start_at([1, 2], [[0.5, 0], [0.25, 1.0]])
    assert torch.equal(guide.transform.transforms[1].loc, torch.tensor([1.0, 2.0]).float())
    with pytest.raises(ValueError, match=r"loc: expected shape \(2,\), got \(4,\)"):
        guide.start_at([0.0] * 4)
    diagonal = redraw_after_call(AutoIAF(models.gaussian, hidden_dims=8, full_rank=False))
    with pytest.raises(ValueError, match="full_rank=True"):
        diagonal.start_at(torch.zeros(3), models.gaussian_tril(torch.zeros(())))


def path_gradient(guide, log_p):
    guide.zero_grad()
    z, log_q = guide.rsample_and_log_prob(16, path=True)
    (log_p(z) - log_q).mean().backward()
    return {name: p.grad for name, p in guide.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["iaf", "maf", "chain", "structured", "Pyro's"])
def test_path_gradient_is_zero_at_the_optimum(name):
    """The gradient of every draw, not its mean: the score term is what has noise there."""
    guide = redraw_after_call({**GUIDES, **FOREIGN}[name](models.gaussian))
    target = copy.deepcopy(guide).requires_grad_(False)

    def log_p(z):
        x, ladj = target.get_transform().inverse_and_ladj(z)
        return target.get_base_dist().log_prob(x) + ladj

    gradients = path_gradient(guide, log_p)
    assert gradients
    for key, gradient in gradients.items():
        assert gradient.abs().max() < 1e-8, key
    z, log_q = guide.rsample_and_log_prob(16)
    (log_p(z) - log_q).mean().backward()
    assert any(p.grad.abs().max() > 1e-3 for p in guide.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["iaf", "maf", "chain", "structured"])
def test_path_gradient_has_the_right_mean(name):
    """Off from the optimum: the full gradient less that of the score, whose mean is zero."""
    guide = redraw_after_call(GUIDES[name](models.gaussian))
    log_p = dist.Normal(torch.tensor([1.0, 0.0, -1.0]), 0.5).to_event(1).log_prob
    pyro.set_rng_seed(1)
    path = path_gradient(guide, log_p)
    pyro.set_rng_seed(1)
    guide.zero_grad()
    z, log_q = guide.rsample_and_log_prob(16)
    (log_p(z) - log_q).mean().backward(retain_graph=True)
    full = {key: p.grad.clone() for key, p in guide.named_parameters() if p.grad is not None}
    guide.zero_grad()
    x, ladj = guide.get_transform().inverse_and_ladj(z.detach())
    score = guide.get_base_dist().log_prob(x) + ladj
    assert torch.allclose(score, log_q)
    score.mean().backward()
    for key, p in guide.named_parameters():
        if p.grad is not None:
            assert torch.allclose(path[key], full[key] + p.grad, atol=1e-7), key


def test_density_of_a_draw_that_underflowed():
    def model(values):
        pyro.sample("scale", dist.HalfNormal(values.new_ones(())))
        pyro.sample("probs", dist.Dirichlet(values.new_ones(3)))

    guide = AutoIAF(model, hidden_dims=8)
    values = guide.sample_posterior(4, models.data())
    expected = guide.log_prob(values)
    values["scale"][0], values["probs"][1] = 0.0, torch.tensor([0.0, 0.0, 1.0])
    found = guide.log_prob(values)
    assert found[:2].tolist() == [-math.inf, -math.inf]
    assert torch.equal(found[2:], expected[2:])


# Wherever Pyro's autoguides go


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Trace_ELBO, {"num_particles": 3}),
        (Trace_ELBO, {"num_particles": 3, "vectorize_particles": True}),
        (TraceGraph_ELBO, {}),
        (TraceGraph_ELBO, {"num_particles": 3, "vectorize_particles": True}),
        (TraceEnum_ELBO, {}),
        (TraceMeanField_ELBO, {}),
        (JitTrace_ELBO, {"ignore_jit_warnings": True}),
    ],
)
def test_elbos(kind, options):
    guide, elbo = AutoIAF(models.shapes, hidden_dims=8), kind(max_plate_nesting=2, **options)
    guide(models.data())
    before = parameters(guide)
    assert all(math.isfinite(loss) for loss in train(guide, 3, models.shapes, elbo))
    assert not unmoved(guide, before)


def test_in_a_list():
    lists = [AutoGuideList(models.regression) for _ in range(2)]
    for guides in lists:
        guides.append(AutoNormal(poutine.block(models.regression, expose=["scale"])))
        guides.append(AutoIAF(poutine.block(models.regression, hide=["scale"]), hidden_dims=8))
        train(guides, 2)
    for guides, other in (lists, lists[::-1]):
        before, theirs = parameters(guides[1]), parameters(other[1])
        train(guides, 4)
        assert not [name for name in unmoved(guides[1], before) if "transforms.0" not in name]
        assert len(unmoved(other[1], theirs)) == len(theirs)
        assert set(guides(models.data())) == {"loc", "scale"}
        assert guides.quantiles([0.1, 0.9], models.data())["loc"].shape == (2,)


def test_one_evaluation_of_each_network_in_a_step():
    guide = AutoIAF(models.regression, num_transforms=2, hidden_dims=8)
    guide(models.data())
    calls = []
    conditioners = [part for part in guide.modules() if isinstance(part, Conditioner)]
    for conditioner in conditioners:
        conditioner.register_forward_hook(lambda *_: calls.append(1))
    assert len(conditioners) == 3  # that of the noise, and one for each layer
    train(guide, 3)
    guide.rsample_and_log_prob(5)
    guide.sample_posterior(5)
    assert len(calls) == 3 * (3 + 1 + 1)


def test_no_growing_state():
    """F29."""
    guide = AutoIAF(models.regression, num_transforms=1, hidden_dims=4)
    found = []
    for count in (3, 60):
        for size in range(count):
            guide(models.data()[: 1 + size % 8])
            guide.sample_posterior(2)
        held = {name: len(v) for name, v in vars(guide).items() if hasattr(v, "__len__")}
        found.append((held, len(pyro.get_param_store())))
    assert found[0] == found[1]


def test_guides_that_were_set_up_loaded_and_copied_in_inference_mode_train(tmp_path):
    guide = AutoIAF(models.regression, hidden_dims=8)
    with torch.inference_mode():
        guide.sample_posterior(3, models.data())
    trains(guide)
    guide.save(tmp_path / "guide")
    loaded = AutoIAF(models.regression, hidden_dims=8)
    with torch.inference_mode():
        loaded.set_up(models.data())
        loaded.load(tmp_path / "guide")
        twin = copy.deepcopy(guide)
    trains(loaded)
    trains(twin, [guide])


@pytest.mark.parametrize("name", ["iaf", "maf", "structured"])
def test_draws_and_densities_in_inference_mode(name):
    guide = redraw_after_call(GUIDES[name](models.regression))
    posterior = guide.get_posterior()
    with torch.inference_mode():
        draws = guide.sample_posterior(4)
        log_prob = guide.log_prob(draws)
        assert guide.median(num_samples=10)["scale"] > 0
        trace = poutine.trace(guide).get_trace(models.data())
        assert trace.log_prob_sum().isfinite()
        latent, log_q = guide.rsample_and_log_prob(4)
        assert torch.allclose(posterior.log_prob(latent), log_q)
    assert torch.allclose(guide.log_prob({k: v.clone() for k, v in draws.items()}), log_prob)
    trains(guide)
