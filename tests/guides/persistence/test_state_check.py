# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Files that somebody has changed: an error that says what is wrong, at once, and in little memory."""

import functools
import io
import json
import tempfile
import zipfile
from pathlib import Path

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyro_artransform import spline_autoregressive
from pyro_artransform.guides import (
    AutoAmortized,
    AutoAutoregressive,
    AutoIAF,
    AutoMAF,
    AutoStructuredFlow,
)
from pyro_artransform.guides.persistence.spec import plain_to_tensor
from tests.guides import models


def groups(values):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(values)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=values)


FLOW = {"flow": spline_autoregressive}
GUIDES = {
    "iaf": lambda: AutoIAF(models.regression, num_transforms=1, hidden_dims=8),
    "maf": lambda: AutoMAF(models.regression, num_transforms=1, hidden_dims=8),
    "one": lambda: AutoIAF(models.one_dimensional),
    "custom": lambda: AutoAutoregressive(models.regression, **FLOW),
    "structured": lambda: AutoStructuredFlow(groups, hidden_dim=4),
    "amortized": lambda: AutoAmortized(models.locals_of),
}


@functools.cache
def file_of(name):
    """The class of a guide, the bytes of its file, and what load needs besides."""
    guide = GUIDES[name]()
    guide(models.data())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guide"
        guide.save(path)
        return type(guide), path.read_bytes(), FLOW if name == "custom" else {}


def arguments(**changed):
    return lambda saved: saved["spec"]["arguments"].update(changed)


def graph(**changed):
    return lambda saved: saved["spec"]["arguments"]["graph"].update(changed)


def site(**changed):
    return lambda saved: saved["spec"]["sites"][-1].update(changed)


def tensor(name, change):
    def changed(saved):
        saved["state"][name] = change(saved["state"][name])

    return changed


def expand_all(saved):
    for name, value in saved["state"].items():
        if value.is_floating_point():
            saved["state"][name] = value.new_zeros(1).expand(value.shape)


def activation(name, **constants):
    return arguments(nonlinearity={"module": name, "constants": constants})


