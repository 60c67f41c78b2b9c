# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import json
import random
import re
import traceback

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

from pyro_artransform.conditioners import TiltedSiLU
from pyro_artransform.guides import AutoAmortized, AutoIAF
from pyro_artransform.guides.persistence import persistent_guide as saving
from pyro_artransform.guides.persistence import spec as plain_data
from pyro_artransform.guides.persistence.spec import GuideSpec
from pyro_artransform.guides.prototype import prototype_trace
from pyro_artransform.joint.sites import same_support
from tests.guides import models

FNS = {
    "normal": lambda new: dist.Normal(new([0.0, 1.0]), 1.0).to_event(1),
    "gamma": lambda new: dist.Gamma(new(1.0), 1.0),
    "pareto": lambda new: dist.Pareto(new([1.0, 2.5]), 2.0),
    "uniform": lambda new: dist.Uniform(new(-1.0), new([2.0, 1 / 3])).to_event(1),
    "beta": lambda new: dist.Beta(new(1.0), 1.0),
    "mises": lambda new: dist.VonMises(new(1.0), 1.0),
    "dirichlet": lambda new: dist.Dirichlet(new([1.0, 2.0, 3.0])),
    "lkj": lambda new: dist.LKJCholesky(3, new(1.0)),
    "half": lambda new: dist.HalfCauchy(new(1.0)),
    "ordered": lambda new: dist.TransformedDistribution(
        dist.Normal(new([0.0, 0.0, 0.0]), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sites_survive_json(dtype):
    def model():
        with pyro.plate("plate", 2, dim=-3):
            for name, fn in FNS.items():
                pyro.sample(name, fn(torch.zeros((), dtype=dtype).new_tensor))

    guide = AutoIAF(model, hidden_dims=8)
    guide()
    plain = json.loads(json.dumps(guide._spec.to_plain()))
    spec = GuideSpec.from_plain(plain, torch.device("cpu"))
    assert spec.arguments.keys() == guide._spec.arguments.keys()
    assert (spec.observed, spec.dtype, spec.device) == ((), dtype, torch.device("cpu"))
    values = spec.latents.constrain(spec.zeros())
    back, sites = prototype_trace(spec.latents, values).nodes, guide.prototype_trace.nodes
    assert list(back) == list(sites) == list(FNS)
    for name, site in sites.items():
        assert same_support(back[name]["fn"].support, site["fn"].support), name
        assert back[name]["fn"].batch_shape == site["fn"].batch_shape
        assert back[name]["fn"].event_shape == site["fn"].event_shape
        assert back[name]["value"].dtype == site["value"].dtype == dtype
        assert back[name]["cond_indep_stack"] == site["cond_indep_stack"]
        biject_to(back[name]["fn"].support)


def test_bytes_in_a_tensor():
    for plain in (None, [], [{"a": [1, 2.5, "é"]}]):
        text = plain_data.plain_to_tensor(plain)
        assert text.dtype == torch.uint8
        assert plain_data.tensor_to_plain(text) == plain


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
    # a state dict does without, and then needs a guide that was called
    state, fresh = guide.state_dict(), AutoIAF(model, hidden_dims=8)
    with pytest.raises(RuntimeError, match="AutoIAF was never called, so it has no parameters yet"):
        fresh.load_state_dict(state)
    fresh()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.transform.transforms[1].loc, guide.transform.transforms[1].loc)


@pytest.mark.parametrize(
    "nonlinearity",
    [
        nn.Tanh(),
        nn.LeakyReLU(0.3),
        nn.ELU(alpha=0.7),
        nn.Softplus(beta=2),
        nn.GELU(approximate="tanh"),
        TiltedSiLU(0.25),
        torch.tanh,
        nn.functional.silu,
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_nonlinearity(nonlinearity):
    plain = json.loads(json.dumps(plain_data.argument_to_plain("nonlinearity", nonlinearity)))
    back = plain_data.argument_from_plain(plain)
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(back(x), nonlinearity(x))
    assert type(back) is type(nonlinearity)


def test_an_activation_that_is_unknown_is_named():
    with pytest.raises(AttributeError, match="'Unknown'"):
        plain_data.argument_from_plain({"module": "Unknown", "constants": {}})


@pytest.mark.parametrize("nonlinearity", [lambda x: x, nn.Sequential(nn.Tanh(), nn.Tanh())])
def test_nonlinearity_that_cannot_be_written(nonlinearity, tmp_path):
    guide = AutoIAF(models.regression, hidden_dims=8, nonlinearity=nonlinearity)
    guide(models.data())
    with pytest.raises(ValueError, match=r"nonlinearity: expected a module of torch\.nn or a func"):
        guide.save(tmp_path / "guide")


def save_guide(path):
    """Saves a guide; gives the content of its file."""
    guide = AutoIAF(models.regression, hidden_dims=8)
    guide(models.data())
    guide.save(path)
    return torch.load(path)


def write_altered(path, saved, **changes):
    """A file whose checksum is right."""
    torch.save({**saved, **changes}, path)


def test_bad_files(tmp_path):
    path = tmp_path / "guide"
    saved = save_guide(path)
    for bad in (3, {}, {**saved, "format": saved["format"] - 1}):
        torch.save(bad, path)
        with pytest.raises(ValueError, match=f"expected a guide's file of format {saving._FORMAT}"):
            AutoIAF.load(path)
    with pytest.raises(ValueError, match=f"got one of format {saving._FORMAT - 1}, which another"):
        AutoIAF.load(path)
    write_altered(path, saved, **{"class": "AutoMAF"})
    with pytest.raises(ValueError, match="expected a guide of class AutoIAF, got AutoMAF"):
        AutoIAF.load(path)
    name = "transform.transforms.1.log_scale"
    for value in (float("nan"), float("inf")):
        state = {**saved["state"], name: torch.tensor([0.0, value])}
        write_altered(path, saved, state=state)
        with pytest.raises(ValueError, match=f"'{name}': expected finite numbers, got 1 of 2"):
            AutoIAF.load(path)
    arguments = {**saved["spec"]["arguments"], "num_transforms": 1}
    write_altered(path, saved, spec={**saved["spec"], "arguments": arguments})
    with pytest.raises(ValueError, match="expected a guide with this flow"):
        AutoIAF.load(path)


def test_damaged_files(tmp_path):
    """Truncated anywhere, or with a byte changed anywhere: the same error, or nothing has changed."""
    path = tmp_path / "guide"
    guide = AutoIAF(models.regression, num_transforms=1, hidden_dims=2)
    guide(models.data())
    guide.save(path)
    whole, expected = path.read_bytes(), guide.state_dict()
    generator, num_found = random.Random(0), 0
    for at in range(0, len(whole), 97):
        place = generator.randrange(len(whole))
        byte = bytes([whole[place] ^ generator.randrange(1, 256)])
        for damaged in (whole[:at], whole[:place] + byte + whole[place + 1 :]):
            path.write_bytes(damaged)
            try:
                state = AutoIAF.load(path).state_dict()
            except ValueError as error:
                got = r"got (another file|one of format \d+, which another .* reads), or a damaged one"
                assert re.search(got, str(error))  # noqa: PT017
                num_found += 1
            else:
                assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert num_found > len(whole) // 97


def test_altered_tensors_and_specs(tmp_path):
    path = tmp_path / "guide"
    saved = save_guide(path)
    name = "transform.transforms.1.log_scale"
    state = {**saved["state"], name: saved["state"][name] + 1e-6}
    spec = {**saved["spec"], "observed": ["other"]}
    for changed in ({"state": state}, {"spec": spec}, {"state": 3}, {"state": {name: 3}}):
        torch.save({**saved, **changed}, path)
        with pytest.raises(ValueError, match="another file, or a damaged one"):
            AutoIAF.load(path)
    write_altered(path, saved, spec={})
    with pytest.raises(ValueError, match="expected what the guide's save writes"):
        AutoIAF.load(path)


def huge_site(saved):
    (loc, scale), dim = saved["spec"]["sites"], 30_000
    state = {
        name: value[..., :1].expand((*value.shape[:-1], dim)) if "transforms.1" in name else value
        for name, value in saved["state"].items()
    }
    return {
        "spec": {**saved["spec"], "sites": [{**loc, "shape": [dim - 1]}, scale]},
        "state": state,
    }


def huge_contiguous_site(saved):
    return {"spec": huge_site(saved)["spec"]}


def huge_networks(**arguments):
    def change(saved):
        return {"spec": {**saved["spec"], "arguments": {**saved["spec"]["arguments"], **arguments}}}

    return change


LINEAR = {"in_features": 2**20, "out_features": 2**20}
HUGE = {
    "expanded": (huge_site, "a damaged one"),
    "sites": (huge_contiguous_site, "expected at least .* bytes"),
    "widths": (huge_networks(hidden_dims=[2**20, 2**20]), "expected at least .* bytes"),
    "layers": (huge_networks(num_transforms=2**30), "expected at least .* bytes"),
    "activation": (
        huge_networks(nonlinearity={"module": "Linear", "constants": LINEAR}),
        "expected an activation",
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_nothing_huge_is_built(name, tmp_path):
    path, (change, message) = tmp_path / "guide", HUGE[name]
    saved = save_guide(path)
    write_altered(path, saved, **change(saved))
    assert path.stat().st_size < 200_000
    with pytest.raises(ValueError, match=message):
        AutoIAF.load(path)


def test_a_huge_state_dict_is_not_built():
    guide = AutoIAF(models.regression, hidden_dims=8)
    guide(models.data())
    state, plain = guide.state_dict(), guide._spec.to_plain()
    plain["arguments"]["full_rank"] = True
    plain["sites"][0]["shape"] = [2**20]
    state["_extra_state"] = plain_data.plain_to_tensor(plain)
    with pytest.raises(ValueError, match="damaged: expected at least"):
        AutoIAF(models.regression).load_state_dict(state)


def test_a_huge_plate_is_not_built(tmp_path):
    guide = AutoAmortized(models.locals_of)
    guide(models.data())
    guide.save(tmp_path / "guide")
    saved = torch.load(tmp_path / "guide")
    (site,) = saved["spec"]["sites"]
    site["plates"][0][2] = site["plates"][0][4] = 2**40
    write_altered(tmp_path / "guide", saved)
    with pytest.raises(ValueError, match="damaged: expected at least"):
        AutoAmortized.load(tmp_path / "guide")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "guide"
    guide = AutoIAF(models.regression, hidden_dims=8)
    guide(models.data())
    guide.save(path)
    before = path.read_bytes()

    def full_disk(content, file):
        (file if hasattr(file, "write") else open(file, "wb")).write(b"half")  # noqa: SIM115
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        guide.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["guide"]


def write_text(path):
    path.write_text("sites: loc, scale")


def write_param_store(path):
    AutoIAF(models.regression, hidden_dims=8)(models.data())
    pyro.get_param_store().save(str(path))


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        write_param_store,
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"state": {}, "format": saving._FORMAT}, path),
        lambda path: torch.save(nn.Linear(2, 2), path),
    ],
    ids=["text", "param store", "empty", "dict", "module"],
)
def test_files_that_save_did_not_write(write, tmp_path):
    path = tmp_path / "guide"
    write(path)
    with pytest.raises(
        ValueError, match=f"a guide's file of format {saving._FORMAT}, as the guide's save"
    ) as error:
        AutoIAF.load(path)
    assert "weights_only" not in "".join(traceback.format_exception(error.value))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        AutoIAF.load(tmp_path / "guide")


def test_errors_of_map_location_are_its_own(tmp_path):
    guide = AutoIAF(models.regression, hidden_dims=8)
    guide(models.data())
    guide.save(tmp_path / "guide")
    with pytest.raises(RuntimeError, match="nowhere"):
        AutoIAF.load(tmp_path / "guide", map_location="nowhere")
