# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models of Pyro's examples: density, SVI, `fit`, predictions and relations, as with Pyro's guides."""

import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_model_relations, render_model

from pyro_artransform import AutoIAF, AutoStructuredFlow, fit
from pyro_artransform.joint import LogJoint
from tests.guides.idioms.models import EXAMPLES, example_of_baseball, example_of_radon
from tests.inference.conftest import QUICK
from tests.joint.by_trace import by_trace

every_example = pytest.mark.parametrize("name", EXAMPLES)
GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoIAF": lambda model: AutoIAF(model, num_transforms=2, hidden_dims=8),
    "AutoStructuredFlow": lambda model: AutoStructuredFlow(model, hidden_dim=4),
}
every_guide = pytest.mark.parametrize("kind", GUIDES)

LEAN = replace(
    QUICK,
    initialization=replace(QUICK.initialization, num_points=2, mean_field_steps=5),
    evaluation=replace(QUICK.evaluation, num_samples=200, num_screened=10, num_climbs=1),
)

#: that of each model as it is written; "plate" is faster, and wants indices such as ``a[..., county]``
STRATEGIES = {
    "baseball": "plate",
    "correlation": "vmap",
    "radon": "vmap",
    "counts": "vmap",
    "process": "vmap",
    "items": "vmap",
    "network": "vmap",
    "ordinal": "copies",
}


@every_example
def test_many_draws_at_once(name):
    """Draws at once are those in turn, near the start and far away."""
    example = EXAMPLES[name]()
    log_joint = LogJoint(example.model, example.with_data())
    assert log_joint.strategy == STRATEGIES[name], log_joint.reason
    assert log_joint.latents.latent_dim <= 20
    z = log_joint.start + torch.tensor([0.1, 1.0])[:, None] * torch.randn(
        2, log_joint.latents.latent_dim
    )
    expected = [by_trace(lambda: example.model(*example.with_data()), row) for row in z]
    assert torch.allclose(log_joint(z), torch.stack(expected), rtol=1e-10)


def steps(example, guide, count=3):
    """Steps of Pyro's SVI."""
    svi = SVI(example.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(*example.with_data()) for _ in range(count)]


@every_guide
@every_example
def test_steps_and_predictions(name, kind):
    example = EXAMPLES[name]()
    guide = GUIDES[kind](example.model)
    assert all(math.isfinite(loss) for loss in steps(example, guide))
    if name == "correlation":
        return  # it takes its data to know their shape
    predictive = Predictive(example.model, guide=guide, num_samples=4)
    drawn = predictive(*example.args)
    (observed,) = {"obs", "log_radon", "y", "answer"} & drawn.keys()
    assert drawn[observed].shape == (4, len(example.data))
    assert drawn[observed].double().std() > 0
    if example.rows:
        latents = guide(*example.new_args())
        assert predictive(*example.new_args())[observed].shape == (4, example.rows)
        assert set(guide(*example.args)) == set(latents)


@every_guide
def test_predictions_in_parallel(kind):
    example = example_of_baseball()
    guide = GUIDES[kind](example.model)
    steps(example, guide)
    predictive = Predictive(example.model, guide=guide, num_samples=500, parallel=True)
    drawn = predictive(*example.args)
    assert drawn["obs"].shape == (500, 6)
    assert drawn["alpha"].shape == (500, 6)
    # each number of hits belongs to its own draw: six standard errors of the mean of their differences
    expected = 45 * drawn["alpha"].sigmoid()
    error = (expected * (1 - expected / 45) / 500).mean(0).sqrt()
    assert ((drawn["obs"] - expected).mean(0).abs() < 6 * error).all()


@every_guide
@every_example
def test_relations(name, kind):
    """What `pyro.render_model` draws, of a model and of its guide."""
    example = EXAMPLES[name]()
    guide = GUIDES[kind](example.model)
    relations = get_model_relations(example.model, example.with_data())
    found = get_model_relations(guide, example.with_data())
    drawn = set(guide(*example.with_data()))
    assert drawn <= set(relations["sample_sample"])
    assert drawn | {f"_{kind}_latent"} >= set(found["sample_sample"]) - {
        f"{name}_unconstrained" for name in drawn
    }


@pytest.mark.parametrize("kind", [None, AutoStructuredFlow])
@every_example
def test_fit(name, kind):
    """Without a warning, and many draws at once; the guide that a fit chooses is `AutoIAF`."""
    example = EXAMPLES[name]()
    guides = [] if kind is None else [kind(example.model, hidden_dim=4)]
    options = {"config": LEAN, "num_steps": 20, "progress": False}
    result = fit(example.model, *guides, *example.with_data(), **options)
    assert type(result.guide) is (kind or AutoIAF)
    assert not result.one_at_a_time
    assert result.num_skipped == 0
    # the evidence bounds the ELBO; three standard errors
    assert result.elbo < result.log_evidence + 3 * result.elbo_se
    draws = result.guide.sample_posterior(5)
    log_joint = LogJoint(example.model, example.with_data())
    assert {k: v.shape[1:] for k, v in draws.items()} == {
        k: site.shape for k, site in log_joint.latents.sites.items()
    }


def test_rendering():
    """The picture of a model and of a guide, where the package for it is installed."""
    pytest.importorskip("graphviz")
    example = example_of_radon()
    guide = AutoIAF(example.model)
    for drawn in (example.model, guide):
        graph = render_model(drawn, example.with_data())
        assert all(f"\t{name} [" in graph.source for name in ("mu_a", "sigma_a", "a", "b", "sigma"))
