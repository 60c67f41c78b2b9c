# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO

from pyro_artransform import AutoIAF, AutoStructuredFlow, fit
from pyro_artransform.diagnostics import importance
from pyro_artransform.model import LogJoint
from tests.guides.training import particles_agree

SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0])
GUIDES = {
    "iaf": lambda **options: AutoIAF(schools, num_transforms=1, hidden_dims=8, **options),
    "structured": lambda **options: AutoStructuredFlow(schools, hidden_dim=4, **options),
}
every_guide = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)


def schools(y=None):
    y = torch.tensor([28.0, 8.0, -3.0, 7.0]) if y is None else y
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 4):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), SIGMA), obs=y)


def trained(make, **options):
    guide = make(**options)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(5):
        svi.step()
    return guide


@every_guide
def test_draws_and_densities_are_of_the_sites(make):
    guide = trained(make)
    assert list(guide.prior_coordinates.with_location) == ["tau", "theta"]
    trace = poutine.trace(guide).get_trace()
    values = {name: trace.nodes[name]["value"][None] for name in ("mu", "tau", "theta")}
    assert torch.allclose(guide.log_prob(values)[0], trace.log_prob_sum())
    # weights of draws in coordinates are those of the same draws on the unconstrained space
    log_joint = LogJoint(schools)
    density = log_joint.with_coordinates(guide.prior_coordinates)
    with torch.no_grad():
        x, log_q = guide.rsample_and_log_prob(20)
        u, _ = density.to_unconstrained(x)
        expected = log_joint(u) - guide.get_posterior().log_prob(u)
    assert torch.allclose(density(x) - log_q, expected)
    found = importance(schools, guide, 2000)
    assert abs(found.elbo - expected.mean()) < 5 * (found.elbo_se + expected.std() / 20**0.5)


def test_particles_at_once_and_one_by_one_have_the_same_mean():
    particles_agree(schools, trained(GUIDES["iaf"]))


@every_guide
def test_it_survives(make, tmp_path):
    """In files, copies and pickles, lambda included; without its model it says so."""
    guide = trained(make)
    with torch.no_grad():
        guide.prior_coordinates.centered[2:] = 0.7
    draws = guide.sample_posterior(5)
    expected = guide.log_prob(draws)
    guide.save(tmp_path / "guide")
    twins = [make(), copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))]
    twins[0].set_up()
    twins[0].load(tmp_path / "guide")
    with pytest.raises(RuntimeError, match="has no model"):
        twins[2].sample_posterior(2)
    twins[2].model = schools
    for twin in twins:
        assert torch.equal(twin.log_prob(draws), expected)
        assert twin.chooses_coordinates
    assert not trained(make, coordinates={"theta": 0.3}).chooses_coordinates


@every_guide
def test_coordinates_are_saved_but_are_no_parameters(make, tmp_path):
    """They are not in Pyro's store, and a guide that takes parameters of a loaded one says so."""
    guide, store = trained(make), pyro.get_param_store()
    assert {"coordinates.centered", "coordinates.unit"} <= guide.state_dict().keys()
    for named in (guide.named_parameters(), store.named_parameters()):
        found = dict(named)
        assert all(value.requires_grad for value in found.values())
        assert "coordinates" not in "".join(found)
    store.save(str(tmp_path / "store"))
    pyro.clear_param_store()
    store.load(str(tmp_path / "store"))
    words = "does not hold the coordinates.*guide.save and load"
    with pytest.warns(UserWarning, match=words):
        make()()
    pyro.clear_param_store()
    store.load(str(tmp_path / "store"))
    with pytest.warns(UserWarning, match=words):
        make(coordinates={"theta": 0.3, "tau": 0.3})()  # the unit is found anew


@pytest.mark.filterwarnings("ignore:.*does not hold the coordinates")
def test_frozen_parameters_are_in_the_store_too(tmp_path):
    """Where a guide goes on from a store that was loaded, it would have those of its start."""
    guide = GUIDES["iaf"]()
    guide()
    log_scale = guide.transform.transforms[1].log_scale.requires_grad_(False)
    pyro.clear_param_store()
    guide.eval()()  # in training mode Pyro warns of frozen parameters
    with torch.no_grad():
        log_scale.add_(1.0)
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    again = GUIDES["iaf"]()
    again()
    assert torch.equal(again.transform.transforms[1].log_scale, log_scale)


