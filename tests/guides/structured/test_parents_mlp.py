# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import gc
import weakref
from itertools import cycle

import pytest
import torch

from pyro_artransform.flows.transforms import AutoregressiveTransform, ConditionedUnivariate
from pyro_artransform.flows.univariate import Affine, RationalQuadraticSpline, Standardizing
from pyro_artransform.guides.structured.parents_mlp import (
    ParentsBlocks,
    ParentsLinearization,
    ParentsMLP,
)
from pyro_artransform.model.graphs.markov_graph import eliminate
from pyro_artransform.testing import check_conditioner, check_transform, redraw
from tests.flows.conditioners.test_masks import random_dag
from tests.model.graphs.markov_graphs import grid


def parents_of(adjacency):
    return [row.nonzero()[:, 0].tolist() for row in adjacency]


UNEVEN = torch.zeros(24, 24).bool()
UNEVEN[1:15, 0] = UNEVEN[15:, :15] = True
PARENTS = {
    "reversed": [[1], [2], [3], []],
    "none": [[], [], []],
    "one": [[]],
    "sparse": parents_of(random_dag(9, 0.3)),
    "dense": parents_of(random_dag(9, 0.8, 1)),
    "uneven": parents_of(UNEVEN),
    "grid": eliminate(grid(5, 5)).parents,
}
CHAIN = [[], [0], [1], [2]]
every_graph = pytest.mark.parametrize("parents", PARENTS.values(), ids=PARENTS)
# each graph with one family, each family with several graphs
FAMILIES = (Affine, Standardizing, RationalQuadraticSpline)
with_a_family = pytest.mark.parametrize(
    ("parents", "family"), list(zip(PARENTS.values(), cycle(FAMILIES))), ids=PARENTS
)


def layer(parents, family=Affine, **options):
    """The inverse of a layer, whose values go through the graph level by level."""
    network = redraw(ParentsMLP(parents, family().num_params, 4, **options).double())
    return AutoregressiveTransform(ConditionedUnivariate(network, family())).inv


@every_graph
def test_contract(parents):
    adjacency = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for i, own in enumerate(parents):
        adjacency[i, list(own)] = True
    check_conditioner(lambda: ParentsMLP(parents, 3, 4), len(parents), adjacency=adjacency)


@with_a_family
def test_transforms_in_both_directions(parents, family):
    # in many dimensions larger weights amplify round-off beyond the tolerance
    gain = 2.0 if len(parents) < 20 else 1.0
    check_transform(lambda: layer(parents, family).inv, len(parents), gain=gain)
    check_transform(lambda: layer(parents, family), len(parents), gain=gain)


@every_graph
def test_adjoint_by_one_sweep_is_that_by_iteration(parents, monkeypatch):
    transform = layer(parents, bias=len(parents) % 2 == 0)
    x = torch.randn(2, 3, len(parents)).requires_grad_()
    weight = torch.randn(2, 3, len(parents))

    def gradients():
        y, ladj = transform.call_and_ladj(x)
        loss = (weight * y).sum() + ladj.square().sum()
        return torch.autograd.grad(loss, [x, *transform.parameters()])

    found = gradients()
    monkeypatch.setattr(ParentsBlocks, "linearization", lambda _: None)
    for one, other in zip(found, gradients(), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@with_a_family
def test_score_is_that_of_the_density(parents, family):
    transform = layer(parents, family)
    x = torch.randn(2, 3, len(parents)).requires_grad_()
    y, ladj, score = transform.call_and_score(x, -x)
    point = y.detach().requires_grad_()
    back, back_ladj = transform.inverse_and_ladj(point)
    log_prob = -0.5 * back.square().sum() + back_ladj.sum()
    assert torch.allclose(score, torch.autograd.grad(log_prob, point)[0], atol=1e-10)
    assert torch.allclose(y, transform(x), atol=1e-12)
    assert torch.allclose(ladj, transform.call_and_ladj(x)[1], atol=1e-12)
    gradients = [torch.autograd.grad(v.sum(), x)[0] for v in (y, transform(x))]
    assert torch.allclose(*gradients, atol=1e-12)


def test_gradients_with_frozen_networks():
    transform = layer(PARENTS["sparse"]).requires_grad_(False)
    assert not transform(torch.randn(5, 9)).requires_grad
    x = torch.randn(9).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(transform._call, x)
    with torch.no_grad():
        other = torch.autograd.functional.jacobian(transform.inv._call, transform(x))
    assert torch.allclose(jacobian @ other, torch.eye(9), atol=1e-12)


def test_vmap_and_tracing_go_level_by_level():
    transform, x = layer(PARENTS["sparse"]), torch.randn(5, 9)
    expected = transform(x)
    assert torch.allclose(torch.vmap(transform._call)(x), expected, atol=1e-12)
    jacobian = torch.func.jacrev(transform._call)(x[0])
    found = torch.autograd.functional.jacobian(transform._call, x[0])
    assert torch.allclose(jacobian, found, atol=1e-12)


def test_another_graph_of_the_same_size_is_refused():
    network, other = ParentsMLP([[], [0], [1]], 2), ParentsMLP([[], [0], [0]], 2)
    with pytest.raises(RuntimeError, match="another graph"):
        other.load_state_dict(network.state_dict())


def test_bad_arguments_and_inputs():
    cases = {
        "without a cycle": ([[1], [0]], 2),
        "coordinates from 0 to 1, got 5": ([[], [5]], 2),
        "positive integer": ([], 2),
        "hidden_dim: expected a positive integer": ([[]], 2, 0),
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            ParentsMLP(*arguments)
    network = ParentsMLP(CHAIN, 2)
    with pytest.raises(ValueError, match=r"expected shape \(\*, 4\), got \(3,\)"):
        network(torch.zeros(3))


def test_a_step_leaves_nothing_for_the_garbage_collector(monkeypatch):
    """A cycle between a graph and what it was made of would hold all activations of many steps."""
    found, init = [], ParentsLinearization.__init__

    def counted(self, *args):
        init(self, *args)
        found.append(weakref.ref(self))

    monkeypatch.setattr(ParentsLinearization, "__init__", counted)
    transform = layer(PARENTS["sparse"])
    gc.collect()
    gc.disable()
    try:
        y, ladj, score = transform.call_and_score(torch.randn(5, 9), torch.randn(5, 9))
        (y * score).sum().backward()
        del y, ladj, score
        assert found
        assert not any(reference() for reference in found)
    finally:
        gc.enable()
