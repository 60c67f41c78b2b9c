# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Elements of plates: sizes, features and embeddings, draws and densities, of mini-batches and of all."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive, Trace_ELBO
from torch import nn

from pyro_artransform import AutoAmortized, conditional_iaf
from tests.guides.amortized import hierarchies
from tests.guides.amortized.hierarchies import BatchEncoder, Encoder, data, redraw, traces, train

# Batches of other sizes


def test_last_short_batch_and_another_total():
    guide = AutoAmortized(hierarchies.batched, Encoder())
    for size, total in ((4, 12), (3, 12), (4, 12), (1, 12), (5, 500)):
        y = data(size)
        guide_trace, model_trace = traces(hierarchies.batched, guide, y, total)
        assert guide_trace.nodes["z"]["value"].shape == (size,)
        assert guide_trace.nodes["z"]["scale"] == total / size
        assert torch.equal(*(t.nodes["groups"]["value"] for t in (guide_trace, model_trace)))
        assert guide.sample_posterior(3, y, total)["z"].shape == (3, size)


def test_the_model_is_run_for_new_shapes_only():
    runs = []

    def model(y):
        runs.append(len(y))
        hierarchies.batched(y)

    guide = AutoAmortized(model, lambda y: y[:, None], coordinates="model")
    guide(data(4))
    runs.clear()
    for y in (data(4), data(3), data(4), data(3) + 1, data(1)):
        guide(y)
    assert runs == [3, 1]


def test_autoencoder():
    """No globals; decoder and encoder train."""
    decoder, encoder = nn.Linear(3, 5), Encoder(5, 4)
    x = (torch.rand(8, 5) > 0.5).double()

    def model(x):
        return hierarchies.autoencoder(x, decoder)

    guide = AutoAmortized(model, encoder, local_flow=lambda d, c: conditional_iaf(d, c, 2, 8))
    train(model, guide, x)
    stored = {id(p) for _, p in pyro.get_param_store().named_parameters()}
    networks = [*decoder.parameters(), *encoder.parameters()]
    assert {id(parameter) for parameter in networks} <= stored
    first = [parameter.detach().clone() for parameter in networks]
    train(model, guide, x)
    assert not any(map(torch.equal, first, networks))
    new, missing = x[:3], torch.full((3, 5), torch.nan)
    for parallel in (False, True):
        predictive = Predictive(model, guide=guide, num_samples=7, parallel=parallel)
        assert predictive(new)["z"].shape == (7, 3, 3)
    draws = guide.sample_posterior(7, new)
    assert draws["z"].shape == (7, 3, 3)
    assert Predictive(model, draws, parallel=True)(missing)["x"].shape == (7, 3, 5)


def test_what_is_predicted_may_be_discrete():
    """Without data the observations are latent, and no concern of the guide."""

    def model(x, obs=None):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("obs", dist.Bernoulli(logits=z), obs=obs)

    guide = AutoAmortized(model, lambda x, obs=None: x[:, None])
    guide(torch.zeros(4), torch.zeros(4))
    found = Predictive(model, guide=guide, num_samples=3)(torch.zeros(2))
    assert found["obs"].shape == (3, 2)
    assert set(guide(torch.zeros(6))) == {"z"}


def test_encoder_that_registers_itself():
    net = Encoder()
    guide = AutoAmortized(hierarchies.groups, lambda y: pyro.module("mine", net)(y))
    guide(data())
    before = [p.detach().clone() for p in net.parameters()]
    train(hierarchies.groups, guide, data())
    assert not any(map(torch.equal, before, net.parameters()))