def test_lambda_is_as_asked_for():
    theta = torch.tensor([0.0, 0.2, 0.5, 1.0])
    guide = GUIDES["iaf"](coordinates={"theta": theta})
    guide()
    assert torch.equal(guide.prior_coordinates.centered[2:], theta)
    assert not guide.chooses_coordinates
    guide = GUIDES["iaf"](coordinates="model")
    guide()
    assert guide.prior_coordinates is None
    assert "centered" not in "".join(guide.state_dict())
    for wrong, got in (
        ("centred", "'centred'"),
        ({"theta": 1.5}, "{'theta': tensor"),
        (0.5, "0.5"),
    ):
        with pytest.raises(ValueError, match=f"'prior', 'model', or a mapping .*, got {got}"):
            AutoIAF(schools, coordinates=wrong)
    with pytest.raises(ValueError, match=r"broadcast to shape \(4,\), got shape \(3,\)"):
        AutoIAF(schools, coordinates={"theta": torch.zeros(3)})()
    with pytest.raises(ValueError, match=r"\['tau', 'theta'\], got \['mu'\]"):
        AutoIAF(schools, coordinates={"mu": 0.5})()


def test_latents_of_several_dtypes_have_them_too():
    def model():
        tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(5.0, dtype=torch.float64)))
        with pyro.plate("schools", 4):
            theta = pyro.sample(
                "theta", dist.Normal(torch.zeros(4, dtype=torch.float32), tau.float())
            )
            pyro.sample("y", dist.Normal(theta, SIGMA), obs=torch.tensor([28.0, 8.0, -3.0, 7.0]))

    guide = AutoIAF(model, coordinates={"theta": 0.25})
    guide()
    assert guide.prior_coordinates.centered.tolist() == [1.0, 0.25, 0.25, 0.25, 0.25]
    found = fit(model, AutoIAF(model), num_steps=1, seed=0, progress=False)
    assert found.coordinates["theta"].max() < 0.5  # the data are weak


def test_a_model_whose_priors_stand_alone_has_no_map():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoIAF(model)
    guide()
    assert guide.prior_coordinates is None
    with pytest.raises(ValueError, match=r"\[\], got \['z'\]"):
        AutoIAF(model, coordinates={"z": 0.0})()


def test_a_chain_stays_a_chain():
    """In units of its prior each state would depend on all later data: the location is left out."""

    def walk():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        z = torch.zeros(())
        for t in range(20):
            z = pyro.sample(f"z{t}", dist.Normal(z, scale))
            pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=torch.tensor(0.1 * t))

    guide = AutoStructuredFlow(walk)
    guide()
    found = dict(guide.prior_coordinates.with_location)
    assert found.pop("scale")
    assert set(found.values()) == {False}
    assert len(guide.graph.elimination.root) < 5
    asked = AutoStructuredFlow(walk, coordinates={"z3": 0.0})
    asked()
    assert dict(asked.prior_coordinates.with_location) == {"z3": True}


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_elbo_is_that_of_the_map_by_hand(kind):
    """TraceMeanField_ELBO leaves out the density of a Delta, and would lose the map's."""
    guide = trained(GUIDES["iaf"])
    pyro.set_rng_seed(1)
    found = -sum(kind().loss(schools, guide) for _ in range(20)) / 20
    pyro.set_rng_seed(1)
    draws = torch.stack([guide.get_base_dist().sample() for _ in range(20)])
    with torch.no_grad():
        x, ladj = guide.transform.call_and_ladj(draws)
        log_q = guide.get_base_dist().log_prob(draws) - ladj
        expected = LogJoint(schools).with_coordinates(guide.prior_coordinates)(x) - log_q
    assert found == pytest.approx(expected.mean().item(), rel=1e-5)


def test_a_later_call_reads_no_tensor_and_does_not_list_the_store(monkeypatch):
    guide = trained(GUIDES["iaf"])

    def refuse(*_):
        raise AssertionError("a tensor was read, or the store was listed")

    for name in ("__bool__", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(type(pyro.get_param_store()), "named_parameters", refuse)
    with pyro.validation_enabled(False):
        assert guide()["theta"].shape == (4,)


def test_a_change_of_lambda_is_noticed():
    guide = trained(GUIDES["iaf"])
    coordinates, before = guide.prior_coordinates, guide.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    assert not coordinates.is_identity
    coordinates.set_(torch.ones(6), torch.ones(6))
    assert coordinates.is_identity
    assert guide.get_transform() is guide.transform
    guide.load_state_dict(before)
    assert not coordinates.is_identity
    assert not copy.deepcopy(guide).prior_coordinates.is_identity


def test_another_model_and_other_arguments_count_from_the_next_draw_on():
    def scaled(scale):
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.1))
        pyro.sample("z", dist.Normal(0.0, scale * tau))

    guide = AutoIAF(scaled, num_transforms=1, hidden_dims=8, coordinates={"z": 0.0})
    one, ten = torch.tensor(1.0), torch.tensor(10.0)
    sds = [guide.sample_posterior(500, scale)["z"].std() for scale in (one, ten)]
    sds += [
        guide.sample_posterior(500, scale=ten)["z"].std(),
        guide.sample_posterior(500)["z"].std(),
    ]
    guide.model = lambda scale: scaled(0.01 * scale)
    sds.append(guide.sample_posterior(500, one)["z"].std())
    sds = torch.stack(sds) / sds[0]
    # of 500 draws each, so that a ratio is known to 5 %
    assert torch.allclose(sds, torch.tensor([1.0, 10.0, 10.0, 10.0, 0.01]), rtol=0.3)