LOC = "transform.transforms.1.loc"
SIZES = "at least .* numbers"
BOUNDS = {
    "support": "greater_than",
    "bounds": {"lower_bound": {"tensor": [[0.0]] * 3, "dtype": "float32"}},
}
CHANGES = {
    "layers of an iaf": ("iaf", arguments(num_transforms=10**8), SIZES),
    "layers of a maf": ("maf", arguments(num_transforms=10**8), SIZES),
    "layers in one dimension": ("one", arguments(num_transforms=10**8), SIZES),
    "layers of a structured flow": ("structured", arguments(num_transforms=10**8), SIZES),
    "widths": ("iaf", arguments(hidden_dims=[2**20, 2**20]), SIZES),
    "hidden layers": ("iaf", arguments(hidden_dims=[1] * 10**5), SIZES),
    "width of a structured flow": ("structured", arguments(hidden_dim=10**9), SIZES),
    "embedding": ("amortized", arguments(embedding_dim=2**40), SIZES),
    "features": ("amortized", arguments(feature_dims={"data": 2**40}), SIZES),
    "shape": ("iaf", site(shape=[2**40]), SIZES),
    "shape for a flow of the user": ("custom", site(shape=[3000]), SIZES),
    "shape of elements": ("amortized", site(shape=[2**40], plates=[]), SIZES),
    "shape of a structured flow": (
        "structured",
        site(shape=[2**40], plates=[]),
        "graph: expected the parents",
    ),
    "negative shape": ("iaf", site(shape=[-1]), "negative"),
    "plate of embeddings": ("amortized", site(plates=[["data", -1, 2**40, 0, 2**40]]), SIZES),
    "plate": (
        "structured",
        site(plates=[["groups", -1, 2**40, 0, None]]),
        SIZES,
    ),
    "sub-sampled plate": ("structured", site(plates=[["groups", -1, 8, 0, 2**40]]), "sub-sampled"),
    "plate without a dimension": ("iaf", site(plates=[["p", -1, 2**40, 0, None]]), SIZES),
    "bounds": (
        "iaf",
        site(support=BOUNDS),
        r"'scale': expected values of shape \(\), got \(3, 1\)",
    ),
    "edge": ("structured", graph(edges=[[0, 10**9]]), r"graph: .* coordinates \[1000000000\]"),
    "root": ("structured", graph(root=[-1]), r"graph: .* coordinates \[-1\]"),
    "cycle": ("structured", graph(parents=[[1], [0], *[[]] * 7]), "got one with a cycle"),
    "large root": ("structured", graph(root=[0] * 10**5), SIZES),
    "graph": ("structured", arguments(graph=None), "expected a guide with this flow"),
    "large activation": (
        "iaf",
        activation("PReLU", num_parameters=2**40),
        "an activation, got PReLU",
    ),
    "no activation": ("iaf", activation("Transformer", num_encoder_layers=10**9), "'Transformer'"),
    "expanded tensors": ("iaf", expand_all, SIZES),
    "expanded tensor": ("iaf", tensor(LOC, lambda loc: loc[:1].expand(2**40)), SIZES),
    "another shape": ("iaf", tensor(LOC, lambda loc: loc[:1]), "size mismatch for"),
    "sparse": ("iaf", tensor(LOC, torch.Tensor.to_sparse), "expected a guide with this flow"),
    "not a tensor": ("iaf", tensor(LOC, torch.Tensor.tolist), "expected a guide with this flow"),
    "not finite": (
        "iaf",
        tensor(LOC, lambda loc: loc / 0),
        f"parameter '{LOC}': expected finite numbers, got 2 of 2",
    ),
    "missing": ("iaf", lambda saved: saved["state"].pop(LOC), "expected a guide with this flow"),
    "fewer layers": ("iaf", arguments(hidden_dims=[4]), "expected a guide with this flow"),
    "no state": ("iaf", lambda saved: saved.update(state=3), "expected what the guide's save"),
    "no spec": ("iaf", lambda saved: saved.update(spec={}), "expected what the guide's save"),
    "another class": ("iaf", lambda s: s.update({"class": "AutoMAF"}), "AutoIAF, got AutoMAF"),
    "older": ("iaf", lambda saved: saved.update(format=7), "got one of format 7, which another"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file(change, tmp_path):
    name, edit, message = CHANGES[change]
    path = tmp_path / "guide"
    kind, content, options = file_of(name)
    saved = torch.load(io.BytesIO(content))
    edit(saved)
    torch.save(saved, path)
    assert path.stat().st_size < 300_000
    with pytest.raises(ValueError, match=message):
        kind.load(path, **options)


@pytest.mark.parametrize("name", GUIDES)
def test_a_file_that_nobody_changed(name, tmp_path):
    kind, content, options = file_of(name)
    (tmp_path / "guide").write_bytes(content)
    kind.load(tmp_path / "guide", **options)


def test_widths_do_not_matter_in_one_dimension(tmp_path):
    """There are no networks, so that a file of any widths is small."""
    guide = AutoIAF(models.one_dimensional, hidden_dims=[2**20, 2**20])
    guide(models.data())
    guide.save(tmp_path / "guide")
    AutoIAF.load(tmp_path / "guide")


def test_an_archive_is_not_unpacked(tmp_path):
    """One whose directory says that it is larger than the file is not read."""
    path = tmp_path / "guide"
    with zipfile.ZipFile(io.BytesIO(file_of("iaf")[1])) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/999", bytes(2**25))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="another file, or a damaged one"):
        AutoIAF.load(path)


def test_a_huge_state_dict_is_not_built():
    guide = AutoIAF(models.regression, hidden_dims=8)
    guide(models.data())
    state, plain = (
        guide.state_dict(),
        json.loads(bytes(guide.state_dict()["_extra_state"].tolist())),
    )
    plain["sites"][0]["shape"] = [2**20]
    state["_extra_state"] = plain_to_tensor(plain)
    with pytest.raises(RuntimeError, match="does not fit the sites and arguments of its guide"):
        AutoIAF(models.regression).load_state_dict(state)
