# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Failures of guides, of fits and of verdicts."""

import copy
import gc
import math
import pickle
import warnings
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_mean, init_to_value

import pyro_artransform as art
from pitfalls import models
from pyro_artransform import guides, transforms

small = partial(guides.AutoIAF, num_transforms=2, hidden_dims=16)
quick = {"num_particles": 16, "progress": False}


def train(guide, model, steps, *args, elbo=None):
    """Plain SVI; the losses."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


def parameters(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def unmoved(module, before):
    now = dict(module.named_parameters())
    return [name for name in before if name not in now or torch.equal(before[name], now[name])]


def unconstrained(guide, n):
    with torch.no_grad():
        return guide.get_posterior().sample((n,))


def elbo_of(model, guide):
    found = art.diagnostics.importance(model, guide, 5_000)
    return found.elbo, found.elbo_se


def test_f08_scale_floor():
    """Posteriors of any width are fitted, in a number of steps that does not depend on it."""
    for sd in (1e-4, 1e4):

        def model(sd=sd):
            loc = torch.full((2,), 3 * sd)
            z = pyro.sample("z", dist.Normal(loc, 2 * sd).to_event(1))
            pyro.sample("y", dist.Normal(z, sd * (4 / 3) ** 0.5).to_event(1), obs=loc)

        guide = small(model)
        art.fit(model, guide, num_steps=200, **quick)
        assert (unconstrained(guide, 4_000).std(0) / sd - 1).abs().max() < 0.1


def test_f09_bad_start():
    """A guide starts as Normal(init_loc, init_scale), and so is quick to reach a far target."""
    values = {"z": torch.tensor(-40.0), "s": torch.tensor(3.0).exp()}
    for scale in (0.1, 2.0):
        pyro.clear_param_store()
        init = init_to_value(values=values)
        guide = small(models.wide_prior, init_loc_fn=init, init_scale=scale)
        guide()
        z = unconstrained(guide, 20_000)
        assert (z.mean(0) - torch.tensor([-40.0, 3.0])).abs().max() < 0.05 * scale
        assert (z.std(0) / scale - 1).abs().max() < 0.05
    pyro.clear_param_store()
    guide = small(models.far_target)
    train(guide, models.far_target, 400)
    z = unconstrained(guide, 2_000)
    assert (z.mean(0) + 300).abs().max() < 0.5
    assert (z.std(0) - 1).abs().max() < 0.3


def test_f11_nan_gradient():
    """A step without a finite loss changes no parameter, is counted, and names the site."""
    factor = torch.ones(1)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("fine", dist.Normal(z[..., 0], 1.0), obs=torch.tensor(0.5))
        pyro.sample("broken", dist.Normal(z[..., 1] * factor[0], 1.0), obs=torch.tensor(0.5))

    for fault in (math.nan, math.inf):

        def callback(step, elbo, fault=fault):
            factor[0] = fault if step == 5 else 1.0

        guide = small(model)
        with pyro.validation_enabled(False):
            result = art.fit(model, guide, num_steps=20, callback=callback, **quick)
        assert all(value.isfinite().all() for value in guide.parameters())
        assert result.num_skipped == 1
        assert "broken" in repr(result)
        assert "fine" not in repr(result)


def test_f15_second_guide():
    """Two guides in one process both train, with either setting of the param store."""
    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            pyro.clear_param_store()
            found = [small(models.regression) for _ in range(3)]
            for guide in found:
                guide()
                before = parameters(guide)
                train(guide, models.regression, 4)
                assert before
                assert not unmoved(guide, before)
            before = parameters(found[0])
            train(found[1], models.regression, 4)
            assert len(unmoved(found[0], before)) == len(before)


def test_f16_unregistered():
    """However a flow is put together, the guide owns its parameters and every one moves."""
    affine = partial(art.affine_autoregressive, hidden_dims=16)
    spline = partial(art.spline_autoregressive, hidden_dims=16)
    flows = [
        affine,
        lambda dim: affine(dim).inv,
        lambda dim: art.iaf(dim, 2, 16),
        lambda dim: art.maf(dim, 2, 16),
        lambda dim: transforms.chain([affine(dim), spline(dim).inv]),
        lambda dim: transforms.chain([affine(dim), spline(dim)]).inv,
        lambda dim: transforms.ComposedTransform(affine(dim), affine(dim)),
        partial(pyro.distributions.transforms.iterated, 2, affine),
    ]
    for flow in flows:
        guide = guides.AutoAutoregressive(models.regression, flow=flow)
        guide()
        before = parameters(guide)
        train(guide, models.regression, 5)
        assert before
        assert not unmoved(guide, before)


def test_f14_untrainable_after_load(tmp_path):
    """A guide that was loaded starts where it was and goes on training."""
    guide, data = small(models.regression), torch.tensor(models.DATA)
    train(guide, models.regression, 15, data)
    points = torch.linspace(-2, 2, 14).reshape(7, 2)
    expected = guide.get_posterior().log_prob(points)
    torch.save(guide.state_dict(), tmp_path / "state")
    other = small(models.regression)
    other(data)
    other.load_state_dict(torch.load(tmp_path / "state"))
    for twin in (other, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.equal(twin.get_posterior().log_prob(points), expected)
        before, of_first = parameters(twin), parameters(guide)
        train(twin, models.regression, 4, data)
        assert not unmoved(twin, before)
        assert len(unmoved(guide, of_first)) == len(of_first)


def test_f24_subsampled_locals():
    """Latents in a sub-sampled plate: a clear error."""
    with pytest.raises(ValueError, match=r"(?i)z.*sub-?sampl|sub-?sampl.*z"):
        small(models.subsampled)()


def test_f25_batch_size():
    """A short last batch is no other loss, and a batch of local latents does not broadcast."""
    data, guide = torch.tensor(models.DATA), small(models.regression)
    for batch in (data, data[:3], data.repeat(2), data[:1]):
        assert all(map(math.isfinite, train(guide, models.regression, 2, batch)))
    for parallel in (False, True):
        predictive = Predictive(models.regression, guide=guide, num_samples=7, parallel=parallel)
        assert predictive(data.repeat(3))["obs"].shape[-1] == 24
    guide = small(models.locals_on)
    train(guide, models.locals_on, 2, data)
    for batch in (data[:1], data[:3], data.repeat(2)):
        with pytest.raises(ValueError, match=r"z|data|obs"):
            train(guide, models.locals_on, 1, batch)


def test_f26_vectorized_particles():
    """Particles in one call have the same mean loss as in a loop."""
    guide, found = small(models.regression), []
    train(guide, models.regression, 20)
    for vectorized in (False, True):
        elbo = Trace_ELBO(num_particles=20, vectorize_particles=vectorized, max_plate_nesting=1)
        with torch.no_grad():
            found.append(torch.tensor([elbo.loss(models.regression, guide) for _ in range(20)]))
    off = abs(found[0].mean() - found[1].mean())
    assert off < 4 * ((found[0].var() + found[1].var()) / 20).sqrt()


def test_f28_dynamic_support():
    """A support that depends on a latent: an early error that names the site."""
    with pytest.raises(ValueError, match=r"(?s)inner.*support|support.*inner"):
        small(models.dynamic_support)()


def test_f29_growing_state():
    """Draws leave nothing behind: a single object for each of them would be seen."""
    pyro.clear_param_store()
    guide = small(models.far_target)
    for _ in range(60):
        guide()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(300):
        guide()
    gc.collect()
    assert len(gc.get_objects()) - before < 30


def test_f30_reported_good():
    """What is called good has the right moments, and no mode of it is lost."""
    for model, mean, sd in (models.correlated(), models.two_modes(4.0), models.two_modes(20.0)):
        guide = small(model)
        result = art.fit(model, guide, num_steps=300, draws=100, **quick)
        z = unconstrained(guide, 20_000)[:, 0]
        assert result.trusted or mean != 1.0
        if result.trusted:
            assert abs(z.mean() - mean) < 0.3 * sd
            assert abs(z.std() / sd - 1) < 0.4


def test_f31_above_evidence():
    """An ELBO is 0 where the guide is the posterior, and never above the evidence."""
    guide = small(models.standard, init_loc_fn=init_to_mean, init_scale=1.0)
    guide()
    elbo, error = elbo_of(models.standard, guide)
    assert abs(elbo) < 4 * error + 1e-6
    for model, *_ in (models.correlated(), models.two_modes(4.0)):
        guide = small(model)
        art.fit(model, guide, num_steps=30, **quick)
        elbo, error = elbo_of(model, guide)
        assert elbo < 4 * error


def check_elbo_as_written(make):
    """The ELBO is Pyro's for the model as it is written."""
    model = models.hierarchy_of(make)
    guide = small(model)
    guide()
    found, error = elbo_of(model, guide)
    elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        expected = -torch.tensor([elbo.loss(model, guide) for _ in range(50)])
    assert abs(found - expected.mean()) < 4 * (error + expected.std() / 50**0.5) + 1e-6