def imputed(x, y=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    missing, filled = x.isnan(), x
    if missing.any():
        with pyro.plate("missing", int(missing.sum())):
            values = pyro.sample("x_mis", dist.Normal(0.0, scale))
        filled = x.clone()
        filled[missing] = values
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=filled), obs=y)


def rows_with(num_missing, size=3):
    return torch.where(torch.arange(size) < num_missing, torch.nan, torch.arange(float(size)))


@pytest.mark.parametrize("kind", [AutoIAF, AutoStructuredFlow])
def test_arguments_with_other_latents(kind):
    """Of the shape of the first ones too: how many latents there are follows from values."""
    guide, data = kind(imputed), (rows_with(2), torch.ones(3))
    guide(*data)
    for x in (rows_with(0), rows_with(1), rows_with(1, 5), rows_with(4, 5)):
        draws, count = guide.sample_posterior(4, *data), int(x.isnan().sum())
        now = "" if count == 0 else rf", 'x_mis': \({count},\)"
        words = rf"latents {{'scale': \(\){now}}}, the guide has {{'scale': \(\), 'x_mis': \(2,\)}}"
        calls = [partial(guide.sample_posterior, 4), guide.median, partial(guide.log_prob, draws)]
        for call in [*calls, *([guide] if len(x) == 5 else [])]:
            with pytest.raises(ValueError, match=words) as refused:
                call(x)
        # the remedy
        if "without those of ['x_mis']" in str(refused.value):
            del draws["x_mis"]
        assert ("x_mis" in draws) == (count == 0)
        found = Predictive(imputed, posterior_samples=draws)(x)
        assert found["y"].shape == (4, len(x))
    assert guide.sample_posterior(4, *data)["x_mis"].shape == (4, 2)
    # what is predicted now is no latent of the model
    assert guide.sample_posterior(4, rows_with(2, 6))["x_mis"].shape == (4, 2)


def test_latents_that_have_data_now_are_not_missing():
    def model(theta=None):
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, tau), obs=theta)
            pyro.sample("y", dist.Normal(theta, SIGMA), obs=SIGMA)

    guide = AutoIAF(model, num_transforms=1, hidden_dims=8)
    guide()
    assert (
        guide.sample_posterior(2, torch.zeros(4))["tau"].shape
        == guide(SIGMA)["tau"].expand(2).shape
    )


def test_an_unpickled_guide_asks_for_the_data_that_its_prior_needs():
    guide, data = AutoStructuredFlow(imputed), (rows_with(2), torch.ones(3))
    guide(*data)
    unpickled = pickle.loads(pickle.dumps(guide))
    unpickled.model = imputed
    for call in (partial(unpickled.sample_posterior, 3), unpickled.median):
        with pytest.raises(
            TypeError, match=r"sample_posterior\(n, \*data\): this guide uses coordinates from"
        ):
            call()
    assert unpickled.sample_posterior(3, *data)["x_mis"].shape == (3, 2)
    assert unpickled.sample_posterior(3)["x_mis"].shape == (3, 2)


def test_a_model_with_bound_arguments_keeps_them_to_itself():
    """Those of a ``partial`` are no arguments of the guide's calls."""

    def groups(sd, y):
        tau = pyro.sample("tau", dist.HalfNormal(sd))
        with pyro.plate("groups", 4):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, tau)), 1.0), obs=y)

    guide = AutoIAF(partial(groups, 2.0), num_transforms=1, hidden_dims=8)
    guide(SIGMA)
    assert guide.prior_coordinates is not None
    latent = guide.get_transform(SIGMA)(torch.zeros(3, 5))
    assert latent.isfinite().all()
