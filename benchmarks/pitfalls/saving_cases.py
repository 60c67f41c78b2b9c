# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Cases about saving, loading, copying and pickling."""

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from pitfalls import models
from pitfalls.subject import (
    NotApplicable,
    Subject,
    in_fresh_process,
    mean_loss,
    parameters,
    prepare,
    train,
    unmoved,
)


def grid(dim: int) -> Tensor:
    return torch.linspace(-2, 2, 7 * dim).reshape(7, dim).sin() * 2


def score(guide) -> Tensor:
    with torch.no_grad():
        return guide.get_posterior().log_prob(grid(guide.latent_dim))


def trained_guide(subject: Subject):
    guide = subject.guide(models.regression)
    train(guide, models.regression, 15, lr=0.01)
    return guide


def _write_guides(subject: Subject) -> None:
    """Each way of saving, from a process of its own state, once for all cases."""
    if (subject.folder / "scores").exists():
        return
    guide = trained_guide(subject)
    torch.save(
        {"score": score(guide), "loss": mean_loss(guide, models.regression)},
        subject.folder / "scores",
    )
    for name, (save, _) in subject.save_paths().items():
        _noting(name, lambda save=save, name=name: save(guide, subject.folder / name))


def _noting(name: str, act: Callable) -> object:
    try:
        return act()
    except AssertionError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise AssertionError(f"{name}: {type(error).__name__}: {first[:120]}") from error


def f13_not_restored(subject: Subject) -> None:
    """Saved, and loaded by another process with another seed: the same density to the bit."""
    for family in subject.families:
        flow = subject.scramble(subject.flow(5, family, layers=3))
        x = grid(5)
        with torch.no_grad():
            expected = subject.distribution(flow, 5).log_prob(x)
        torch.save((family, flow.state_dict(), expected), subject.folder / f"flow {family}")
    if subject.families:
        _check_order_is_loaded(subject)
    with suppress(NotApplicable):
        subject.guide(models.regression)
        _write_guides(subject)
    in_fresh_process(subject, _load_all, seed=11)


def _check_order_is_loaded(subject: Subject) -> None:
    """A state dict brings the order of its flow with it, whatever the new one was built with."""
    for i, k in itertools.permutations(range(len(subject.reordered_flows(5))), 2):
        own, saved = subject.reordered_flows(5)[i], subject.reordered_flows(5)[k]
        subject.scramble(saved, 2.0)
        own.load_state_dict(saved.state_dict(), strict=True)
        x = grid(5)
        y = subject.call_and_ladj(saved, x)[0].detach().clone()
        assert torch.equal(subject.call_and_ladj(own, x)[0], y), "another order, another map"
        off = (subject.inverse(own, y) - x).abs().max()
        assert off < 1e-9, f"the inverse kept the order that it was built with: off by {off:.1g}"


def _load_all(subject: Subject) -> None:
    """In a new process: the flows that were written, and the guides."""
    for path in sorted(subject.folder.glob("flow *")):
        family, state, expected = torch.load(path)
        flow = subject.flow(5, family, layers=3)
        flow.load_state_dict(state, strict=True)
        with torch.no_grad():
            now = subject.distribution(flow, 5).log_prob(grid(5))
        assert torch.equal(now, expected), f"{family}: off by {(now - expected).abs().max():.2g}"
    if not (subject.folder / "scores").exists():
        return
    expected = torch.load(subject.folder / "scores")["score"]
    for name, (_, load) in subject.save_paths().items():
        prepare(12)
        guide = _noting(
            name, lambda load=load, path=subject.folder / name: load(path, models.regression)
        )
        now = _noting(name, lambda guide=guide: score(guide))
        assert torch.equal(now, expected), f"{name}: off by {(now - expected).abs().max():.2g}"


def f14_untrainable_after_load(subject: Subject) -> None:
    """A guide that was loaded starts where it was and goes on training."""
    subject.guide(models.regression)
    _write_guides(subject)
    in_fresh_process(subject, _resume_guides, seed=13)


def _resume_guides(subject: Subject) -> None:
    saved = torch.load(subject.folder / "scores")["loss"]
    for name, (_, load) in subject.save_paths().items():
        prepare(14)
        guide = _noting(
            name, lambda load=load, path=subject.folder / name: load(path, models.regression)
        )
        start = _noting(name, lambda guide=guide: mean_loss(guide, models.regression))
        assert abs(start - saved) < 1e-6, f"{name}: loss {start:.3f} where it was {saved:.3f}"
        before = parameters(guide)
        assert before, f"{name}: no parameters"
        _noting(name, lambda guide=guide: train(guide, models.regression, 50))
        still = unmoved(guide, before)
        assert not still, f"{name}: {len(still)} of {len(before)} parameters never move"
        end = mean_loss(guide, models.regression)
        assert end < start, f"{name}: loss {start:.3f} before 50 steps, {end:.3f} after"


def f17_load_before_call(subject: Subject) -> None:
    """Built from its arguments alone, a flow or guide loads strictly, and draws without data."""
    for family in subject.families:
        state = subject.scramble(subject.flow(3, family, layers=2)).state_dict()
        flow = subject.flow(3, family, layers=2)
        flow.load_state_dict(state, strict=True)
        assert subject.distribution(flow, 3).sample((4,)).shape == (4, 3)
    try:
        guide = trained_guide(subject)
    except NotApplicable:
        return
    state, expected = guide.state_dict(), score(guide)
    prepare(3)
    fresh = subject.guide(models.regression)
    _noting("before the first call", lambda: fresh.load_state_dict(state, strict=True))
    draws = subject.sample_without_data(fresh)
    assert set(draws) >= {"loc", "scale"}, f"drew {sorted(draws)}"
    assert torch.equal(score(fresh), expected), "loaded before the first call, another density"


