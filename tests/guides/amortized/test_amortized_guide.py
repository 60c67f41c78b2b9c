# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The amortized guide in Pyro: where it starts, plates, scales and gradients; copies, and files."""

import copy
import pickle
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_mean, init_to_value

from pyro_artransform import AutoAmortized, conditional_iaf, conditional_maf, maf
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import BatchEncoder, Encoder, data, redraw, traces, train
from tests.guides.training import parameters, unmoved

# Where it starts


def test_start():
    """Normal(init_loc, init_scale), with the locals at the mean over the elements."""
    values = {"mean": torch.tensor(2.0), "z": torch.linspace(0.0, 4.0, 12)}
    for encoder in (None, Encoder()):
        options = {"init_loc_fn": init_to_value(values=values), "init_scale": 0.3}
        guide = AutoAmortized(hierarchies.groups, encoder, coordinates="model", **options)
        draws = guide.sample_posterior(5_000, data())
        joint = torch.cat([draws["mean"][:, None], draws["z"]], 1)
        expected = torch.full((13,), 2.0)
        # 5 standard errors of each of these
        assert (joint.mean(0) - expected).abs().max() < 5 * 0.3 / 5_000**0.5
        assert (joint.std(0) / 0.3 - 1).abs().max() < 5 / 10_000**0.5
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


def test_start_near_draws():
    """The globals have the moments of the draws, but for the share; elements depend on them."""
    n = 5_000
    mean = 3.0 + 0.2 * torch.randn(n)
    z = 1.0 + 0.5 * (mean[:, None] - 3.0) + 0.3 * torch.randn(n, 12)
    guide = AutoAmortized(hierarchies.groups, coordinates="model")
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


# Plates and scales


def test_prior_without_data_gives_exactly_zero():
    """F24: stock flow guides are off by 21.5 nats here."""
    guide = AutoAmortized(hierarchies.standard, init_scale=1.0, init_loc_fn=init_to_mean)
    for _ in range(5):
        guide_trace, model_trace = traces(hierarchies.standard, guide)
        assert abs(model_trace.log_prob_sum() - guide_trace.log_prob_sum()) < 1e-12
        for name, size in (("items", 5), ("inner", 2)):
            mine = guide_trace.nodes[name]["value"]
            assert mine.shape == (size,)
            assert torch.equal(mine, model_trace.nodes[name]["value"])
    for name, scale in (("_items", 4), ("_inner", 8), ("", 1)):
        assert guide_trace.nodes[f"_AutoAmortized{name}_latent"]["scale"] == scale
    for elbo, particles in ((Trace_ELBO, 7), (TraceGraph_ELBO, 1), (TraceEnum_ELBO, 7)):
        objective = elbo(
            num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=2
        )
        assert abs(objective.loss(hierarchies.standard, guide)) < 1e-11


