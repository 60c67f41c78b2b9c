# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import init_to_value

from pyro_artransform.model import LogJoint
from pyro_artransform.model.graphs.dependencies import find_dependencies, missing_dependencies
from tests.model.models import hierarchy


def vector_chain():
    z = pyro.sample("z", dist.Normal(torch.zeros(30), 10.0).to_event(1))
    pyro.factor("steps", -0.5 * (z[..., 1:] - z[..., :-1]).square().sum(-1) / 0.01)


def crossed(y):
    with pyro.plate("rows", y.shape[0], dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", y.shape[1], dim=-1):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("row", y.shape[0], dim=-2), pyro.plate("column", y.shape[1], dim=-1):
        pyro.sample("y", dist.Normal(a * b, 1.0), obs=y)


def mixture(y):
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    pyro.sample("scale", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[..., kind], 1.0), obs=y)


def saturated(y):
    """At the medians of these priors, logits are so large that the likelihood is constant."""
    with pyro.plate("questions", len(y), dim=-2):
        alpha = pyro.sample("alpha", dist.Normal(100.0, 30.0))
    with pyro.plate("students", y.shape[1], dim=-1):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", len(y), dim=-2):
            pyro.sample("y", dist.Bernoulli(logits=theta - alpha), obs=y)


def edges(model, *args):
    log_joint = LogJoint(model, args)
    return {(i, j) for i, own in enumerate(find_dependencies(log_joint)) for j in own if i < j}


CASES = {
    "chain": (vector_chain, (), {(i, i + 1) for i in range(29)}),
    "hierarchy": (
        hierarchy,
        (torch.randn(5),),
        {(0, 1), *((k, 2 + i) for k in (0, 1) for i in range(5))},
    ),
    "crossed plates": (
        crossed,
        (torch.randn(3, 4),),
        {(i, 3 + j) for i in range(3) for j in range(4)},
    ),
    "saturated": (
        saturated,
        ((torch.rand(3, 4) < 0.5).double(),),
        {(i, 3 + j) for i in range(3) for j in range(4)},
    ),
    "enumerated": (mixture, (torch.randn(6),), {(0, 1)}),
}


@pytest.mark.parametrize(("model", "args", "expected"), CASES.values(), ids=CASES)
def test_edges_are_those_of_the_model(model, args, expected):
    assert edges(model, *args) == expected


def test_edges_in_single_precision():
    y = torch.randn(200, dtype=torch.float32)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 10.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, y.new_tensor(1e-2)))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    assert edges(model, y) == {(0, 1 + i) for i in range(200)}


def test_neighbours_in_a_chain_and_no_random_numbers_taken():
    log_joint = LogJoint(vector_chain)
    state = torch.get_rng_state()
    found = find_dependencies(log_joint)
    assert torch.equal(state, torch.get_rng_state())
    assert found == tuple({i - 1, i + 1} & {*range(30)} for i in range(30))


def switched(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        # on for x > 2 only, where the search does not look
        loc = torch.where(x > 2, z, 0.0 * z)
        pyro.sample("y", dist.Normal(loc + 3 * x, 0.1), obs=y)


def test_a_dependency_that_is_switched_off_is_found_at_other_draws():
    log_joint = LogJoint(switched, (torch.full((3,), 9.0),))
    graph = [set() for _ in range(4)]
    near = 0.1 * torch.randn(8, 4)
    assert missing_dependencies(log_joint, graph, near) == []
    far = near + torch.tensor([2.0, 0.0, 0.0, 0.0])
    assert missing_dependencies(log_joint, graph, far) == [(0, 1), (0, 2), (0, 3)]


def neighbouring_cells(size=10):
    cell = torch.arange(size * size).reshape(size, size)
    pairs = [(cell[:, :-1], cell[:, 1:]), (cell[:-1], cell[1:])]
    one, other = (torch.cat([part.flatten() for part in ends]) for ends in zip(*pairs))
    adjacency = torch.zeros(size * size, size * size, dtype=torch.float32)
    adjacency[one, other] = adjacency[other, one] = 1.0
    return adjacency


def ill_conditioned_field():
    """A field on a grid with a nearly singular precision, in single precision."""
    adjacency = neighbouring_cells()
    precision = adjacency.sum(-1).diag() - adjacency + 1e-3 * torch.eye(100)
    tau = pyro.sample("tau", dist.Gamma(adjacency.new_ones(()), 0.01))
    precision, zero = tau[..., None, None] * precision.float(), adjacency.new_zeros(100)
    field = pyro.sample("field", dist.MultivariateNormal(zero, precision_matrix=precision))
    pyro.sample("y", dist.Exponential(field.exp()).to_event(1), obs=zero + 1.0)


def test_round_off_of_an_ill_conditioned_sum_is_no_missing_dependency():
    log_joint = LogJoint(ill_conditioned_field)
    cells = [{0, *(1 + own.nonzero()[:, 0]).tolist()} for own in neighbouring_cells()]
    graph = [set(range(1, 101)), *cells]
    draws = log_joint.start + 0.5 * torch.randn(64, 101, dtype=torch.float32)
    assert missing_dependencies(log_joint, graph, draws) == []
    graph[1].remove(2)
    graph[2].remove(1)
    found = missing_dependencies(log_joint, graph, draws)
    assert found == [(1, 2)]


@pytest.mark.parametrize(("slope", "missing"), [(1e-3, []), (0.05, [(0, 1)])])
def test_a_dependency_is_missing_from_where_on_it_matters(slope, missing):
    """In coordinates of the prior all of a chain depend on each other, less and less down to round-off."""

    def pair():
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))
        pyro.sample("x", dist.Normal(slope * z / 2, 1.0))

    log_joint = LogJoint(pair)
    draws = torch.randn(64, 2) * torch.tensor([2.0, 1.0])
    assert missing_dependencies(log_joint, [set(), set()], draws) == missing