def f18_copies(subject: Subject) -> None:
    """Deep copies and pickles work at any moment, and train apart from the original."""
    for family in subject.families:
        flow = subject.scramble(subject.flow(3, family, layers=2))
        for moment, use in _uses_of_flow(subject).items():
            use(flow)
            for way in (copy.deepcopy, _through_pickle):
                where = f"{family} flow, {way.__name__} {moment}"
                _check_copy(where, flow, _noting(where, lambda w=way, f=flow: w(f)), subject)
    try:
        guide = subject.guide(models.regression)
    except NotApplicable:
        return
    for moment, use in _uses_of_guide().items():
        use(guide)
        for way in (copy.deepcopy, _through_pickle):
            where = f"guide, {way.__name__} {moment}"
            before = score(guide)
            twin = _noting(where, partial(way, guide))
            assert torch.equal(score(guide), before), f"{where}: changes the original"
            _check_guide_copy(where, guide, twin)


def _through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def _uses_of_flow(subject: Subject) -> dict[str, Callable]:
    def forward(flow):
        subject.call_and_ladj(flow, torch.randn(4, 3))

    def backward(flow):
        (-subject.distribution(flow, 3).log_prob(torch.randn(4, 3)).mean()).backward()

    def draw(flow):
        q = subject.distribution(flow, 3)
        q.log_prob(q.rsample((4,)))

    def inverse(flow):
        subject.inverse(flow, torch.randn(4, 3))
        subject.inverse_module(flow)

    return {
        "when new": lambda flow: None,
        "after forward": forward,
        "after backward": backward,
        "after a draw": draw,
        "after .inv": inverse,
    }


def _uses_of_guide() -> dict[str, Callable]:
    return {
        "after the first call": lambda guide: guide(),
        "after a step": lambda guide: train(guide, models.regression, 3),
    }


def _check_copy(where: str, flow, twin, subject: Subject) -> None:
    x = grid(3)
    with torch.no_grad():
        expected = subject.call_and_ladj(flow, x)[0]
        assert torch.equal(subject.call_and_ladj(twin, x)[0], expected), f"{where}: another map"
    before = parameters(flow)
    (-subject.distribution(twin, 3).log_prob(x).mean()).backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.sub_(0.1)
        assert len(unmoved(flow, before)) == len(before), f"{where}: moves the original"
        assert not torch.equal(subject.call_and_ladj(twin, x)[0], expected), f"{where}: stuck"
        assert torch.equal(subject.call_and_ladj(flow, x)[0], expected), f"{where}: shares state"


def _check_guide_copy(where: str, guide, twin) -> None:
    assert torch.equal(score(guide), score(twin)), f"{where}: another density"
    own, copied = parameters(guide), parameters(twin)
    assert own, f"{where}: no parameters"
    assert own.keys() == copied.keys(), f"{where}: {len(copied)} of {len(own)} parameters"
    _noting(where, lambda: train(twin, models.regression, 4))
    still = unmoved(twin, copied)
    assert not still, f"{where}: {len(still)} of {len(copied)} parameters of the copy never move"
    assert len(unmoved(guide, own)) == len(own), f"{where}: training the copy moves the original"
    _noting(where, lambda: train(guide, models.regression, 4))
    still = unmoved(guide, own)
    assert not still, f"{where}: {len(still)} of {len(own)} parameters of the original never move"


def f19_inverse_copies(subject: Subject) -> None:
    """The inverse is copied and pickled like the flow, and making it a thousand times is free.

    What torch does here has changed more than once: to be run with the oldest and the newest.
    """
    subject.needs_flows()
    for family in subject.families:
        flow = subject.scramble(subject.flow(3, family))
        y = grid(3)
        with torch.no_grad():
            expected = subject.inverse(flow, y)
        for moment, use in _uses_of_flow(subject).items():
            use(flow)
            inverse = subject.inverse_module(flow)
            for way in (copy.deepcopy, _through_pickle):
                where = f"{family}, {way.__name__} of the inverse {moment}"
                twin = _noting(where, lambda w=way, i=inverse: w(i))
                x = _noting(where, lambda t=twin, y=y: subject.apply_inverse(t, y))
                assert torch.equal(x, expected), f"{where}: another map"
                assert len(list(twin.parameters())) > 0, f"{where}: no parameters"
        _check_no_cycles(family, lambda f=flow: subject.inverse_module(f))


def _check_no_cycles(where: str, make: Callable) -> None:
    make()
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(1000):
            make()
        grown = len(gc.get_objects()) - before
    finally:
        if enabled:
            gc.enable()
    assert grown < 500, f"{where}: {grown} objects more after making 1000 inverses"


def f20_weights_only(subject: Subject) -> None:
    """What is saved as tensors opens with ``torch.load(path)`` as it is by default."""
    for family in subject.families:
        path = subject.folder / f"weights {family}"
        torch.save(subject.flow(3, family).state_dict(), path)
        state = _noting(f"{family} flow", lambda path=path: torch.load(path, weights_only=True))
        subject.flow(3, family).load_state_dict(state, strict=True)
    try:
        guide = trained_guide(subject)
    except NotApplicable:
        return
    for name, save in subject.tensor_files().items():
        path = subject.folder / f"weights {name}"
        save(guide, path)
        _noting(name, lambda path=path: torch.load(path, weights_only=True))
