# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Data that Pyro's validation refuses are refused here, too; the structure of a run, and signatures."""

from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_artransform import AutoIAF
from pyro_artransform.model import LogJoint
from pyro_artransform.model.traces import argument_signature
from pyro_artransform.posterior import log_likelihood
from tests.inference.conftest import quick_fit
from tests.model.models import SIZE, Y, of_batch

X, LABELS = torch.ones(5, 2), torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0])


def likelihood(distribution, y, *, mask=None):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=True if mask is None else mask):
            pyro.sample("y", distribution(z), obs=y)

    return model


OUTSIDE = {
    "labels": (lambda z: dist.Bernoulli(logits=z), LABELS),
    "masked distribution": (lambda z: dist.Bernoulli(logits=z).mask(True), LABELS),
    "count": (lambda z: dist.Poisson(z.exp()), torch.tensor([1.0, 1.5])),
    "NaN": (lambda z: dist.Normal(z, 1.0), torch.tensor([0.5, torch.nan])),
    "events": (lambda z: dist.Normal(z + torch.zeros(2), 1.0).to_event(1), X * torch.nan),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_of_the_support(name):
    model = likelihood(*OUTSIDE[name])
    message = r"site 'y': expected data within the support of \w+ .*got"
    with pytest.raises(ValueError, match=message):
        LogJoint(model)
    with pyro.validation_enabled(False):
        LogJoint(model)


def test_data_that_broadcast_against_their_distribution():
    """(20,) beside (20, 1): 400 terms, whose posterior is another one."""
    x, y = torch.randn(20, 1), torch.randn(20)

    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(b * x, 1.0).to_event(1), obs=y)

    message = r"'y'.* data of shape \(20,\) and a distribution of shape \(20, 1\).* 400 terms"
    with pytest.raises(ValueError, match=message):
        LogJoint(model, (x, y))
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, {"b": torch.zeros(5)}, x, y)
    LogJoint(model, (x, y[:, None]))


@pytest.mark.parametrize("y", [np.zeros(5), [0.0] * 5, 0.0], ids=["array", "list", "number"])
def test_data_that_are_no_tensor(y):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'y': expected data as a tensor, got .*torch\.as_tensor"):
        LogJoint(model, (y,))


def test_data_that_may_be_outside():
    """Masked ones, and those whose support depends on a latent: the start may be outside of it."""
    y, mask = torch.tensor([0.5, torch.nan]), torch.tensor([True, False])
    LogJoint(likelihood(lambda z: dist.Normal(z, 1.0), y, mask=mask))
    LogJoint(likelihood(lambda z: dist.Uniform(0.0, z.exp()), torch.tensor([0.1, 50.0])))


@pytest.mark.parametrize(
    ("fn", "y", "words"),
    [
        (lambda z: dist.Normal(z, 1.0), torch.zeros(4), r"Normal of shape \(5,\).* \(4,\)"),
        (
            lambda z: dist.Binomial(torch.full((5,), 3.0), logits=z),
            torch.ones(4),
            r"Binomial .*\(4,\)",
        ),
        (
            lambda z: dist.Bernoulli(logits=z),
            torch.ones(5, dtype=torch.long),
            "torch.int64.*y.float",
        ),
        (lambda z: dist.Bernoulli(logits=z), torch.ones(5, dtype=torch.bool), "torch.bool"),
    ],
)
def test_shapes_and_dtypes_that_pytorch_refuses(fn, y, words):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("y", fn(z), obs=y)

    with pytest.raises(ValueError, match=f"site 'y': .*{words}") as caught:
        LogJoint(model)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_sites_that_broadcast_against_their_plates():
    """Twenty-five terms in place of five, of another posterior."""

    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal((X * b).sum(-1), 1.0), obs=y)

    def latent():
        with pyro.plate("groups", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3, 1), 1.0))

    LogJoint(model, (torch.zeros(5),))
    with pytest.raises(ValueError, match=r'site "y", invalid log_prob shape'):
        LogJoint(model, (torch.zeros(5, 1),))
    with pytest.raises(ValueError, match=r'site "z", invalid log_prob shape'):
        LogJoint(latent)


def normal(loc=0.0):
    return pyro.sample("b", dist.Normal(torch.as_tensor(loc), 1.0))


def observed(loc, y=0.0, scale=1.0, mask=True):
    with poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(loc, scale), obs=torch.as_tensor(y))


def left_of_plates():
    b = normal()
    with pyro.plate("rows", 3):
        observed(b, torch.ones(2, 3), torch.ones(2, 3))


def of_size_one():
    b = normal(torch.zeros(1))
    pyro.deterministic("twice", 2 * b * torch.ones(3))
    observed(b, torch.ones(1))


