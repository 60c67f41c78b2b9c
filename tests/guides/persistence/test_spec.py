# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Guides as plain data, and files that somebody has changed: a clear error, at once, in little memory."""

import functools
import io
import json
import tempfile
from pathlib import Path

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

from pyro_artransform import spline_autoregressive
from pyro_artransform.flows.conditioners import TiltedSiLU
from pyro_artransform.guides import (
    AutoAmortized,
    AutoAutoregressive,
    AutoIAF,
    AutoMAF,
    AutoStructuredFlow,
)
from pyro_artransform.guides.persistence.spec import GuideSpec
from pyro_artransform.guides.prototype import prototype_trace
from pyro_artransform.model.sites import same_support
from tests.guides import models

FNS = {
    "normal": lambda new: dist.Normal(new([0.0, 1.0]), 1.0).to_event(1),
    "pareto": lambda new: dist.Pareto(new([1.0, 2.5]), 2.0),
    "uniform": lambda new: dist.Uniform(new(-1.0), new([2.0, 1 / 3])).to_event(1),
    "beta": lambda new: dist.Beta(new(1.0), 1.0),
    "mises": lambda new: dist.VonMises(new(1.0), 1.0),
    "dirichlet": lambda new: dist.Dirichlet(new([1.0, 2.0, 3.0])),
    "lkj": lambda new: dist.LKJCholesky(3, new(1.0)),
    "ordered": lambda new: dist.TransformedDistribution(
        dist.Normal(new([0.0, 0.0, 0.0]), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_spec_survives_json(dtype):
    def model():
        with pyro.plate("plate", 2, dim=-3):
            for name, fn in FNS.items():
                pyro.sample(name, fn(torch.zeros((), dtype=dtype).new_tensor))

    guide = AutoIAF(model, hidden_dims=8, nonlinearity=nn.Tanh())
    guide()
    spec = GuideSpec.from_json(guide._spec.to_json(), torch.device("cpu"))
    assert spec.to_json() == guide._spec.to_json()
    assert isinstance(spec.arguments["nonlinearity"], nn.Tanh)
    assert (spec.observed, spec.dtype, spec.device) == ((), dtype, torch.device("cpu"))
    back = prototype_trace(spec.latents, spec.zeros()).nodes
    sites = guide.prototype_trace.nodes
    assert list(back) == list(sites) == list(FNS)
    for name, site in sites.items():
        assert same_support(back[name]["fn"].support, site["fn"].support), name
        for part in ("batch_shape", "event_shape"):
            assert getattr(back[name]["fn"], part) == getattr(site["fn"], part)
        assert back[name]["value"].dtype == site["value"].dtype == dtype
        assert back[name]["cond_indep_stack"] == site["cond_indep_stack"]
        assert back[name]["fn"].support.check(back[name]["value"]).all()


class Odd(constraints.Constraint):
    event_dim = 0

    def check(self, value):
        return value == value


@biject_to.register(Odd)
def _biject_to_odd(constraint):
    return dist.transforms.identity_transform


class OddNormal(dist.Normal):
    support = Odd()


def test_support_that_cannot_be_written(tmp_path):
    def model():
        pyro.sample("fine", dist.Normal(0, 1))
        pyro.sample("odd", OddNormal(0, 1))

    guide = AutoIAF(model, hidden_dims=8)
    guide()
    with pytest.raises(ValueError, match=r"support of site 'odd' cannot be written.* got Odd"):
        guide.save(tmp_path / "guide")
    # a state dict does without
    state, fresh = guide.state_dict(), AutoIAF(model, hidden_dims=8)
    fresh()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.transform.transforms[1].loc, guide.transform.transforms[1].loc)


@pytest.mark.parametrize(
    "nonlinearity",
    [nn.Softplus(beta=2), nn.GELU(approximate="tanh"), TiltedSiLU(0.25), nn.functional.silu],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_nonlinearity(nonlinearity, tmp_path):
    guide = AutoIAF(models.regression, hidden_dims=8, nonlinearity=nonlinearity)
    guide(models.data())
    guide.save(tmp_path / "guide")
    back = AutoIAF.load(tmp_path / "guide")._spec.arguments["nonlinearity"]
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(back(x), nonlinearity(x))
    assert type(back) is type(nonlinearity)


def test_activations_that_cannot_be_written(tmp_path):
    for value in (lambda x: x.tanh(), nn.PReLU()):
        guide = AutoIAF(models.regression, hidden_dims=8, nonlinearity=value)
        guide(models.data())
        with pytest.raises(
            ValueError, match=r"nonlinearity cannot be written .* activation of torch\.nn"
        ):
            guide.save(tmp_path / "guide")


# Files that somebody has changed


def groups(values):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", len(values)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=values)


LOC = "transform.transforms.1.loc"
FLOW = {"flow": spline_autoregressive}
GUIDES = {
    "iaf": lambda: AutoIAF(models.regression, num_transforms=1, hidden_dims=8),
    "maf": lambda: AutoMAF(models.regression, num_transforms=1, hidden_dims=8),
    "one": lambda: AutoIAF(models.one_dimensional),
    "custom": lambda: AutoAutoregressive(models.regression, **FLOW),
    "in coordinates": lambda: AutoIAF(groups, num_transforms=1, hidden_dims=8),
    "structured": lambda: AutoStructuredFlow(groups, hidden_dim=4, coordinates="model"),
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


def of_spec(change):
    """An edit of a file's spec."""

    def edit(saved):
        plain = json.loads(saved["spec"])
        change(plain)
        saved["spec"] = json.dumps(plain)

    return edit


def arguments(**changed):
    return of_spec(lambda plain: plain["arguments"].update(changed))


def graph(**changed):
    return of_spec(lambda plain: plain["arguments"]["graph"].update(changed))


def site(**changed):
    return of_spec(lambda plain: plain["sites"][-1].update(changed))


def loc(change):
    return lambda saved: saved["state"].update({LOC: change(saved["state"][LOC])})


def cyclic(saved):
    saved["spec"] = []
    saved["spec"].append(saved["spec"])


BOUNDS = {
    "class": "_GreaterThan",
    "fields": {"lower_bound": {"tensor": [[0.0]] * 3, "of": {"dtype": "float32"}}},
}
PRELU = {"class": "PReLU", "fields": {"num_parameters": 2**40}}
CHANGES = {
    "shape of a graph": ("structured", site(shape=[2**10], plates=[]), "expected the parents"),
    "subsampled plate": ("structured", site(plates=[["groups", -1, 8, 0, 2**40]]), "subsampled"),
    "bounds": ("iaf", site(support=BOUNDS), "expand"),
    "edge": ("structured", graph(edges=[[0, 10**9]]), r"graph: .* coordinates 1000000000"),
    "cycle": ("structured", graph(parents=[[1], [0], *[[]] * 7]), "got one with a cycle"),
    "graph": ("structured", arguments(graph=None), "and the guide's flow, got"),
    "large activation": (
        "iaf",
        arguments(nonlinearity=PRELU),
        "and the guide's flow, got: 'PReLU'",
    ),
    "coordinates": ("in coordinates", arguments(coordinates={"x": True}), r"'z'\], got \['x'\]"),
    "another shape": ("iaf", loc(lambda value: value[:1]), "size mismatch for"),
    "sparse": ("iaf", loc(torch.Tensor.to_sparse), "and the guide's flow, got"),
    "not a tensor": ("iaf", loc(torch.Tensor.tolist), "and the guide's flow, got"),
    "not finite": ("iaf", loc(lambda value: value / 0), f"'{LOC}': expected finite numbers, got 2"),
    "missing": ("iaf", lambda saved: saved["state"].pop(LOC), "and the guide's flow, got"),
    "no state": ("iaf", lambda saved: saved.update(state=3), "expected what the guide's save"),
    "another class": (
        "iaf",
        lambda s: s.update(format="a guide of class AutoMAF, format 9"),
        "AutoIAF, format 9, got a guide of class AutoMAF",
    ),
    "another kind": ("iaf", lambda saved: saved.update(format=[9]), r"got \[9\]"),
    "a cycle": ("iaf", cyclic, "and the guide's flow, got"),
    "nested": ("iaf", lambda s: s.update(spec="[" * 10**5), "and the guide's flow, got"),
    "text in place of a number": ("iaf", arguments(num_transforms="3"), "num_transforms: expected"),
    "an unknown support": (
        "iaf",
        site(support={"class": "load", "fields": {}}),
        "and the guide's flow, got",
    ),
    "no sites": ("iaf", of_spec(lambda plain: plain.update(sites=[])), "expected at least one"),
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
    with pytest.raises(ValueError, match=message) as caught:
        kind.load(path, **options)
    assert str(caught.value).startswith(f"{path}: expected")


def test_a_file_adds_no_hooks(tmp_path):
    _, content, _ = file_of("iaf")
    saved = torch.load(io.BytesIO(content))
    hooks = {"_forward_hooks": {"1": {"function": "load"}}}
    arguments(nonlinearity={"class": "Tanh", "fields": hooks})(saved)
    torch.save(saved, tmp_path / "guide")
    loaded = AutoIAF.load(tmp_path / "guide")._spec.arguments["nonlinearity"]
    assert isinstance(loaded, nn.Tanh)
    assert not loaded._forward_hooks