def test_rows_of_all_elements_are_indexed_as_the_mini_batch_is():
    """An encoder of the mini-batch, and one of all data, give the same."""
    y, encoder = data(), BatchEncoder()
    draws = []
    for function in (encoder, lambda y: encoder.net(y[:, None]).detach()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoAmortized(hierarchies.minibatch, function)
        guide.set_up(y)
        redraw(guide.transform.locals)
        guide.transform.locals[0].units = None  # of a mini-batch they are others than of all data
        pyro.set_rng_seed(1)
        draws.append(guide(y)["z"])
    assert torch.allclose(*draws)


def test_networks_see_features_in_units_of_the_first_ones(tmp_path):
    """In any units of the features, but for those that train, and after a file, too."""
    y, values = data(), []
    for loc, scale in ((0.0, 1.0), (10.0, 0.1)):

        def encoder(y, loc=loc, scale=scale):
            return torch.stack([loc + scale * y, torch.full_like(y, loc)], -1)

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoAmortized(hierarchies.groups, encoder)
        guide.set_up(y)
        redraw(guide.transform.locals)
        guide.save(tmp_path / "guide.pt")
        again = AutoAmortized(hierarchies.groups, encoder)
        again.set_up(y)
        again.load(tmp_path / "guide.pt")
        for each in (guide, again):
            pyro.set_rng_seed(1)
            values.append(each.sample_posterior(3, y)["z"])
    assert all(torch.allclose(value, values[0], atol=1e-3) for value in values[1:])
    trained = AutoAmortized(hierarchies.groups, Encoder())
    trained.set_up(y)
    assert torch.equal(trained.transform.locals[0].units, torch.tensor([[0.0] * 2, [1.0] * 2]))


def test_features_of_some_plates_and_embeddings_of_others():
    def model(y):
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("beta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoAmortized(model, lambda y: {"rows": y[:, None]})
    guide(data(5))
    assert guide(data(4))["z"].shape == (4,)
    assert guide.needs_indices
    tables = [factor.table for factor in guide.transform.locals]
    assert tables[0].shape == (3, 10)
    assert tables[1] is None


def test_plate_sizes_that_follow_from_values():
    """Batches of one shape have 6 groups or 4, as the encoder's features or the user's plates say."""

    def model(group, y):
        with pyro.plate("groups", 12, subsample_size=int(group.max()) + 1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z[..., group], 1.0), obs=y)

    def encoder(group, y):
        return y.new_zeros(int(group.max()) + 1, 2).index_add(0, group, y[:, None].expand(-1, 2))

    def subsampling_encoder(group, y):
        return encoder(group, y) + 0 * pyro.subsample(y.new_zeros(12), event_dim=0).sum()

    def create_plates(group, y):
        return pyro.plate("groups", 12, int(group.max()) + 1)

    y = torch.randn(6)
    six, four = torch.arange(6), torch.tensor([0, 1, 2, 3, 3, 3])
    for options in (
        {"encoder": encoder},
        {"encoder": subsampling_encoder, "create_plates": create_plates},
        {"create_plates": create_plates},
    ):
        guide = AutoAmortized(model, **options)
        for group in (six, four, six, four):
            loss = Trace_ELBO().differentiable_loss(model, guide, group, y)
            assert loss.isfinite()
            assert guide(group, y)["z"].shape == (int(group.max()) + 1,)
        pyro.clear_param_store()
    wrong = AutoAmortized(model, lambda group, y: y.new_zeros(int(group[-1]) + 1, 2))
    wrong(six, y)
    with pytest.raises(
        ValueError, match=r"encoder: expected features of shape \(6, 2\).*got \(4, 2\)"
    ):
        wrong(torch.tensor([5, 0, 1, 2, 3, 3]), y)


# Draws and densities


def test_shapes_dtypes_and_supports():
    guide = AutoAmortized(hierarchies.nested)
    guide()
    redraw(guide)
    draws = guide.sample_posterior(3000)  # in two chunks, of 24 cells a draw
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == hierarchies.NESTED
    assert list(draws) == list(guide.prototype_trace.nodes)
    for name, site in guide.prototype_trace.nodes.items():
        assert len(draws[name]) == 3000
        assert site["fn"].support.check(draws[name]).all()
    assert len(draws["cell"][:, 0, 0].unique()) > 2990
    assert guide.log_prob(draws).shape == (3000,)
    for name, value in guide.quantiles([0.1, 0.9], num_samples=30).items():
        assert value.shape == (2, *hierarchies.NESTED[name])


def test_density_by_quadrature():
    """The density of a global and an element integrates to one."""

    def model():
        pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("items", 1):
            pyro.sample("unit", dist.Beta(2.0, 2.0))

    guide = AutoAmortized(model, init_scale=1.0)
    guide()
    redraw(guide)
    rate, unit = torch.linspace(-9, 9, 181).exp(), torch.linspace(-12, 12, 241).sigmoid()
    grid = torch.cartesian_prod(rate, unit)
    with torch.no_grad():
        log_q = guide.log_prob({"rate": grid[:, 0], "unit": grid[:, 1:]})
    jacobian = grid[:, 0] * grid[:, 1] * (1 - grid[:, 1])
    assert abs((log_q.exp() * jacobian).sum() * 0.1 * 0.1 - 1) < 2e-3


def test_elements_with_an_encoder_are_those_of_the_arguments():
    guide = AutoAmortized(hierarchies.batched, Encoder())
    guide(data(4))
    redraw(guide)
    for size in (4, 9):
        draws = guide.sample_posterior(3, data(size))
        assert draws["z"].shape == (3, size)
        assert guide.log_prob(draws, data(size)).shape == (3,)
    with pytest.raises(ValueError, match=r"values: expected 'z' of shape \(3, 4\), got \(3, 9\)"):
        guide.log_prob(draws, data(4))


def test_elements_with_an_encoder_of_the_mini_batch_are_all():
    y = data()
    guide = AutoAmortized(hierarchies.minibatch, BatchEncoder())
    guide(y)
    with torch.no_grad():
        guide.transform.locals[0].affine.linear.weight[:, 0] = 2.0
    medians = guide.median(y, num_samples=2_000)["z"]
    assert medians.shape == (12,)
    again = guide.median(y.flip(0), num_samples=2_000)["z"]
    assert (medians - again.flip(0)).abs().max() < 0.02 < medians.std()


def test_locals_depend_on_globals_and_on_their_parents():
    guide = AutoAmortized(hierarchies.nested)
    guide()
    # the context of a cell is its embedding, three globals, and the three latents of its parent
    weight = guide.transform.locals[2].affine.linear.weight
    assert weight.shape == (1, 8 + 3 + 3)
    for columns, sees_globals in ((slice(8, 11), True), (slice(11, 14), False)):
        with torch.no_grad():
            weight.zero_()
            weight[:, columns] = 2.0
        draws = guide.sample_posterior(4_000)
        rates = draws["rate"].log()
        cell = ((draws["cell"] + 1) / 3).logit()[:, 0, 0]
        others = [draws["scale"].log(), rates[:, 0], rates[:, 1]]
        found = torch.stack([cell, *others]).corrcoef()[0, 1:].abs()
        assert (found > 0.3).tolist() == [sees_globals, not sees_globals, False]
        assert (found < 0.1).tolist() == [not sees_globals, sees_globals, True]


@pytest.mark.parametrize(
    ("mean", "z", "message"),
    [
        ((3,), None, r"expected the sites \['mean', 'z'\], got \['mean'\]"),
        ((3,), (3, 5), r"'z' of shape \(3, 12\), got \(3, 5\)"),
        ((2,), (3, 12), r"'z' of shape \(2, 12\), got \(3, 12\)"),
        ((), (12,), r"'mean' of shape \(n,\) \+ site shape"),
    ],
)
def test_values_that_do_not_fit(mean, z, message):
    guide = AutoAmortized(hierarchies.groups)
    guide(data())
    values = {"mean": torch.zeros(mean)}
    if z is not None:
        values["z"] = torch.zeros(z)
    with pytest.raises(ValueError, match=message):
        guide.log_prob(values)
    with pytest.raises(ValueError, match="n: expected a positive integer, got 0"):
        guide.sample_posterior(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_models(dtype):
    """F21: whatever the default is."""
    torch.set_default_dtype(torch.float64 if dtype is torch.float32 else torch.float32)
    y = data().to(dtype)
    for encoder in (None, Encoder().to(dtype)):
        guide = AutoAmortized(hierarchies.groups, encoder)
        train(hierarchies.groups, guide, y, steps=2)
        assert {p.dtype for p in guide.parameters()} == {dtype}
        assert {v.dtype for v in guide.sample_posterior(2, y).values()} == {dtype}
        pyro.clear_param_store()


def test_latents_of_two_dtypes_share_one_inside():
    """As in other guides: the larger one, and each site has its own."""

    def mixed(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        with pyro.plate("groups", len(y)):
            z = pyro.sample("z", dist.Normal(mean.double(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = data().double()
    guide = AutoAmortized(mixed, lambda y: y[:, None])
    guide.path = True
    train(mixed, guide, y, steps=2)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    draws = guide.sample_posterior(3, y)
    assert (draws["mean"].dtype, draws["z"].dtype) == (torch.float32, torch.float64)
    assert guide.log_prob(draws, y).isfinite().all()