SHAPES = {
    "latent": lambda: observed(normal(torch.zeros(3)).sum(-1)),
    "data": lambda: observed(normal(), torch.zeros(4)),
    "factor": lambda: pyro.factor("y", -((normal() - torch.ones(4)) ** 2)),
    "mask": lambda: observed(normal(), mask=torch.ones(4, dtype=torch.bool)),
    "left of plates": left_of_plates,
    "of size one": of_size_one,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_refused_as_by_svi(name):
    """With the same words; and accepted without validation."""
    model = SHAPES[name]

    def words(run):
        pyro.clear_param_store()
        try:
            run()
        except ValueError as error:
            return str(error)
        return ""

    guide = AutoNormal(model)
    expected = words(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step)
    assert ("invalid log_prob shape" in expected) == (model is not of_size_one)
    assert words(lambda: LogJoint(model)) == expected
    with pyro.validation_enabled(False):
        assert words(lambda: LogJoint(model)) == ""


@pytest.mark.parametrize("event", [(), (2,)])
def test_a_last_batch_of_one_row(event):
    """It would count for all elements that a mini-batch has."""

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        likelihood = dist.Normal(z, torch.ones(y.shape[1:])).to_event(max(y.dim() - 1, 0))
        with pyro.plate("data", 101, subsample_size=50):
            pyro.sample("y", likelihood, obs=y)

    message = r"'y': expected data of 50 elements of the subsampled plate 'data', got one"
    log_joint = LogJoint(model, (torch.zeros(50, *event),))
    with pytest.raises(ValueError, match=message):
        log_joint.with_arguments((torch.zeros(1, *event),))
    with pytest.raises(ValueError, match=message):
        LogJoint(model, (torch.zeros(1, *event),))
    LogJoint(model, (torch.tensor(0.0),))


def test_model_structure():
    def both(y):
        of_batch(y)
        with pyro.plate("groups", 10, subsample_size=5):
            pyro.sample("part", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 4):
            pyro.sample("all", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def whole_data():
        of_batch(Y)
        with pyro.plate("predicted", 10, subsample_size=5):
            pyro.deterministic("doubled", 2 * Y[:5])

    structure = LogJoint(both, (Y[:3],)).structure((Y[:2],))
    assert structure.shapes == {"loc": (), "width": (), "part": (5,), "all": (4, 2)}
    assert structure.global_latents == ["loc", "width"]
    assert structure.subsampled_latents == ["part"]
    assert structure.scale == 3.5
    assert structure.is_scaled
    whole = LogJoint(whole_data).structure(())
    assert (whole.scale, whole.is_scaled, whole.subsampled_latents) == (1.0, False, [])


def test_model_structures_go_by_numbers_too():
    """As where the number of all rows is an argument, also of more signatures than are remembered."""

    def sized(y, size):
        with pyro.plate("data", size, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    log_joint = LogJoint(sized, (Y, SIZE))
    for size in (*range(SIZE, SIZE + 100), SIZE):
        assert log_joint.structure((Y, size)).scale == size / SIZE


def test_a_structure_permutes_no_rows(monkeypatch):
    """A step on a batch asks for it; a permutation of a million rows takes longer than the step."""

    def sized(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10**6, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    log_joint, permute, sizes = LogJoint(sized, (Y[:3],)), torch.randperm, list[int]()
    monkeypatch.setattr(torch, "randperm", lambda n, **k: sizes.append(n) or permute(n, **k))
    assert log_joint.structure((Y[:2],)).scale == 10**6 / 2
    assert not sizes


MASK = torch.tensor([True, True, False])


@pytest.mark.parametrize(
    ("a", "b", "with_values"),
    [
        (torch.zeros(3), torch.zeros(4), False),
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float32), False),
        (np.zeros(3), np.zeros((3, 1)), False),
        ({"n": 1}, {"n": 2}, False),
        ({"n": 1}, {"m": 1}, False),
        (["a", torch.zeros(2)], ["b", torch.zeros(2)], False),
        (MASK, ~MASK, True),
        (MASK.numpy(), ~MASK.numpy(), True),
        (MASK.float(), 1 - MASK.float(), True),
        (torch.tensor([0, 1, 1]), torch.tensor([0, 0, 2]), True),
        (torch.tensor(0.5), torch.tensor([0.7]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]), True),
        ([MASK] * 20, [MASK] * 19 + [~MASK], True),
        (torch.nn.Identity(), torch.nn.Identity(), True),
    ],
)
def test_signatures_that_differ(a, b, with_values):
    """Those with values, where a scale may follow from what differs."""
    of_a, again, of_b = (argument_signature(((x,), {}), with_values=with_values) for x in (a, a, b))
    assert of_a == again != of_b
    assert hash(of_a) == hash(again)


def test_what_cannot_be_compared_has_another_signature_each_time():
    class Unhashable:
        __hash__ = None

        def __call__(self):
            return MASK

    unknown = [SimpleNamespace(mask=MASK), torch.zeros(2**19), torch.eye(3).to_sparse()]
    for value in (*unknown, Unhashable()):
        assert len({argument_signature(value, with_values=True) for _ in range(2)}) == 2


class WithoutSupport(dist.TorchDistribution):
    """A density of data that does not say where it is positive, which Pyro's SVI accepts."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return WithoutSupport(self.loc.expand(batch_shape))

    def log_prob(self, value):
        return -0.5 * (value - self.loc).square()


@pytest.mark.parametrize("is_valid", [True, False])
def test_data_need_no_support(is_valid):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", WithoutSupport(z), obs=torch.tensor(0.5))

    with dist.validation_enabled(is_valid):
        log_joint = LogJoint(model)
        z = torch.tensor([[0.0], [1.0]])
        expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) - 0.5 * (0.5 - z[:, 0]).square()
        torch.testing.assert_close(log_joint(z), expected)


def of_rows(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", SIZE):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def by_factor():
    pyro.factor("f", -(pyro.sample("z", dist.Normal(0.0, 1.0)) ** 2))


def computed():
    pyro.deterministic("twice", 2 * pyro.sample("z", dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize(
    ("model", "has_data"),
    [
        (lambda: of_rows(Y), True),
        (poutine.condition(of_rows, {"y": Y}), True),
        (by_factor, True),
        (of_rows, False),
        (computed, False),
    ],
)
def test_a_posterior_is_the_prior_without_an_observed_site_and_a_factor(model, has_data):
    assert LogJoint(model).has_data == has_data


def test_a_guide_that_was_set_up_hides_no_data():
    guide = AutoIAF(of_rows)
    guide(Y)
    assert "prior" not in quick_fit(of_rows, guide, Y, num_steps=2, progress=False).verdict