@pytest.mark.parametrize(
    ("encoder", "path"),
    [(None, False), (None, True), (BatchEncoder, True)],
    ids=["embeddings", "embeddings-path", "encoder-path"],
)
def test_gradient_of_mini_batches_averages_to_that_of_all_data(monkeypatch, encoder, path):
    y, batches = data(), torch.randperm(12).split(4)
    model, current = hierarchies.minibatch, {}

    def plates(y, size=4):
        return pyro.plate("groups", 12, subsample=current["index"], dim=-1)

    # base draws by element: the same for an element in whatever mini-batch it comes
    noise = torch.randn(1), torch.randn(12, 1)

    def rsample(self, sample_shape=()):
        return noise[0] if self.base_dist.loc.dim() == 1 else noise[1][current["index"]]

    monkeypatch.setattr(torch.distributions.Independent, "rsample", rsample)
    guide = AutoAmortized(model, encoder and encoder(), create_plates=plates)
    guide.path = path

    def gradient(batch):
        current["index"] = batch
        loss = Trace_ELBO().differentiable_loss(model, guide, y, len(batch))
        parameters = [p for p in guide.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    current["index"] = batches[0]
    guide(y)
    redraw(guide)
    whole = gradient(torch.arange(12))
    average = torch.stack([gradient(batch) for batch in batches]).mean(0)
    assert whole.abs().max() > 0.1
    assert (average - whole).abs().max() < 1e-9 * whole.abs().max()


FLOWS = {
    "iaf": ({"local_flow": lambda d, c: conditional_iaf(d, c, 1, 8)}, True),
    "maf": (
        {"local_flow": lambda d, c: conditional_maf(d, c, 1, 8), "flow": lambda d: maf(d, 1, 8)},
        False,
    ),
    "none": ({"local_flow": None, "flow": None}, True),
    "default": ({}, False),
    "default-path": ({}, True),
}


@pytest.mark.parametrize(("options", "path"), FLOWS.values(), ids=FLOWS)
def test_every_parameter_trains(options, path):
    guide = AutoAmortized(hierarchies.nested, **options)
    guide.path = path
    guide()
    before = parameters(guide)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=2)
    svi = SVI(hierarchies.nested, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    assert all(torch.tensor(svi.step()).isfinite() for _ in range(6))
    now, still = dict(guide.named_parameters()), unmoved(guide, before)
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
    @pyro.infer.config_enumerate
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
    assert torch.tensor(train(model, guide)).isfinite().all()
    assert guide.transform.locals[0].affine.linear.weight.shape == (1, 8 + 64)


# The path gradient


def gradient(guide, y, path, particles=1):
    guide.path = path
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    elbo.max_plate_nesting = 1 + (particles > 1)
    loss = elbo.differentiable_loss(hierarchies.groups, guide, y)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_path_gradient_has_the_same_mean(monkeypatch):
    """But for what the mean force on the draws does to scale and flow, which is taken away."""
    monkeypatch.setattr(
        "pyro_artransform.guides.distributions._moved_by", lambda location, value: value
    )
    y = data()
    guide = AutoAmortized(hierarchies.groups)
    guide(y)
    redraw(guide)
    directions = torch.randn(len(gradient(guide, y, False)), 20)
    by_path, plain = (
        torch.stack([gradient(guide, y, path, 100) @ directions for _ in range(30)])
        for path in (True, False)
    )
    error = ((by_path.var(0) + plain.var(0)) / 30).sqrt()
    # 20 t statistics of 58 degrees of freedom: beyond 5 in one of 10,000 runs
    assert ((by_path - plain).mean(0).abs() < 5 * error).all()
    # and there is something to be seen
    assert (plain.mean(0).abs() > 5 * error).any()


def test_noise_that_all_draws_share_moves_the_location_alone():
    """A force that is the same for all draws, as that of a mini-batch, must not reach scale and flow."""
    y, found = data(), []
    guide = AutoAmortized(hierarchies.groups)
    guide(y)
    redraw(guide)
    guide.path = True

    globals_ = guide.transform.globals
    for force in (0.0, 100.0):
        model = partial(hierarchies.groups, force=force)
        pyro.set_rng_seed(1)
        elbo = Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=1)
        loss = elbo.differentiable_loss(model, guide, y)
        found.append(torch.autograd.grad(loss, list(globals_.parameters())))
    for parameter, without, with_force in zip(globals_.parameters(), *found):
        difference = (with_force - without).abs().max()
        assert difference > 50 if parameter is globals_.affine.loc else difference < 1e-9
    # of a single draw there is no mean to tell apart: the scale learns from all of it
    loss = Trace_ELBO().differentiable_loss(hierarchies.groups, guide, y)
    assert torch.autograd.grad(loss, globals_.affine.log_scale)[0].abs() > 1e-3


# In the param store, in copies, state dicts and files


def trained(encoder=None, model=hierarchies.groups, **options):
    guide = AutoAmortized(model, encoder, **options)
    train(model, guide, data())
    return redraw(guide)


def trains(guide, *others):
    """Whether a guide trains, and others stay as they are."""
    before, rest = parameters(guide), [parameters(other) for other in others]
    train(hierarchies.groups, guide, data())
    stay = [unmoved(other, old) == list(old) for other, old in zip(others, rest, strict=True)]
    return len(unmoved(guide, before)) < len(before) and all(stay)


def score(guide):
    values = {"mean": torch.linspace(-1, 1, 5), "z": torch.linspace(-2, 2, 60).reshape(5, 12)}
    with torch.no_grad():
        return guide.log_prob(values, data())


both = pytest.mark.parametrize("new", [lambda: None, Encoder], ids=["embeddings", "encoder"])


@both
def test_copies(new):
    guide = trained(new())
    guide(data())
    with torch.no_grad():
        guide.prior_coordinates.centered[-1:] = 0.3
    density = score(guide)
    twin, unpickled = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="this AutoAmortized has no model, since pickle"):
        _ = unpickled.model
    unpickled.model = hierarchies.groups
    for other in (twin, unpickled):
        assert torch.equal(score(other), density)
        assert trains(other, guide)


def plates(y):
    return pyro.plate("groups", 12, dim=-1)


def test_copies_with_plates():
    guide = trained(create_plates=plates, coordinates="model")
    assert copy.deepcopy(guide).create_plates is plates
    unpickled = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="has no create_plates, which pickle drops"):
        unpickled(data())
    unpickled.create_plates = plates
    assert unpickled(data())["z"].shape == (12,)


def test_without_a_model_the_plates_stay_as_they_are():
    guide = pickle.loads(pickle.dumps(trained(Encoder(), hierarchies.batched, coordinates="model")))
    assert guide(data())["z"].shape == (12,)
    assert guide.sample_posterior(2, data(5))["z"].shape == (2, 5)
    with pytest.raises(ValueError, match=r"shape \(12, 2\), .*'groups'.*got \(5, 2\)"):
        guide(data(5))
