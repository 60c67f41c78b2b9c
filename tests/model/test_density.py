# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from torch.utils.checkpoint import checkpoint

from pyro_artransform import AutoIAF
from pyro_artransform.diagnostics import importance
from pyro_artransform.model import LogJoint
from tests.inference.conftest import quick_fit
from tests.model import models
from tests.model.models import by_trace

STRATEGIES = {
    "one_plate": "plate",
    "nested_plates": "plate",
    "supports": "plate",
    "scaled_and_masked": "plate",
    "given_indices": "plate",
    "mixed_dtypes": "plate",
    "silently_wrong_in_a_plate": "vmap",
    "accumulated": "loop",
    "python_branch": "loop",
    "python_number": "loop",
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_agrees_with_the_trace(name):
    model = getattr(models, name)
    log_joint = LogJoint(model)
    assert log_joint.strategy == STRATEGIES[name], log_joint.reason
    z = torch.randn(7, log_joint.latents.latent_dim)
    expected = torch.stack([by_trace(model, row) for row in z])
    assert expected.isfinite().all()
    tolerance = 1e-6 if name == "mixed_dtypes" else 1e-12
    assert torch.allclose(log_joint(z), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["supports", "scaled_and_masked", "accumulated"])
def test_gradient_by_differences(name):
    log_joint = LogJoint(getattr(models, name))
    z = torch.randn(3, log_joint.latents.latent_dim, requires_grad=True)
    assert torch.autograd.gradcheck(log_joint, (z,))


def test_draws_that_the_model_cannot_take():

    def model():
        z = pyro.sample("z", dist.Normal(1.0, 1.0))
        factor = torch.linalg.cholesky((10 - z)[..., None, None] * torch.eye(2))
        pyro.sample("root", dist.Normal(z.sqrt(), 1.0), obs=torch.tensor(1.0))
        pyro.sample("y", dist.Normal(factor[..., 0, 0], 1.0), obs=torch.tensor(1.0))

    log_joint = LogJoint(model)
    z = torch.tensor([[1.0], [25.0], [2.0], [-1.0]])
    found = log_joint(z)
    assert found.isnan().tolist() == [False, True, False, True]
    assert torch.allclose(found[[0, 2]], log_joint(z[[0, 2]]))
    assert "model itself" in log_joint.nonfinite_sites(z[:3])[0]
    assert log_joint.nonfinite_sites(z[2:]) == ["root"]
    assert log_joint.nonfinite_sites(z[:1]) == []


def test_draws_without_a_cholesky_factor_take_no_run_each():
    runs = []

    def model():
        z = pyro.sample("z", dist.Normal(1.0, 1.0))
        runs.append(1)
        factor = torch.linalg.cholesky((10 - z)[..., None, None] * torch.eye(2))
        pyro.sample("y", dist.Normal(factor[..., 0, 0], 1.0), obs=torch.tensor(1.0))

    log_joint = LogJoint(model)
    z = torch.linspace(-5.0, 25.0, 200)[:, None].requires_grad_()
    assert log_joint.strategy == "plate"
    runs.clear()
    found = log_joint(z)
    assert len(runs) == 2  # the first of which ended in an error
    assert found.isnan().tolist() == (z[:, 0] > 10).tolist()
    (gradient,) = torch.autograd.grad(found[z[:, 0] < 10].sum(), z)
    expected = -(z - 1) - 0.5 * (1 - (10 - z).sqrt()) / (10 - z).sqrt()
    assert torch.allclose(gradient[z < 10], expected[z < 10])


def test_minibatch_is_the_same_for_all_draws():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=3) as indices:
            pyro.sample("y", dist.Normal(z, 1.0), obs=indices.to(z.dtype))

    log_joint = LogJoint(model)
    assert log_joint.is_random
    found = log_joint(torch.zeros(10, 1))
    assert (found == found[0]).all()
    assert not torch.equal(found, log_joint(torch.zeros(10, 1)))


def test_leaves_no_trace():
    """The caller's handlers see nothing of it, and its random numbers stay as they were."""
    with poutine.trace() as traced:
        log_joint = LogJoint(models.one_plate)
        state = torch.get_rng_state()
        log_joint(torch.zeros(3, log_joint.latents.latent_dim))
        assert torch.equal(torch.get_rng_state(), state)
    assert set(traced.trace.nodes) <= {"_INPUT", "_RETURN"}


def test_refuses():
    def discrete():
        pyro.sample("kind", dist.Categorical(torch.ones(3)))

    with pytest.raises(ValueError, match="no continuous latent"):
        LogJoint(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)))
    with pytest.raises(
        ValueError, match=r"'kind' is a discrete latent; if it is data, pass it as obs="
    ):
        LogJoint(discrete)
    matrix = dist.ImproperUniform(dist.constraints.positive_definite, (), (2, 2))
    with pytest.raises(ValueError, match=r"'S': expected a support with a bijection.*got Positive"):
        LogJoint(lambda: pyro.sample("S", matrix))


