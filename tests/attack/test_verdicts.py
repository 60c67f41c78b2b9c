# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Verdicts on mixtures of Gaussians whose masses and evidence are known: trust means a small gap."""

import warnings
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st

from pyro_artransform import AutoIAF, fit
from tests.attack.effort import attack, note

# of the true gap: the bound of trust, and what Monte Carlo adds
MAX_GAP = 0.1
LARGEST_SE = 0.05


@dataclass
class Mixture:
    """Of log evidence ``shift``, by a factor on an improper prior or as a correction of a wide one."""

    dim: int
    masses: list[float]
    places: list[float]  # of each mode along a random direction
    scales: list[float]
    number: int
    shift: float
    proper: bool

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.number)
        count = len(self.masses)
        directions = torch.randn(count, self.dim, generator=generator)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        locs = torch.tensor(self.places)[:, None] * directions
        scales = torch.tensor(self.scales)[:, None].expand(count, self.dim)
        self.logits = torch.tensor(self.masses).log().log_softmax(0)
        self.parts = dist.Normal(locs, scales).to_event(1)

    def log_prob(self, z):
        return self.shift + (self.logits + self.parts.log_prob(z[..., None, :])).logsumexp(-1)

    def __call__(self):
        if self.proper:
            prior = dist.Normal(torch.zeros(self.dim), 30.0).to_event(1)
        else:
            prior = dist.ImproperUniform(dist.constraints.real_vector, (), (self.dim,))
        z = pyro.sample("z", prior)
        pyro.factor("target", self.log_prob(z) - (prior.log_prob(z) if self.proper else 0.0))


@st.composite
def mixtures(draw):
    count = draw(st.integers(1, 4))

    def numbers(*values):
        return [draw(st.sampled_from(values)) for _ in range(count)]

    return Mixture(
        draw(st.sampled_from([1, 2, 3, 6])),
        numbers(0.05, 0.3, 1.0),
        numbers(0.0, 1.0, 3.0, 8.0, 20.0, 50.0),
        numbers(0.3, 1.0, 2.0),
        draw(st.integers(0, 99)),
        draw(st.sampled_from([0.0, -1e4, 50.0])),
        draw(st.booleans()),
    )


@attack(few=1, mixture=mixtures(), seed=st.integers(0, 9))
def test_trust_means_a_small_gap(mixture, seed):
    guide = AutoIAF(mixture, hidden_dims=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(mixture, guide, seed=seed, num_steps=150, num_particles=32, progress=False)
    note("trusted" if result.trusted else "not trusted")
    if result.trusted:
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            z, log_q = guide.rsample_and_log_prob(20_000)
            gaps = mixture.shift - (mixture.log_prob(z) - log_q)
        se = gaps.std() / len(gaps) ** 0.5
        assert gaps.mean() <= MAX_GAP + 4 * (se + LARGEST_SE), (gaps.mean(), se, result.verdict)
