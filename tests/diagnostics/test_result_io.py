# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Results in files: draws, numbers and the verdict come back, and other files do not."""

import os
import pickle
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from pyro_artransform import FitResult
from pyro_artransform._base import files
from pyro_artransform.diagnostics.checks import Check, Verdict
from pyro_artransform.diagnostics.plates import PlateDiagnostics
from pyro_artransform.sampling import Chains, mcmc
from tests.inference import models
from tests.inference.conftest import quick_fit


@pytest.fixture(scope="module")
def result():
    return quick_fit(models.regression, seed=0, num_steps=3, progress=False)


def same(one, other):
    """Whether two results have the same numbers, draws and sentences."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        names = {each.name for each in fields(one)} - {"model", "guide"}
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and (one == other or repr(one) == repr(other) == "nan")


def test_a_fit(result, tmp_path):
    path = tmp_path / "result.pt"
    result.save(path)
    found = FitResult.load(path, models.regression)
    assert same(result, found)
    assert not same(replace(result, elbo=0.0), found)
    assert repr(found) == repr(result)
    assert repr(found.summary()) == repr(result.summary())
    assert found.predict()["y"].shape == result.predict()["y"].shape
    assert found.chains.predict(torch.zeros(2))["y"].shape[1:] == (2,)
    assert found.guide is None
    assert os.listdir(tmp_path) == ["result.pt"]


def test_chains(tmp_path):
    chains = mcmc(models.regression, draws=50, progress=False)
    chains.save(tmp_path / "chains.pt")
    assert same(chains, Chains.load(tmp_path / "chains.pt"))


def test_everything_that_a_result_may_have(result, tmp_path):
    """Of mini-batches with latents of their elements, with checks that failed, in expanded tensors."""
    numbers = dict.fromkeys(("khat", "khat_se", "tail_share", "gap"), torch.zeros(()).expand(3))
    judged = Verdict((Check.POINT.failed(),), notes=("A note.",))
    elements = PlateDiagnostics(plate="class", index=torch.arange(3), **numbers)
    odd = replace(
        result, elements={"class": elements}, judged=judged, culprits={"class": 2}, chains=None
    )
    odd = replace(odd, draws=None, khat=float("nan"))
    odd.save(tmp_path / "odd.pt")
    found = FitResult.load(tmp_path / "odd.pt", models.regression)
    assert same(odd, found)
    for ask in (found.summary, found.predict):
        with pytest.raises(ValueError, match="AutoIAF: expected a guide or draws"):
            ask()


@pytest.mark.parametrize("check", Check)
def test_a_check_can_be_pickled(check):
    """Processes of one fit send each other its result."""
    assert pickle.loads(pickle.dumps(check)) is check is deepcopy(check)


def test_predictions_need_the_model(result, tmp_path):
    result.save(tmp_path / "result.pt")
    with pytest.raises(ValueError, match="expected a model"):
        FitResult.load(tmp_path / "result.pt").predict()


def test_other_files_are_refused(result, tmp_path):
    path = tmp_path / "file.pt"
    result.save(path)
    kind = torch.load(path, weights_only=True)["format"]
    with pytest.raises(ValueError, match=r"of class Chains, format 1, got .* of class FitResult"):
        Chains.load(path)
    for content in ({}, {"result": 1}, {"result": ("Chains", {})}, {"result": ("open", {})}):
        files.save(path, {"format": kind, **content})
        with pytest.raises(ValueError, match=r"file.pt: expected a file written by FitResult.save"):
            FitResult.load(path)
    result.guide.save(path)
    with pytest.raises(ValueError, match="expected the draws and the verdict"):
        FitResult.load(path)
    path.write_bytes(b"no file of ours")
    with pytest.raises(ValueError, match="expected the draws and the verdict"):
        FitResult.load(path)


def test_parameters_of_the_model_are_in_no_file(tmp_path):
    """Without them the model predicts as it did at first, which nobody would see."""
    fitted = quick_fit(models.with_param, num_steps=2, progress=False)
    assert fitted.point_estimates
    with pytest.warns(UserWarning, match="the file does not contain the parameters of the model"):
        fitted.save(tmp_path / "result.pt")
    assert FitResult.load(tmp_path / "result.pt").point_estimates == fitted.point_estimates
