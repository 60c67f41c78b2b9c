# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What an amortized guide refuses, in words that name the site, the plate and the shapes."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoGuideList, init_to_value
from pyro.nn import PyroModule
from torch import nn

from pyro_artransform import AutoAmortized, conditional_iaf
from pyro_artransform.flows.transforms import ConditionalAutoregressiveTransform
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import Encoder, data
from tests.guides.test_prototype import refuses


def in_groups(name, distribution):
    """A model with one site in a plate of as many elements as there are data."""

    def model(y):
        with pyro.plate("groups", len(y)):
            pyro.sample(name, distribution(y))

    return model


# Models


def no_locals(y):
    pyro.sample("mean", dist.Normal(0.0, 1.0))


def depends_on_a_global(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    with pyro.plate("items", 3):
        pyro.sample("z", dist.Uniform(0.0, a))


def without_a_size(y):
    with pyro.plate("open"):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))


def row_vectors(y):
    with pyro.plate("groups", len(y)):
        pyro.sample("z", dist.Normal(torch.zeros(y.shape[1]), 1.0).to_event(1))


def sized_global(y):
    pyro.sample("free", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    hierarchies.groups(y)


def other_plates(y, inside=True):
    outer, inner = pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 2, dim=-2)
    with outer:
        pyro.sample("a", dist.Normal(0.0, 1.0))
    with inner if inside else outer:
        pyro.sample("b", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "other", "message"),
    [
        (sized_global, [data(5)], r"'free' is in no plate, and its.*\(12,\).*\(5,\)"),
        (row_vectors, [torch.zeros(12, 2)], r"'z': expected elements of .*\(3,\).*got \(2,\)"),
        (other_plates, [data(), False], r"'b': expected .* in the plates \['inner'\].*outer"),
        (hierarchies.groups, [data(5)], r"'groups' around.*\['z'\] has another.* 12 .*got 5"),
    ],
)
def test_arguments_that_change_the_latents(model, other, message):
    first = torch.zeros(12, 3) if model is row_vectors else data()
    has_encoder = model in (sized_global, row_vectors)
    guide = AutoAmortized(model, (lambda y: y.reshape(len(y), -1)[:, :1]) if has_encoder else None)
    guide(first)
    with pytest.raises(ValueError, match=message):
        guide(*other)
    guide(first)


def test_arguments_without_a_latent_that_the_prior_says():
    def model(y, num=12):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        if num:
            with pyro.plate("groups", num):
                pyro.sample("z", dist.Normal(0.0, scale))
        with pyro.plate("rows", 12):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    guide = AutoAmortized(model)
    guide(data())
    # the plate of what is predicted is none of the guide's
    assert guide.sample_posterior(2, None)["z"].shape == (2, 12)
    for call in (guide, partial(guide.sample_posterior, 2)):
        with pytest.raises(ValueError, match="site 'z': the model has no such latent"):
            call(data(), 0)


def test_an_encoder_without_its_data():
    guide = AutoAmortized(hierarchies.groups, Encoder())
    guide(data())
    for call in (guide.median, partial(guide.sample_posterior, 5)):
        with pytest.raises(TypeError, match=r"encoder: .* as in sample_posterior\(n, \*data\)"):
            call()


# Indices that the model gives


def given(y, index):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 12, subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def plates(y, index):
    return pyro.plate("groups", 12, subsample=index)


INDEX = torch.tensor([3, 1, 7])


def test_indices_that_the_model_gives():
    """Stock guides put their own in place of them, in silence."""
    y = data()
    guide = AutoAmortized(given, create_plates=plates)
    for now in (INDEX, torch.tensor([0, 11])):
        trace = pyro.poutine.trace(guide).get_trace(y, now)
        assert torch.equal(trace.nodes["groups"]["value"], now)
        assert trace.nodes["z"]["value"].shape == now.shape
    assert not guide.needs_indices
    assert guide.sample_posterior(2)["z"].shape == (2, 12)
    for create_plates in (None, plates):
        guides = AutoGuideList(given, create_plates=create_plates)
        guides.append(AutoAmortized(given))
        if create_plates is None:
            with pytest.raises(ValueError, match="sets the indices of plate 'groups' itself"):
                guides(y, INDEX)
        else:
            assert guides(y, INDEX)["z"].shape == (3,)