def test_f38_masked_prior():
    mask = torch.tensor([True, False, True])
    check_elbo_as_written(lambda loc, scale: dist.Normal(loc, scale).mask(mask))


def test_f39_subclass():
    check_elbo_as_written(models.Shifted)


def test_f40_value_read():
    """Where a factor depends on what Python reads, draws have its shares or are not trusted."""
    torch.set_default_dtype(torch.float32)
    for read in (lambda z: z.tolist(), lambda z: z.numpy().tolist()):

        def model(read=read):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("piecewise", -3.0 * (z.new_tensor(read(z.detach())) > 0))

        chains = art.mcmc(model, draws=400, seed=0, progress=False)
        share = float((chains.draws["z"] > 0).double().mean())
        assert abs(share - 1 / (1 + math.exp(3.0))) < 0.06 or not chains.trusted


def test_f42_indefinite_curvature():
    """A fit of a state-space model has a finite ELBO, whatever the curvature at its start is."""
    torch.set_default_dtype(torch.float32)
    guide = guides.AutoStructuredFlow(models.local_linear_trend)
    art.fit(models.local_linear_trend, guide, num_steps=1, **quick)
    assert abs(elbo_of(models.local_linear_trend, guide)[0]) < 1e4


def test_f43_prior_trusted():
    """Who forgets the data is warned, and the prior is not called the posterior."""

    def model():
        pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", len(models.DATA)):
            pyro.sample("y", dist.Normal(torch.zeros(()), 1.0))

    with pytest.warns(match="prior"):
        assert not art.fit(model, small(model), num_steps=50, draws=100, **quick).trusted


def test_f45_silent_loop():
    """Where a model runs for one draw after the other, the seconds to come are said once."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum() if z[0].item() > 0 else -z.sum()  # of one draw only
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.ones(()))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        art.fit(model, small(model), num_steps=3, **quick)
    assert sum("seconds" in str(w.message) for w in caught) == 1
