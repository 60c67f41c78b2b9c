# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Models after Pyro's tutorials and examples, as benchmarks/vectorization.md has them, on fewer data."""

import sys
from pathlib import Path

import pytest
import torch

from pyro_artransform.joint import LogJoint

SMALL = {
    **{"SERIES": 3, "STEPS": 6, "TONES": 5, "HIDDEN": 4},
    **{"ANIMALS": 20, "YEARS": 5, "ITEMS": 8},
    **{"TOPICS": 3, "VOCABULARY": 10, "DOCUMENTS": 4, "WORDS": 6},
}
NAMES = (
    *("gmm", "hmm_0", "hmm_1", "hmm_2", "hmm_3", "hmm_4", "cjs_1", "cjs_2", "cjs_3", "cjs_4"),
    *("cjs_5", "experts", "dawid_skene", "hierarchical", "mace", "lda"),
)


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import vectorization_models

    for name, value in SMALL.items():
        monkeypatch.setattr(vectorization_models, name, value)
    yield vectorization_models
    for name in ("vectorization_models", "coordinates_models"):
        sys.modules.pop(name)


def test_names(examples):
    assert tuple(examples.EXAMPLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_many_draws_as_single_ones(name, examples):
    model, args = examples.subject(name)
    log_joint = LogJoint(model, args)
    assert log_joint.strategy == ("plate" if name.startswith("cjs") else "vmap")
    z = 0.5 * torch.randn(4, log_joint.latents.latent_dim)
    z.requires_grad_()
    found = log_joint(z)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    log_joint.strategy = "loop"
    expected = log_joint(z)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-8)
