# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Cases about a guide: where it starts, whether it trains, and what it does with plates."""

import gc
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_value

from pitfalls import models
from pitfalls.subject import (
    NotApplicable,
    Subject,
    parameters,
    prepare,
    pyro_seed,
    train,
    unmoved,
)


def unconstrained_draws(guide, n: int) -> torch.Tensor:
    with torch.no_grad():
        return guide.get_posterior().sample((n,))


def f09_bad_start(subject: Subject) -> None:
    """A guide starts as Normal(init_loc, init_scale), and so is quick to reach a far target."""
    values = {"z": torch.tensor(-40.0), "s": torch.tensor(3.0).exp()}
    expected = torch.tensor([-40.0, 3.0])
    for scale in (0.1, 2.0):
        prepare()
        guide = subject.guide(
            models.wide_prior, init_loc_fn=init_to_value(values=values), init_scale=scale
        )
        guide()
        z = unconstrained_draws(guide, 20_000)
        off = (z.mean(0) - expected).abs().max()
        assert off < 0.05 * scale, f"init_loc missed by {off:.2g} (scale {scale})"
        width = (z.std(0) / scale - 1).abs().max()
        assert width < 0.05, f"init_scale {scale} became {z.std(0).tolist()}"
    prepare()
    guide = subject.guide(models.far_target)
    train(guide, models.far_target, 400, lr=0.02)
    z = unconstrained_draws(guide, 2_000)
    assert (z.mean(0) + 300).abs().max() < 0.5, f"a target at -300: at {z.mean(0).tolist()}"
    assert (z.std(0) - 1).abs().max() < 0.3, f"a target of sd 1: {z.std(0).tolist()}"


def f15_second_guide(subject: Subject) -> None:
    """Two guides in one process both train, with either setting of the param store."""
    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            prepare()
            guides = [subject.guide(models.regression) for _ in range(3)]
            for i, guide in enumerate(guides):
                guide()
                before = parameters(guide)
                train(guide, models.regression, 4)
                still = unmoved(guide, before)
                assert before, "a guide without parameters"
                assert not still, (
                    f"guide {i}, module_local_params={local}: {len(still)} of {len(before)} "
                    f"parameters never move: {still[0]}"
                )
            before = parameters(guides[0])
            train(guides[1], models.regression, 4)
            moved = len(before) - len(unmoved(guides[0], before))
            assert not moved, f"training the second guide moves {moved} parameters of the first"


def f16_unregistered(subject: Subject) -> None:
    """However a flow is put together, the guide owns its parameters and every one moves."""
    for name, construct in subject.constructions().items():
        for dim_model in (models.regression, models.far_target):
            prepare()
            guide = construct(dim_model)
            guide()
            before = parameters(guide)
            assert before, f"{name}: no parameters"
            train(guide, dim_model, 5)
            still = unmoved(guide, before)
            assert not still, f"{name}: {len(still)} of {len(before)} never move: {still[0]}"