def branch_above(bound):
    """A model that is legal in Pyro, one draw at a time; in a plate one draw decides for all."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if (z > bound).any():
        pyro.factor("tail", torch.tensor(-20.0))


@pytest.mark.parametrize(
    ("takes", "sd"),
    [
        (lambda z: (z > 2).any(), 1.0),
        (lambda z: (z > 2).all(), 1.0),
        (lambda z: z.max() < -2, 1.0),
        (lambda z: (z > 500).any(), 1000.0),
    ],
)
def test_branches_that_few_draws_take_are_seen(takes, sd):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, sd))
        pyro.factor("tail", torch.tensor(-20.0 if takes(z) else 0.0))

    assert LogJoint(model).strategy == "loop"


def test_checked_compares_draws_at_once_with_single_runs():
    """A branch that only the draws at hand take, their smallest weights or their largest."""
    log_joint = LogJoint(branch_above, (50.0,))
    z = torch.randn(200, 1)
    assert torch.allclose(log_joint.checked(z, z[:, 0])[0], log_joint(z))
    z[100] = 60.0
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    expected[100] -= 20.0
    values, found = log_joint.checked(z, torch.zeros(200))
    assert torch.allclose(values, expected)
    assert found.strategy == "loop"
    assert (
        "A branch or a loop depends on the values of latents. At test_density.py" in found.obstacle
    )
    assert log_joint.strategy == "plate"  # what a check finds is for the caller to decide


def test_a_branch_that_few_draws_take():
    """By one of many coordinates, so that weights do not tell."""
    prior = dist.Normal(torch.zeros(20), 3.0).to_event(1)

    def model():
        z = pyro.sample("z", prior)
        if (z[..., 7] > 8.5).any():
            pyro.factor("factor", torch.tensor(-0.1))

    log_joint = LogJoint(model)
    assert log_joint.strategy == "plate"
    for _ in range(3):  # the coordinates take turns
        z = 3 * torch.randn(1000, 20)
        log_q = prior.log_prob(z)
        values, log_joint = log_joint.checked(z, log_q)
    assert torch.allclose(values, log_q - 0.1 * (z[:, 7] > 8.5))


def test_a_branch_beside_a_large_density_in_float32():
    """Five nats are less than 1e-4 of 1e5, and more than its round-off."""
    torch.set_default_dtype(torch.float32)
    data = torch.randn(20_000)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if (z > 1).any():
            pyro.factor("factor", torch.tensor(-5.0))
        with pyro.plate("data", len(data)):
            pyro.sample("y", dist.Normal(z, 3.0), obs=data)

    z = torch.randn(200, 1)
    found = LogJoint(model).checked(z, dist.Normal(0.0, 1.0).log_prob(z[:, 0]))[0]
    expected = torch.stack([by_trace(model, row) for row in z])
    assert (found - expected).abs().max() < 1


def regression(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)


def test_as_many_draws_at_a_time_as_their_largest_tensor_allows():
    """Of a regression that has its data and weights, and not its design matrix, in each draw."""
    log_joint = LogJoint(regression, (torch.randn(300, 40), torch.randn(300)))
    assert log_joint.strategy == "vmap"
    assert log_joint.chunk_size == 2**23 // 340
    half = log_joint.with_arguments((torch.randn(130, 40), torch.randn(130)))
    assert half.chunk_size == pytest.approx(2 * log_joint.chunk_size, rel=0.01)

    def process():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        covariance = scale * torch.eye(30) + 1.0
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(30), covariance), obs=torch.ones(30))

    assert LogJoint(process).chunk_size == 2**23 // 30**2


def trained():
    scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, scale).expand([3]).to_event(1))
    pyro.factor("curve", -((z[..., 0] - z[..., 1] ** 2) ** 2) * scale)


@pytest.mark.parametrize("model", [trained, models.accumulated, models.python_branch])
def test_gradients_in_parts_are_those_of_all_draws_at_once(model):
    """Values, gradients of draws and parameters, and Hessians, in parts for the cache and for the memory."""
    whole = LogJoint(model)
    z = torch.randn(7, whole.latents.latent_dim, requires_grad=True)

    def found(chunk_size):
        log_joint = whole.view(_chunk_size=chunk_size)
        trained = [z, *dict(pyro.get_param_store().named_parameters()).values()]
        value = log_joint(z)
        first = torch.autograd.grad(value.sum(), trained, create_graph=True)
        again = torch.autograd.grad(log_joint(z).sum(), z)[0]
        second = torch.autograd.grad(first[0].square().sum(), z)[0]
        return [value, *first, again, second]

    for chunk_size in (100, 3):
        for one, other in zip(found(chunk_size), found(1000)):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_random_numbers_of_a_model_are_the_same_for_all_parts_and_derivatives():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("noisy", torch.rand(()) * z.pow(3).sum(-1))

    log_joint = LogJoint(model).view(_chunk_size=96)
    z = torch.randn(9, 2, requires_grad=True)
    value = log_joint(z)
    after = torch.rand(())
    normal = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    factor = ((value - normal) / z.pow(3).sum(-1)).detach()
    torch.testing.assert_close(factor, factor[:1].expand(9))
    (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    torch.testing.assert_close(first, 3 * factor[0] * z**2 - z)
    (second,) = torch.autograd.grad(first.sum(), z)
    torch.testing.assert_close(second, 6 * factor[0] * z - 1)
    assert torch.rand(()) != after


def test_a_part_that_does_not_count_may_have_an_infinite_gradient():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("steep", torch.where(z > 1, (z * 1e200) * 1e200, z))

    log_joint = LogJoint(model).view(_chunk_size=32)
    z = torch.tensor([[0.5], [2.0], [0.0]], requires_grad=True)
    value = log_joint(z)
    (found,) = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), z)
    assert found.tolist() == [[0.5], [0.0], [1.0]]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside_of_a_model(reentrant):
    weight = torch.tensor(2.0, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("c", checkpoint(lambda x: -weight * x**2, z, use_reentrant=reentrant))

    log_joint = LogJoint(model).view(_chunk_size=32)
    z = torch.randn(5, 1, requires_grad=True)
    log_joint(z).sum().backward()
    torch.testing.assert_close(z.grad, -(1 + 2 * weight.detach()) * z.detach())
    torch.testing.assert_close(weight.grad, -z.detach().square().sum())


# Densities that are random: each draw has random numbers of its own, and nothing is trusted


def of_rows(rows, size):
    """Normal data, of which a run sees some rows."""
    y = 1 + 3 * torch.randn(100)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("data", size), pyro.poutine.scale(scale=100 / size):
            pyro.sample("y", dist.Normal(z, 10.0), obs=y[rows()])

    return model


def draw_rows():
    return torch.randint(100, (50,))


def test_a_random_density_is_noticed():
    assert LogJoint(of_rows(draw_rows, 50)).is_random
    by_numpy = of_rows(lambda: torch.as_tensor(np.random.choice(100, 50)), 50)
    assert LogJoint(by_numpy).is_random
    # random numbers that do not count
    assert not LogJoint(of_rows(lambda: (torch.rand(3), torch.arange(50))[1], 50)).is_random


def test_nothing_is_trusted():
    model = of_rows(lambda: torch.randint(100, (3,)), 3)
    guide = AutoIAF(model, hidden_dims=8)
    result = quick_fit(model, guide, num_steps=3, progress=False, seed=0)
    assert not result.trusted
    assert "is random in another way" in result.verdict


def test_the_standard_error_knows_of_the_noise():
    """ELBOs that differ by nats had standard errors of hundredths."""
    model = of_rows(draw_rows, 50)
    guide = AutoIAF(model, hidden_dims=8)
    guide()
    found = [importance(model, guide, 200) for _ in range(4)]
    elbos = torch.tensor([one.elbo for one in found])
    # 4 estimates: their sd is within a factor of 4 of what each says, but in one of a thousand cases
    assert elbos.std() < 4 * max(one.elbo_se for one in found)


def vague():
    """The median of this prior of a precision is next to 0, where others are next to infinite."""
    precision = pyro.sample("precision", dist.Gamma(0.001, 0.001))
    with pyro.plate("groups", 4):
        z = pyro.sample("z", dist.Normal(0.0, precision.rsqrt()))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, -1.0, 0.5, 0.0]))


def test_a_start_without_digits_is_the_origin():
    start = LogJoint(vague).start
    assert torch.equal(start, torch.zeros(5))
    # a start with digits stays
    near = LogJoint(vague, init_loc_fn=init_to_value(values={"precision": torch.tensor(3.0)})).start
    assert near[0].isclose(torch.tensor(3.0).log())
    # and one that the user has given
    far = LogJoint(
        vague, init_loc_fn=init_to_value(values={"precision": torch.tensor(1e-30)})
    ).start
    assert far[0] < -60


def test_vague_priors_without_a_gradient_at_their_medians_start_at_the_origin():
    """The median of Gamma(0.001, 0.001) is 1e-301, where the gradient of a chain is infinite."""

    def model():
        one, other = (pyro.sample(name, dist.Gamma(0.001, 0.001)) for name in ("one", "other"))
        last = torch.tensor(0.0)
        for t in range(3):
            last = pyro.sample(f"z{t}", dist.Normal(last, one.rsqrt()))
            pyro.sample(f"y{t}", dist.Normal(last, other.rsqrt()), obs=torch.tensor(1.0))

    log_joint = LogJoint(model)
    z = log_joint.start[None].requires_grad_()
    (slope,) = torch.autograd.grad(log_joint(z).sum(), z)
    assert slope.isfinite().all()