def test_indices_choose_the_embeddings():
    y = data()
    guide = AutoAmortized(given, create_plates=lambda *args: [plates(*args)], coordinates="model")
    guide(y, torch.arange(12))
    with torch.no_grad():
        guide.transform.locals[0].table[:, -2] = torch.arange(12.0)
        guide.transform.locals[0].affine.log_scale.fill_(-20.0)
    start = guide(y, torch.tensor([0]))["z"]
    for index in (INDEX, torch.arange(12).flip(0)):
        assert torch.allclose(guide(y, index)["z"] - start, index.to(start.dtype), atol=1e-6)


def test_features_that_come_and_go():
    keys = ["groups"]
    guide = AutoAmortized(hierarchies.groups, lambda y: dict.fromkeys(keys, y.reshape(len(y), -1)))
    guide(data())
    with pytest.raises(ValueError, match="expected 1 features, got 2"):
        guide.sample_posterior(2, torch.zeros(12, 2))
    keys.clear()
    with pytest.raises(ValueError, match=r"expected features of \['groups'\].*got \[\]"):
        guide(data())


def test_embeddings_of_all_and_features_of_a_mini_batch():
    def model(y, total=12):
        with pyro.plate("groups", total, subsample_size=len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = AutoAmortized(model, lambda y, total=12: {"groups": y[:, None]})
    assert guide(data(4))["w"].shape == (2, 4)
    with pytest.raises(ValueError, match=r"'groups' around .*'w'.* 4 elements, got 12.*the same"):
        guide.sample_posterior(2, data(4))


# Arguments


class PyroEncoder(PyroModule):
    def forward(self, y):
        return y


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"encoder": 3}, TypeError, "encoder: expected a module or a function"),
        ({"encoder": Encoder}, TypeError, "encoder: expected a module or a function"),
        ({"encoder": PyroEncoder()}, TypeError, "got a PyroModule"),
        ({"local_flow": conditional_iaf(2, 2)}, TypeError, "local_flow: expected a callable that"),
        ({"init_loc_fn": 3}, TypeError, "init_loc_fn: expected a callable"),
        ({"create_plates": 3}, TypeError, "create_plates: expected a callable, got 3"),
        ({"embedding_dim": 0}, ValueError, "embedding_dim: expected a positive integer"),
    ],
)
def test_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        AutoAmortized(hierarchies.groups, **options)


# At the set-up


class Unmasked(nn.Linear):
    """A network that mixes the coordinates."""

    def forward(self, x, context):
        return dist.transforms.AffineTransform(super().forward(x), 1.0)


def two_of_a_size(y):
    for name in ("a", "b"):
        with pyro.plate(name, 12, subsample_size=3, dim=-1):
            pyro.sample(f"{name}_z", dist.Normal(0.0, 1.0))


def features_of_two(y):
    return {name: pyro.subsample(y, event_dim=0)[:, None] for name in ("a", "b")}