def f24_subsampled_locals(subject: Subject) -> None:
    """Latents in a sub-sampled plate: a clear error, or the right scale (ELBO 0 at the prior)."""
    guide = subject.prior_guide(models.subsampled)
    try:
        with pyro_seed(0):
            guide()
    except ValueError as error:
        message = str(error)
        assert "'z'" in message or '"z"' in message or "z" in message.split(), message
        assert re.search(r"sub-?sampl", message, re.I), f"does not say what is wrong: {message}"
        return
    for seed in range(5):
        with pyro_seed(seed), torch.no_grad():
            guide_trace = poutine.trace(guide).get_trace()
            model_trace = poutine.trace(poutine.replay(models.subsampled, guide_trace)).get_trace()
            indices = [
                t.nodes["items"]["value"] for t in (guide_trace, model_trace) if "items" in t.nodes
            ]
            assert all(torch.equal(i, indices[0]) for i in indices), "other items in the model"
            elbo = float(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
        assert abs(elbo) < 1e-3, f"the guide is the prior and the ELBO is {elbo:.3g}, not 0"


def f25_batch_size(subject: Subject) -> None:
    """A short last batch, and a test set of another size.

    Where the latents are in the plate, a guide that is not made for that has to say so: a batch of
    one would broadcast, and give a wrong loss and no sign of it.
    """
    data = torch.tensor(models.DATA)
    guide = subject.guide(models.regression_on)
    for batch in (data, data[:3], data.repeat(2), data[:1]):
        losses = train(guide, models.regression_on, 2, batch)
        assert all(torch.tensor(losses).isfinite()), f"{len(batch)} data: loss {losses}"
    guide = subject.guide(models.predictive_on)
    train(guide, models.predictive_on, 2, data, 2 * data)
    for size in (5, 20):
        new = torch.linspace(0, 1, size)
        for parallel in (False, True):
            predictive = Predictive(
                models.predictive_on, guide=guide, num_samples=7, parallel=parallel
            )
            shape = tuple(predictive(new)["obs"].shape)
            assert shape == (7, size), f"prediction at {size} points: shape {shape}"
    prepare()
    guide = subject.guide(models.locals_on)
    train(guide, models.locals_on, 2, data)
    for batch in (data[:1], data[:3], data.repeat(2)):
        try:
            loss = train(guide, models.locals_on, 1, batch)
        except ValueError as error:
            message = str(error)
            named = re.search(r"['\"](z|data|obs)['\"]|site obs", message)
            assert named, f"{len(batch)} of {len(data)} local latents: no clear error: {message}"
        else:
            raise AssertionError(
                f"{len(batch)} data for {len(data)} local latents: a loss of {loss[0]:.3g}"
            )


def f26_vectorized_particles(subject: Subject) -> None:
    """Particles in one call: one log-density each, and the same mean as in a loop.

    No peer fails. Seen to fail with the log-determinant summed over the particles.
    """
    guide = subject.guide(models.regression)
    train(guide, models.regression, 20)
    with pyro.plate("particles", 11, dim=-2), torch.no_grad():
        trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    shapes = {
        name: tuple(site["log_prob"].shape)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["infer"].get("is_auxiliary")
    }
    assert shapes, "no auxiliary site"
    for name, shape in shapes.items():
        numbers = torch.Size(shape).numel()
        assert numbers == 11, f"{name}: log_prob of shape {shape} for 11 particles"
    means, variances = [], []
    for vectorized in (False, True):
        elbo = Trace_ELBO(num_particles=20, vectorize_particles=vectorized, max_plate_nesting=1)
        with torch.no_grad():
            losses = torch.tensor([elbo.loss(models.regression, guide) for _ in range(20)])
        means.append(losses.mean())
        variances.append(losses.var() / len(losses))
    off = abs(means[0] - means[1]) / (variances[0] + variances[1]).sqrt()
    assert off < 4, f"loop {means[0]:.3f}, vectorised {means[1]:.3f}: {off:.1f} standard errors"
    losses = train(guide, models.regression, 3, elbo=elbo)
    assert all(torch.tensor(losses).isfinite()), f"SVI with vectorised particles: {losses}"


def f28_dynamic_support(subject: Subject) -> None:
    """A support that depends on a latent: an early error that names the site, or it works."""
    guide = subject.guide(models.dynamic_support)
    try:
        guide()
    except ValueError as error:
        message = str(error)
        assert "inner" in message, f"does not name the site: {message}"
        assert "support" in message, f"does not say what is wrong: {message}"
        return
    for step in range(300):
        try:
            (loss,) = train(guide, models.dynamic_support, 1)
        except ValueError as error:
            raise AssertionError(f"step {step}: {str(error).splitlines()[0][:90]}") from error
        assert torch.tensor(loss).isfinite(), f"step {step}: loss {loss}"


def f29_growing_state(subject: Subject) -> None:
    """Draws and scores leave nothing behind: a single object for each of them would be seen."""
    draws = {}
    for family in subject.families:
        for inverse in (False, True):
            flow = subject.scramble(subject.flow(2, family))
            q = subject.distribution(flow, 2, inverse)
            name = f"{family}, inverse={inverse}"
            draws[name] = (q, lambda q=q: q.log_prob(q.rsample((3,))))
    try:
        guide = subject.guide(models.far_target)
    except NotApplicable:
        pass
    else:
        draws["guide"] = (guide, guide)
    for name, (owner, draw) in draws.items():
        _check_flat(name, owner, draw)


def _check_flat(name: str, owner, draw: Callable, times: int = 300) -> None:
    for _ in range(2):  # looking at it leaves things behind too, once
        for _ in range(30):
            draw()
        size, objects, memory = _footprint(owner)
    for _ in range(times):
        draw()
    after = _footprint(owner)
    grown = after[1] - objects
    assert grown < times // 10, f"{name}: {grown} objects more after {times} draws"
    assert after[0] - size < 2_000, f"{name}: {after[0] - size} bytes more after {times} draws"
    grown = (after[2] - memory) / 2**20
    assert grown < 20, f"{name}: {grown:.0f} MiB more after {times} draws"


def _footprint(owner) -> tuple[int, int, int]:
    """The pickled size where it can be pickled, the living objects, the resident memory."""
    gc.collect()
    try:
        size = len(pickle.dumps(owner))
    except Exception:  # what cannot be pickled is another case's concern
        size = 0
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return size, len(gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE")
