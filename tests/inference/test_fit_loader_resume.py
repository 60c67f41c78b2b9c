# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits by mini-batches that are repeated, and that go on from a file."""

import signal

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.inference import loaders
from tests.inference.loaders import KNOWN, Autoencoder, rows, shuffled, small
from tests.inference.test_fit_loader import fitted
from tests.inference.test_fit_resume import fresh, parameters, same, stop_at


@pytest.mark.parametrize("name", KNOWN)
def test_seed(name):
    def run(seed):
        pyro.clear_param_store()
        torch.manual_seed(7)
        guide, loader = small(loaders.regression), KNOWN[name](*rows())
        torch.manual_seed(3)
        result = fitted(loaders.regression, guide, loader, epochs=2, seed=seed)
        return result.history, result.elbo, parameters(), torch.rand(3)

    a, b, other = run(1), run(1), run(2)
    assert a[:2] == b[:2]
    assert same(a[2], b[2])
    assert other[0] != a[0]
    torch.manual_seed(3)
    assert torch.equal(a[3], torch.rand(3))


RESUMED = {
    **{name: (name, small, loaders.regression) for name in KNOWN},
    "stock": ("shuffled", AutoNormal, loaders.regression),
}


@pytest.mark.parametrize("name", RESUMED)
def test_no_step_is_lost(name, tmp_path):
    """Left in the middle of an epoch, and at the end of one."""
    order, kind, model = RESUMED[name]
    path = tmp_path / "fit.pt"

    def run(**options):
        model_, guide = fresh(model, kind, options.pop("started", 0))
        return fitted(model_, guide, KNOWN[order](*rows()), **options)

    whole = run(epochs=4, seed=3)
    expected = parameters()
    for at in (8, 15):
        part = run(epochs=4, seed=3, checkpoint=path, callback=stop_at(at))
        assert part.num_steps == at
        rest = run(resume=path, started=1)
        assert rest.history == whole.history
        assert same(expected, parameters())
        assert (rest.elbo, rest.elbo_se, rest.end) == (whole.elbo, whole.elbo_se, whole.end)
        assert rest.verdict == whole.verdict


def test_parameters_of_the_model_go_on(tmp_path):
    (x, _), path = rows(), tmp_path / "fit.pt"

    def run(started, **options):
        pyro.clear_param_store()
        torch.manual_seed(started)
        networks = Autoencoder()
        guide = networks.guide()
        result = fitted(networks.model, guide, shuffled(x), **options)
        return result, {k: v.detach().clone() for k, v in networks.named_parameters()}

    whole, expected = run(0, epochs=3, seed=3)
    run(0, epochs=3, seed=3, checkpoint=path, callback=stop_at(7))
    rest, found = run(1, epochs=3, resume=path)
    assert rest.history == whole.history
    assert same(expected, found)


def test_interrupt_in_the_middle_of_an_epoch(tmp_path):
    def interrupt(step, elbo):
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    path, batches = tmp_path / "fit.pt", rows()

    def run(**options):
        return fitted(*fresh(loaders.regression, small), shuffled(*batches), **options)

    whole = run(epochs=3, seed=3)
    expected = parameters()
    part = run(epochs=3, seed=3, checkpoint=path, callback=interrupt)
    assert part.num_steps == 7
    assert "resume it" in part.verdict
    rest = run(epochs=3, resume=path)
    assert rest.history == whole.history
    assert same(expected, parameters())


def test_unknown_order_goes_on_from_the_next_epoch(tmp_path):
    path = tmp_path / "fit.pt"

    def run(at=None, **options):
        callback = None if at is None else stop_at(at)
        model, guide = fresh(loaders.regression, small)
        return fitted(model, guide, loaders.Unknown(*rows()), callback=callback, **options)

    run(at=7, epochs=3, checkpoint=path)
    with pytest.warns(UserWarning, match="goes on from the next epoch") as caught:
        assert run(resume=path).num_steps == 15
    assert [warning.filename.split("/")[-1] for warning in caught] == ["test_fit_loader.py"]
    run(at=10, epochs=3, checkpoint=path)
    assert run(resume=path).num_steps == 15


def test_checkpoints_of_another_loader(tmp_path):
    path, (x, y) = tmp_path / "fit.pt", rows()

    def run(loader, **options):
        return fitted(*fresh(loaders.regression, small), loader, **options)

    run(shuffled(x, y), epochs=2, checkpoint=path, callback=stop_at(3))
    with pytest.raises(ValueError, match="expected a loader of 5 batches"):
        run(shuffled(x, y, batch_size=20), num_steps=10, resume=path)
    with pytest.raises(ValueError, match="num_steps=10, as before, got 15"):
        run(shuffled(x, y), epochs=3, resume=path)
    with pytest.raises(ValueError, match="made with a loader, got none"):
        run([(x, y)], resume=path)