MODELS = [
    (no_locals, r"no latents in a plate.*\['mean'\]\. Use AutoIAF"),
    (in_groups("kind", lambda y: dist.Bernoulli(0.5)), "site 'kind' is a discrete latent"),
    (
        in_groups("z", lambda y: dist.Uniform(y - 1, y + 1)),
        r"support of site 'z' differs between the elements of its plates \['groups'\]",
    ),
    (depends_on_a_global, "support of site 'z' depends on other latents"),
    (without_a_size, "site 'z' is in plate 'open', which has no size"),
    (
        in_groups("z", lambda y: dist.Normal(torch.zeros(2, len(y)), 1.0)),
        r"'z': expected the batch shape \(12,\) of its plates.*got \(2, 12\)",
    ),
    (
        in_groups("s", lambda y: dist.HalfNormal(1.0)),
        "site 's': expected starting values inside",
        {"init_loc_fn": init_to_value(values={"s": torch.zeros(12)})},
    ),
]
PLATES = [
    (None, "sets the indices of plate 'groups' itself.*3 of 12.*create_plates"),
    (lambda y, i: pyro.plate("groups", 11, subsample=i), r"\(12, 3, -1\).*\(11, 3"),
    (lambda y, i: pyro.plate("groups", 12, subsample=i[:2]), r"\(12, 2, -1\)"),
    (lambda y, i: pyro.plate("groups", 12, subsample=i, dim=-2), r"\(12, 3, -2\)"),
    (lambda y, i: [i], "expected it to return a pyro.plate or several, got Tensor", TypeError),
    (lambda y, i: [], "sets the indices of plate 'groups' itself"),
]
FEATURES = [
    (lambda y: y[:5, None], r"\(12, 1\), or.*\['groups'\].*\['z'\].*\(5, 1\)"),
    (lambda y: y, r"\['groups'\] and one of features, got shape \(12,\)"),
    (lambda y: y[:, None, None], r"\['groups'\] and one of features.*got shape \(12, 1, 1\)$"),
    (lambda y: y[:, None] / 0, "finite features of 'groups', got some"),
    # it would never train
    (lambda y: Encoder()(y), "parameters that are not registered"),
    (lambda y, other: y, "encoder: expected the model's arguments.*missing .*'other'", TypeError),
    (lambda y: {"rows": y[:, None]}, r"keys \['groups'\], got \['rows'\]", TypeError),
    (lambda y: [y], "expected a tensor, or .* a dict of tensors.*list", TypeError),
    (lambda y: {"groups": 1.0}, "features of 'groups' that are floats, got float", TypeError),
    (lambda y: y[:, None].long(), "features of 'groups' that are floats, got torch", TypeError),
]
OTHERS = [
    (
        hierarchies.minibatch,
        r"expected features of shape \(4, 1\), or \(12, 1\).*'groups'.*got \(5, 1\)",
        {"encoder": lambda y: y[:5, None]},
    ),
    (
        lambda y: hierarchies.nested(),
        r"a dict of tensors, .* \['outer', 'column', 'inner'\], got Tensor",
        {"encoder": lambda y: torch.zeros(3, 1), "error": TypeError},
    ),
    (
        two_of_a_size,
        r"expected one plate for pyro.subsample.*, got \['a', 'b'\]",
        {"encoder": features_of_two},
    ),
    (
        lambda y: hierarchies.standard(),
        "conditional transform that is a module.*got Linear",
        {"local_flow": nn.Linear, "error": TypeError},
    ),
    (
        lambda y: hierarchies.standard(),
        "meta is not autoregressive",
        {"local_flow": lambda d, c: ConditionalAutoregressiveTransform(Unmasked(d, d))},
    ),
]


@pytest.mark.parametrize("row", [*MODELS, *OTHERS])
def test_what_is_refused(row):
    model, message, *options = row
    pyro.enable_validation("batch shape" not in message)  # Pyro's own says so where it is on
    refuses(model, message, data(), kind=AutoAmortized, **dict(*options))


@pytest.mark.parametrize("row", PLATES)
def test_plates_that_do_not_fit(row):
    make, message, *error = row
    options = {"create_plates": make, "error": error[0] if error else ValueError}
    refuses(given, message, data(), INDEX, kind=AutoAmortized, **options)


@pytest.mark.parametrize("row", FEATURES)
def test_features_that_do_not_fit(row):
    encoder, message, *error = row
    options = {"encoder": encoder, "error": error[0] if error else ValueError}
    refuses(hierarchies.groups, message, data(), kind=AutoAmortized, **options)
