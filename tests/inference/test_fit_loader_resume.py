# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits by mini-batches that are repeated, and that go on from a file."""

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from tests.inference import loaders
from tests.inference.loaders import KNOWN, Autoencoder, rows, shuffled, small
from tests.inference.test_fit_loader import fitted
from tests.inference.test_fit_resume import fresh, parameters, same, stop_at


@pytest.mark.parametrize("name", ["shuffled", "with a generator", "weighted"])
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


@pytest.mark.parametrize("kind", [small, AutoNormal])
def test_goes_on_from_the_next_epoch(kind, tmp_path, recwarn):
    """And says so where it was stopped in the middle of one."""
    path = tmp_path / "fit.pt"

    def run(**options):
        model, guide = fresh(loaders.regression, kind)
        return fitted(model, guide, shuffled(*rows()), **options)

    for at, epoch in ((10, None), (8, 2)):
        part = run(epochs=4, seed=3, checkpoint=path, callback=stop_at(at))
        recwarn.clear()
        rest = run(resume=path)
        assert rest.num_steps == 20
        assert rest.history[:at] == part.history
        said = [(str(w.message), w.filename.split("/")[-1]) for w in recwarn]
        words = f"the middle of epoch {epoch} of its loader, and goes on from the next epoch"
        place = "test_fit_loader.py"  # where "fitted" calls it
        expected = [] if epoch is None else [(f"resume: the fit was stopped in {words}", place)]
        assert said == expected


def test_parameters_of_the_model_go_on(tmp_path):
    (x, _), path = rows(), tmp_path / "fit.pt"

    def run(started, **options):
        pyro.clear_param_store()
        torch.manual_seed(started)
        networks = Autoencoder()
        result = fitted(networks.model, networks.guide(), shuffled(x), **options)
        return result, {k: v.detach().clone() for k, v in networks.named_parameters()}

    first, expected = run(0, epochs=2, seed=3, checkpoint=path)
    rest, found = run(1, resume=path)
    assert rest.history == first.history
    assert same(expected, found)


def test_checkpoints_of_another_loader(tmp_path):
    path, (x, y) = tmp_path / "fit.pt", rows()

    def run(loader, **options):
        return fitted(*fresh(loaders.regression, small), loader, **options)

    run(shuffled(x, y), epochs=2, checkpoint=path, callback=stop_at(3))
    with pytest.raises(ValueError, match="expected a loader of 5 batches"):
        run(shuffled(x, y, batch_size=20), num_steps=10, resume=path)
    with pytest.raises(ValueError, match="num_steps=10, as before, got 15"):
        run(shuffled(x, y), epochs=3, resume=path)
    with pytest.raises(ValueError, match="made with loader=, got none"):
        run([(x, y)], resume=path)
