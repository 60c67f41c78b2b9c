# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import init_to_value

from pyro_artransform import AutoIAF, AutoStructuredFlow, fit
from pyro_artransform.guides.structured.parents_mlp import ParentsMLP
from pyro_artransform.inference.optimization.objective import PathObjective
from pyro_artransform.inference.optimization.schedule import Schedule
from pyro_artransform.inference.optimization.training import Training
from pyro_artransform.model import LogJoint
from pyro_artransform.model.graphs.sparse_gaussian import PrecisionPattern, SparseGaussian
from pyro_artransform.testing import redraw
from tests.guides import models
from tests.inference.conftest import quick_fit
from tests.model.graphs.test_dependencies import mixture, switched


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
    tau = pyro.sample("tau", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def path(y):
    z = pyro.sample("z", dist.Normal(y.new_zeros(len(y)), 3.0).to_event(1))
    pyro.factor("steps", -2 * (z[..., 1:] - z[..., :-1]).square().sum(-1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


Y = torch.tensor([0.3, -1.2, 2.2, 0.9, 1.6, -0.3, 0.8, 1.9], dtype=torch.float64)


def new(model=hierarchy, *args, **options):
    # as the model is written: in coordinates of its prior groups are independent
    guide = AutoStructuredFlow(model, **{"hidden_dim": 4, "coordinates": "model", **options})
    guide.set_up(*(args or (Y,)))
    return guide


def test_independences_are_those_of_the_graph_whatever_the_parameters():
    guide = redraw(new(path), 2.0)
    z = guide.rsample_and_log_prob(1)[0][0].detach()
    hessian = torch.func.hessian(guide.get_posterior().log_prob)(z)
    markov = guide.markov_graph()
    full = markov.elimination
    allowed = torch.eye(8).bool()
    for i, own in enumerate(full.parents):
        # the parents of a coordinate may interact in its factor
        for a in (i, *own):
            allowed[a, [i, *own]] = True
    assert not (hessian[~allowed].abs() > 1e-10).any()
    assert (hessian[allowed].abs() > 1e-10).any()


def test_graph_has_names():
    graph = new().graph
    assert graph.root == (("mu",), ("tau",))
    assert graph.parents("theta", 3) == (("mu",), ("tau",))
    assert graph.parents("mu") == ()
    assert ("theta", 7) in graph.neighbours("tau")
    assert graph.levels == ((("mu",), ("tau",)), tuple(("theta", i) for i in range(8)))
    with pytest.raises(ValueError, match=r"such as \('theta', 7\), got \('theta', 9\)"):
        graph.parents("theta", 9)
    assert repr(graph) == (
        "LatentGraph(\n"
        "  10 latents, 17 dependencies\n"
        "  levels: 2\n"
        "  root block: 2 (mu, tau)\n"
        "  parents of the others: at most 2, 2.0 on average\n"
        ")"
    )
    guide = new(models.shapes, models.data())
    names = guide.graph.names
    assert {("cell", 1, 3), ("unit",)} <= set(names)
    assert len(names) == guide.latent_dim == len(set(names))


def test_start_at_a_gaussian_with_other_dependencies_is_the_nearest():
    guide = new()
    root = torch.randn(10, 10).tril(-1) * 0.3 + torch.eye(10)
    loc = torch.randn(10)
    guide.start_at(loc, root)
    transform = guide.get_transform()
    with torch.no_grad():
        found = transform(torch.eye(10)) - transform(torch.zeros(10))
    covariance, exact = found.T @ found, root @ root.T
    assert torch.allclose(transform(torch.zeros(10)), loc)
    # KL(p|q) is least where all coordinates have their variances and covariances with parents
    assert torch.allclose(covariance.diagonal(), exact.diagonal())
    assert torch.allclose(covariance[2:, :2], exact[2:, :2])
    guide.start_at(loc, torch.full((10,), 0.5))
    z, log_q = guide.rsample_and_log_prob(5)
    assert torch.allclose(log_q, dist.Normal(loc, 0.5).to_event(1).log_prob(z))


def start_at_precision(guide, loc):
    """Starts a guide of the path at a Gaussian with a tridiagonal precision, and returns that."""
    dim = len(loc)
    precision = 5 * torch.eye(dim) - torch.ones(dim - 1).diag(1) - torch.ones(dim - 1).diag(-1)
    pattern = PrecisionPattern(guide.markov_graph().elimination)
    rows, columns = precision.triu().nonzero().T
    entries = loc.new_zeros(pattern.num_entries)
    entries[pattern.index(rows, columns)] = precision[rows, columns]
    guide.start_at_gaussian(SparseGaussian.from_precision(pattern, loc, entries))
    return precision


def test_start_at_a_precision():
    guide, loc = new(path), torch.arange(8.0)
    precision = start_at_precision(guide, loc)
    z, log_q = guide.rsample_and_log_prob(6)
    expected = dist.MultivariateNormal(loc, precision_matrix=precision).log_prob(z)
    assert torch.allclose(log_q, expected, atol=1e-9)


def test_what_is_refused():
    for name in ("hidden_dim", "num_transforms"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive integer, got 0"):
            AutoStructuredFlow(hierarchy, **{name: 0})
    with pytest.raises(RuntimeError, match="does not know the model's latents yet"):
        _ = AutoStructuredFlow(hierarchy).graph

    def random():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("noise", (torch.randn(3) * x).sum(-1))

    with pytest.raises(ValueError, match="got a random one"):
        AutoStructuredFlow(random).set_up()


def test_state_dicts_and_copies_have_the_graph():
    guide = redraw(new(path), 0.3)
    other = new(path)
    other.load_state_dict(guide.state_dict())
    draws = guide.sample_posterior(5)
    for twin in (other, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert twin.graph == guide.graph
        assert torch.equal(twin.log_prob(draws), guide.log_prob(draws))
    of_another_model = new(hierarchy)
    with pytest.raises(RuntimeError, match=r"another model: expected 10 latents .* got 8"):
        of_another_model.load_state_dict(guide.state_dict())
    assert of_another_model.sample_posterior(2)["theta"].shape == (2, 8)


def test_discrete_sites_are_summed_out():
    y = torch.tensor([-1.2, 2.3, 1.9, -0.7])
    guide = new(mixture, y)
    assert guide.graph.neighbours("locs", 0) == (("locs", 1),)
    svi = SVI(mixture, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO())
    assert svi.step(y) < 1e6


def test_a_switched_off_dependency_is_found_on_draws_of_the_fitted_guide():
    y = torch.full((3,), 9.0)
    guide = AutoStructuredFlow(switched, hidden_dim=4)
    guide.set_up(y)
    assert guide.graph.neighbours("x") == ()
    batches = [((y,), {})]
    assert not guide.missing_over_batches(batches)
    result = quick_fit(switched, guide, y, num_steps=30, progress=False)
    assert not result.trusted
    assert "lacks dependencies" in result.verdict
    assert "x and z[0]" in result.verdict
    missing = ["x and z[0]", "x and z[1]", "x and z[2]"]
    assert guide.missing_over_batches(batches) == missing
    # with a start where they are active
    again = AutoStructuredFlow(switched, init_loc_fn=init_to_value(values=guide.median()))
    again.set_up(y)
    assert len(again.graph.neighbours("x")) == 3
    assert not again.missing_over_batches(batches)


def test_draws_are_those_of_the_parts(monkeypatch):
    guide = redraw(new(), 0.3)
    monkeypatch.setattr(AutoStructuredFlow, "_most_draws", lambda _: 5)

    def gradients(*sizes):
        torch.manual_seed(0)
        drawn = [guide.rsample_and_log_prob(size, path=True) for size in sizes]
        z, log_q = (torch.cat(parts) for parts in zip(*drawn))
        assert torch.allclose(guide.get_posterior().log_prob(z), log_q)
        loss = (log_q + z.square().sum(-1)).mean()
        return z, *torch.autograd.grad(loss, list(guide.parameters()), materialize_grads=True)

    for one, other in zip(gradients(10), gradients(5, 5)):
        assert torch.allclose(one, other)
    assert guide.sample_posterior(12)["theta"].shape == (12, 8)


def test_steps_are_shares_of_conditional_sds():
    guide = new(path, num_transforms=3)
    assert sum(isinstance(part, ParentsMLP) for part in guide.modules()) == 3
    start_at_precision(guide, torch.zeros(8))
    scales = guide.step_scales()
    assert scales.keys() <= set(guide.parameters())
    parents = guide.graph.elimination.parents
    leaf = next(
        i for i in range(8) if not any(i in own for own in parents) and len(parents[i]) == 2
    )
    # the sd given both neighbours
    assert torch.allclose(scales[guide._parts[1].loc][leaf], torch.tensor(5.0).rsqrt())
    for parameter, scale in scales.items():
        torch.broadcast_shapes(parameter.shape, scale.shape)


def test_steps_of_many_dependent_latents_do_not_diverge():
    """A logistic regression on 100 columns, from its Laplace approximation, in single precision."""
    dim, generator = 100, torch.Generator().manual_seed(0)
    x = torch.randn(3 * dim, dim, generator=generator) * 2 / dim**0.5
    y = torch.bernoulli((x @ torch.randn(dim, generator=generator)).sigmoid(), generator=generator)

    def regression():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=z @ x.T).to_event(1), obs=y)

    loc, identity = torch.zeros(dim), torch.ones(dim).diag()
    for _ in range(10):
        p = (x @ loc).sigmoid()
        precision = identity + x.T @ ((p * (1 - p))[:, None] * x)
        loc = loc + torch.linalg.solve(precision, x.T @ (y - p) - loc)
    torch.manual_seed(0)
    guide = AutoStructuredFlow(regression)
    guide.set_up()
    assert len(guide.graph.root) == dim
    guide.start_at(loc, torch.linalg.cholesky(torch.linalg.inv(precision)))
    objective = PathObjective(LogJoint(regression, (), {}), guide)
    before = objective.elbo_draws(1000).mean()
    training = Training(objective, Schedule(1, dim, 100).of_length(40), 16, guide.step_scales)
    for _ in range(40):
        training.step()
    assert objective.elbo_draws(1000).mean() > before


@pytest.mark.slow
def test_hierarchy_is_fitted_to_the_evidence():
    y = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 1.5 + 1
    guide, flow = AutoStructuredFlow(hierarchy), AutoIAF(hierarchy)
    result = fit(hierarchy, guide, y, seed=0, progress=False)
    assert result.trusted, result.verdict
    assert result.log_evidence - result.elbo < 0.02
    other = fit(hierarchy, flow, y, seed=0, progress=False)
    assert result.elbo > other.elbo - 0.1
