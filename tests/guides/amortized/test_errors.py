# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What an amortized guide refuses, in words that name the site, the plate and the shapes."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import nn

from pyro_artransform import AutoAmortized, affine_autoregressive, conditional_iaf
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import Encoder, data


def refuses(message, model, *args, kind=ValueError, encoder=None, **options):
    guide = AutoAmortized(model, encoder, **options)
    for _ in range(2):
        # the second call must not find half a guide
        with pytest.raises(kind, match=message):
            guide(*args)
    return guide


# Models


def test_no_local_latents():
    def model(y):
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    refuses(r"no latents in a plate.*\['mean'\]\. AutoIAF is the guide", model, data())


def test_discrete_locals():
    def model(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("kind", dist.Bernoulli(0.5))

    refuses("site 'kind' is discrete", model, data())


def test_data_sized_latent_outside_any_plate():
    def model(y):
        pyro.sample("free", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
        hierarchies.groups(y)

    guide = AutoAmortized(model, Encoder())
    guide(data())
    with pytest.raises(
        ValueError, match=r"'free' is in no plate, and its shape changes.*\(12,\).*\(5,\)"
    ):
        guide(data(5))
    guide(data())


def test_element_of_another_shape():
    def model(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(y.shape[1]), 1.0).to_event(1))

    guide = AutoAmortized(model, lambda y: y[:, :1])
    guide(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"site 'z': expected each element .*\(3,\).*got \(2,\)"):
        guide(torch.zeros(4, 2))


def test_latent_that_changes_its_plates():
    def model(y, inside=True):
        outer, inner = pyro.plate("outer", 3, dim=-1), pyro.plate("inner", 2, dim=-2)
        with outer:
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with inner if inside else outer:
            pyro.sample("b", dist.Normal(0.0, 1.0))

    guide = AutoAmortized(model)
    guide(data())
    with pytest.raises(ValueError, match=r"site 'b': expected it in the plates \['inner'\].*outer"):
        guide(data(), False)


def test_plate_of_another_size_without_an_encoder():
    guide = AutoAmortized(hierarchies.groups)
    guide(data())
    with pytest.raises(
        ValueError, match=r"plate 'groups' around the sites \['z'\] has another size.* 12 .*got 5"
    ):
        guide(data(5))
    guide(data())


def test_batch_dimension_that_is_no_plate():
    def model():
        with pyro.plate("items", 3):
            pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0))

    pyro.enable_validation(False)
    refuses(r"site 'z': expected the batch shape \(3,\) of its plates.*got \(2, 3\)", model)


def test_support_that_differs_between_elements():
    def model(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Uniform(y - 1, y + 1))

    refuses(
        r"support of site 'z' differs between the elements of its plates \['groups'\]",
        model,
        data(),
    )

    def same(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1))

    assert AutoAmortized(same)(data())["z"].shape == (12, 2)


def test_support_that_depends_on_a_global():
    def model():
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("items", 3):
            pyro.sample("z", dist.Uniform(0.0, a))

    refuses("support of site 'z' depends on other latents", model)