def test_missing_edges_of_a_model_that_draws_its_mini_batches():
    """One of them is looked at: what a batch has is missing, and what changes between batches is not."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(7), 1.0).to_event(1))
        with pyro.plate("pairs", 6, subsample_size=2) as i:
            pyro.sample("y", dist.Normal(z[..., i] - z[..., i + 1], 0.1), obs=torch.zeros(2))

    log_joint, draws = LogJoint(model), torch.randn(8, 7)
    edges = {(i, i + 1) for i in range(6)}
    chain = [{j for pair in edges if i in pair for j in pair} - {i} for i in range(7)]
    assert missing_dependencies(log_joint, chain, draws) == []
    found = missing_dependencies(log_joint, [set() for _ in range(7)], draws)
    assert len(found) == 2
    assert edges.issuperset(found)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (lambda x: torch.randn(3) * x, "a deterministic density, got a random one"),
        # the root has an infinite slope at zero
        (
            lambda x: (0 * x).abs().sqrt(),
            "a finite log density and gradient near the initial values",
        ),
    ],
)
def test_a_density_that_is_random_or_has_no_finite_gradient_is_refused(factor, message):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("factor", factor(x).sum(-1))

    with pytest.raises(ValueError, match=message):
        find_dependencies(LogJoint(model))


def bounded():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    inside = x.abs().amax(-1) < 0.3
    pyro.factor("edge", torch.where(inside, x[..., 0] * x[..., 1], torch.nan))


def test_where_the_density_is_not_finite_steps_are_shorter():
    log_joint = LogJoint(bounded, init_loc_fn=init_to_value(values={"x": torch.zeros(3)}))
    assert find_dependencies(log_joint) == ({1}, {0}, set())
    # a start without a finite density gives way to another point
    start = init_to_value(values={"x": torch.ones(3)})
    assert find_dependencies(LogJoint(bounded, init_loc_fn=start)) == ({1}, {0}, set())


def pairs(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", len(y)):
        a = pyro.sample("a", dist.Normal(mu[..., 0], 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(a * b[..., 0], b[..., 1].exp()), obs=y)


def coupled(y):
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("steps", -(z[..., 1:] - z[..., :-1]).square().sum(-1))


@pytest.mark.parametrize(
    ("model", "is_quick"), [(pairs, True), (hierarchy, True), (coupled, False)]
)
def test_elements_that_move_at_once_give_the_same_graph(model, is_quick, monkeypatch):
    log_joint = LogJoint(model, (torch.randn(40),))
    (frame,) = {frame for site in log_joint.latents.sites.values() for frame in site.plates}
    elements = log_joint.latents.elements_of(frame)
    counts, evaluate = [0], type(log_joint).__call__

    def counted(self, z):
        counts[-1] += len(z)
        return evaluate(self, z)

    monkeypatch.setattr(type(log_joint), "__call__", counted)
    one_by_one = find_dependencies(log_joint)
    counts.append(0)
    at_once = find_dependencies(log_joint, elements)
    assert at_once == one_by_one
    # all but the rest and one element, and as many halves of elements
    saved = (log_joint.latents.latent_dim * 39 // 40 if is_quick else 0) - 22
    assert counts[0] - counts[1] >= saved - 10
