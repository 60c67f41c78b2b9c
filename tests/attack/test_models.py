# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The log joint density of random models, many draws at once, against Pyro's traces one by one."""

import warnings

import torch
from hypothesis import assume
from hypothesis import strategies as st

from pyro_artransform.model import LogJoint
from tests.attack.effort import attack, note
from tests.attack.models import densities_by_pyro, random_models, runs_in_pyro


@attack(
    few=10,
    random=random_models(),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    number=st.integers(0, 99),
)
def test_density_of_many_draws(random, spread, number):
    model = random.wrapped()
    assume(runs_in_pyro(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            log_joint = LogJoint(model)
        except ValueError as error:
            assume("no continuous latent" not in str(error))
            raise
    torch.manual_seed(number)
    z = log_joint.start + spread * torch.randn(7, log_joint.latents.latent_dim)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = log_joint.checked(z, torch.zeros(len(z)))[0]
    torch.set_rng_state(state)
    expected = densities_by_pyro(model, z)
    sure = expected.isfinite()
    note(f"models by {log_joint.strategy}")
    assert torch.allclose(found[sure], expected[sure], rtol=1e-6, atol=1e-6), (
        log_joint.strategy,
        found - expected,
    )
    assert not found[expected.isinf()].isfinite().any(), (found, expected)
