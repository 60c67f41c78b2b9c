# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The structure of a run."""

from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.reparam import ConjugateReparam, LocScaleReparam, TransformReparam

from pyro_artransform.joint import LogJoint
from pyro_artransform.joint.traces import argument_signature, has_data, is_deterministic
from tests.joint.batches import Y, model


def test_model_structure():
    def both(y):
        model(y)
        with pyro.plate("groups", 10, subsample_size=5):
            pyro.sample("part", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 4):
            pyro.sample("all", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    structure = LogJoint(both, (Y[:3],)).structure((Y[:2],))
    assert {name: tuple(shape) for name, shape in structure.shapes.items()} == {
        **{"loc": (), "width": (), "part": (5,), "all": (4, 2)}
    }
    assert structure.global_latents == ["loc", "width"]
    assert structure.subsampled_latents == ["part"]
    assert structure.scale == 3.5
    assert structure.is_scaled
    assert LogJoint(whole_data, ()).structure(()).scale == 1.0
    whole = LogJoint(model, (Y,)).structure((Y,))
    assert (whole.scale, whole.is_scaled, whole.subsampled_latents) == (1.0, False, [])


def whole_data():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=Y[0])
    with pyro.plate("predicted", 10, subsample_size=5):
        pyro.deterministic("doubled", 2 * z)


REPARAMETRIZERS = {
    "loc_scale": (dist.Normal(1.0, 2.0), LocScaleReparam(0.0)),
    "transform": (dist.LogNormal(1.0, 2.0), TransformReparam()),
    "vector": (dist.Normal(torch.zeros(2), 1.0).to_event(1), LocScaleReparam()),
    "with_density": (dist.Beta(2.0, 2.0), ConjugateReparam(dist.Beta(3.0, 1.0))),
}


@pytest.mark.parametrize("plate_is_outside", [True, False])
@pytest.mark.parametrize("name", REPARAMETRIZERS)
def test_what_a_reparametrizer_leaves_is_no_data(name, plate_is_outside):
    """A distribution of data may be a point all the same."""
    fn, reparam = REPARAMETRIZERS[name]

    def run():
        with poutine.reparam(config={"theta": reparam}):
            theta = pyro.sample("theta", fn)
        pyro.sample("y", dist.Delta(theta, event_dim=fn.event_dim), obs=theta.detach().clone())

    def in_plate():
        with pyro.plate("plate", 3):
            run()

    nodes = poutine.trace(in_plate if plate_is_outside else run).get_trace().nodes
    assert is_deterministic(nodes["theta"])
    assert [k for k, node in nodes.items() if node["type"] == "sample" and has_data(node)] == ["y"]


def test_model_structures_go_by_numbers_too():
    """As where the number of all rows is an argument."""

    def sized(y, size):
        with pyro.plate("data", size, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    log_joint = LogJoint(sized, (Y, 7))
    assert [log_joint.structure((Y, size)).scale for size in (7, 14, 28)] == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(3), torch.zeros(4)),
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float32)),
        (np.zeros(3), np.zeros((3, 1))),
        ({"n": 1}, {"n": 2}),
        ({"n": 1}, {"m": 1}),
        (["a", torch.zeros(2)], ["b", torch.zeros(2)]),
        (list(range(20)), list(range(21))),
        (None, torch.zeros(())),
        (dist.Normal, "Normal"),
    ],
)
def test_signatures_that_differ(a, b):
    found = [argument_signature(((value,), {})) for value in (a, a, b)]
    assert found[0] == found[1] != found[2]
    assert len(set(found)) == 2


def test_signatures_that_are_equal():
    """Values of tensors and of floats do not matter, nor does the end of a long sequence."""
    a = (torch.zeros(3), 0.5, list(range(20)), {"x": 1, "y": 2})
    b = (torch.ones(3), 0.7, [0] * 20, {"y": 2, "x": 1})
    assert argument_signature(a) == argument_signature(b)
    assert argument_signature(a, with_values=True) != argument_signature(b, with_values=True)


MASK = torch.tensor([True, True, False])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (MASK, ~MASK),
        (MASK.numpy(), ~MASK.numpy()),
        (MASK.float(), 1 - MASK.float()),
        (torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2])),
        (torch.tensor(0.5), torch.tensor([0.7])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan])),
        ([MASK] * 20, [MASK] * 19 + [~MASK]),
        (torch.nn.Identity(), torch.nn.Identity()),
    ],
)
def test_what_a_scale_may_follow_from(a, b):
    found = [argument_signature(((value,), {}), with_values=True) for value in (a, a, b)]
    assert found[0] == found[1] != found[2]
    assert hash(found[0]) == hash(found[1])


def test_what_nobody_looks_into_has_another_signature_each_time():
    for value in (SimpleNamespace(mask=MASK), torch.zeros(2**19), torch.eye(3).to_sparse()):
        first, second = (argument_signature(value, with_values=True) for _ in range(2))
        assert first != second


def test_values_of_real_data_do_not_matter():
    a, b = (argument_signature(torch.randn(3, 2), with_values=True) for _ in range(2))
    assert a == b