def test_starting_value_outside_the_support():
    def locals_(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("s", dist.HalfNormal(1.0))

    def globals_(y):
        pyro.sample("s", dist.HalfNormal(1.0))
        hierarchies.groups(y)

    def start(site):
        return torch.zeros(site["fn"].shape())

    refuses("site 's': expected starting values inside", locals_, data(), init_loc_fn=start)
    refuses("site 's': expected a starting value inside", globals_, data(), init_loc_fn=start)


def test_plate_without_a_size():
    def model():
        with pyro.plate("open"):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    refuses("site 'z' is in plate 'open', which has no size", model)


# Indices that the model gives


def given(y, index):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 12, subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def test_indices_that_the_model_gives():
    """Stock guides put their own in place of them, in silence."""
    y, index = data(), torch.tensor([3, 1, 7])
    refuses(r"gives the indices of plate 'groups' itself.*3 of 12.*create_plates", given, y, index)

    def plates(y, index):
        return pyro.plate("groups", 12, subsample=index)

    guide = AutoAmortized(given, create_plates=plates)
    for now in (index, torch.tensor([0, 11])):
        trace = pyro.poutine.trace(guide).get_trace(y, now)
        assert torch.equal(trace.nodes["groups"]["value"], now)
        assert trace.nodes["z"]["value"].shape == now.shape
    assert not guide.needs_indices
    assert guide.sample_posterior(2)["z"].shape == (2, 12)


def test_indices_choose_the_embeddings():
    y = data()
    guide = AutoAmortized(
        given, create_plates=lambda y, index: [pyro.plate("groups", 12, subsample=index)]
    )
    guide(y, torch.arange(12))
    with torch.no_grad():
        guide.transform.locals[0].table[:, -2] = torch.arange(12.0)
        guide.transform.locals[0].affine.log_scale.fill_(-20.0)
    start = guide(y, torch.tensor([0]))["z"]
    for index in (torch.tensor([3, 1, 7]), torch.arange(12).flip(0)):
        assert torch.allclose(guide(y, index)["z"] - start, index.to(start.dtype), atol=1e-6)


@pytest.mark.parametrize(
    ("plates", "kind", "message"),
    [
        (lambda y, i: pyro.plate("groups", 11, subsample=i), ValueError, r"\(12, 3, -1\).*\(11, 3"),
        (lambda y, i: pyro.plate("groups", 12, subsample=i[:2]), ValueError, r"\(12, 2, -1\)"),
        (lambda y, i: pyro.plate("groups", 12, subsample=i, dim=-2), ValueError, r"\(12, 3, -2\)"),
        (lambda y, i: [i], TypeError, "expected it to return a pyro.plate or several, got Tensor"),
        (lambda y, i: [], ValueError, "gives the indices of plate 'groups' itself"),
    ],
)
def test_plates_that_do_not_fit(plates, kind, message):
    guide = AutoAmortized(given, create_plates=plates)
    with pytest.raises(kind, match=message):
        guide(data(), torch.tensor([3, 1, 7]))


# Encoders


@pytest.mark.parametrize(
    ("encoder", "kind", "message"),
    [
        (
            lambda y: y[:5, None],
            ValueError,
            r"\(12, 1\), a row for each.*'groups' \(12\).*\['z'\].*\(5, 1\)",
        ),
        (lambda y: y, ValueError, r"expected features of shape \(12, 12\).*got \(12,\)"),
        (lambda y: {"rows": y[:, None]}, ValueError, r"of \['groups'\], got the key 'rows'"),
        (lambda y: [y], TypeError, "expected it to return a tensor or a dict of tensors.*list"),
        (lambda y: {"groups": 1.0}, TypeError, "features of 'groups' that are floats, got float"),
        (lambda y: y[:, None].long(), TypeError, "features of 'groups' that are floats, got torch"),
    ],
)
def test_features_that_do_not_fit(encoder, kind, message):
    guide = AutoAmortized(hierarchies.groups, encoder)
    with pytest.raises(kind, match=message):
        guide(data())


def test_features_that_do_not_fit_a_mini_batch():
    refuse = r"expected features of shape \(4, 1\).*'groups' \(4\).*got \(5, 1\); or \(12, 1\)"
    guide = AutoAmortized(hierarchies.minibatch, lambda y: y[:5, None])
    with pytest.raises(ValueError, match=refuse):
        guide(data())


def test_one_tensor_for_several_plates():
    refuses(
        r"in several plates, \['outer', 'column', 'inner'\]: expected a dict",
        hierarchies.nested,
        encoder=lambda: torch.zeros(3, 1),
    )


def test_features_that_come_and_go():
    keys = ["groups"]
    guide = AutoAmortized(hierarchies.groups, lambda y: dict.fromkeys(keys, y[:, None]))
    guide(data())
    keys.clear()
    with pytest.raises(ValueError, match=r"expected features of \['groups'\].*got \[\]"):
        guide(data())


def test_features_of_draws_that_do_not_fit():
    guide = AutoAmortized(hierarchies.groups, lambda y: y.reshape(len(y), -1))
    guide(data())
    with pytest.raises(ValueError, match=r"of shape \(elements of 'groups', 1\), got \(12, 2\)"):
        guide.sample_posterior(2, torch.zeros(12, 2))


def test_embeddings_of_all_and_features_of_a_mini_batch():
    def model(y, total=12):
        with pyro.plate("groups", total, subsample_size=len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = AutoAmortized(model, lambda y, total=12: {"groups": y[:, None]})
    assert guide(data(4))["w"].shape == (2, 4)
    with pytest.raises(
        ValueError, match=r"plate 'groups' around .*'w'.* 4 elements, got 12.*the same for all"
    ):
        guide.sample_posterior(2, data(4))


def test_parameters_that_nobody_would_train():
    net = Encoder()
    refuses("no parameters of it are known", hierarchies.groups, data(), encoder=lambda y: net(y))


def test_subsample_that_fits_two_plates():
    def model(y):
        for name in ("a", "b"):
            with pyro.plate(name, 12, subsample_size=3, dim=-1):
                pyro.sample(f"{name}_z", dist.Normal(0.0, 1.0))

    def encoder(y):
        return {name: pyro.subsample(y, event_dim=0)[:, None] for name in ("a", "b")}

    refuses(r"fits the plates \['a', 'b'\]: expected one", model, data(), encoder=encoder)


# Arguments


class PyroEncoder(PyroModule):
    def forward(self, y):
        return y


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"encoder": 3}, TypeError, "encoder: expected a module or a function"),
        ({"encoder": Encoder}, TypeError, "encoder: expected a module or a function"),
        ({"encoder": PyroEncoder()}, TypeError, "got one with a PyroModule inside"),
        ({"flow": affine_autoregressive(2)}, TypeError, "flow: expected a callable that takes"),
        ({"local_flow": conditional_iaf(2, 2)}, TypeError, "local_flow: expected a callable that"),
        ({"local_flow": 3}, TypeError, "local_flow: expected a callable"),
        ({"init_loc_fn": 3}, TypeError, "init_loc_fn: expected a callable"),
        ({"create_plates": 3}, TypeError, "create_plates: expected a callable, got 3"),
        ({"init_scale": 0.0}, ValueError, "init_scale: expected a positive finite number"),
        ({"embedding_dim": 0}, ValueError, "embedding_dim: expected a positive integer"),
    ],
)
def test_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        AutoAmortized(hierarchies.groups, **options)


class Unmasked(nn.Module):
    """A network that mixes the coordinates."""

    def __init__(self, size, context):
        super().__init__()
        self.net = nn.Linear(size + context, size)

    def forward(self, x, context):
        context = context.expand(x.shape[:-1] + context.shape[-1:])
        shift = self.net(torch.cat([x, context], -1))
        return dist.transforms.AffineTransform(shift, 1.0)


def test_local_flows():
    from pyro_artransform.transforms import ConditionalAutoregressiveTransform, chain

    flows = {
        "conditional transform that is a module.*got Linear": lambda d, c: nn.Linear(d, c),
        "conditional transform that is a module.*got ComposedT": lambda d, c: chain(
            [affine_autoregressive(d)]
        ),
        "a module with parameters to train": lambda d, c: ConditionalAutoregressiveTransform(
            lambda x, context: dist.transforms.AffineTransform(0.0, 1.0)
        ),
    }
    for message, flow in flows.items():
        refuses(message, hierarchies.groups, data(), kind=TypeError, local_flow=flow)

    def unmasked(d, c):
        return ConditionalAutoregressiveTransform(Unmasked(d, c))

    refuses("meta is not autoregressive", hierarchies.standard, local_flow=unmasked)
