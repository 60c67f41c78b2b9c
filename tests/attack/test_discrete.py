# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Discrete latents that are summed out."""

import warnings
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyro_artransform.model import LogJoint
from tests.attack.effort import attack, note


@dataclass
class Discrete:
    """A mixture, a chain or both levels of a hierarchy, in plates, under scales and masks."""

    kind: str
    states: int
    size: int  # of all data, where those present are three
    scale: float
    masked: bool
    with_probs: bool
    more: bool  # data that depend on no discrete latent

    def __call__(self):
        count = self.states
        distribution = dist.Normal(torch.linspace(-1.0, 2.0, count), 1.0).to_event(1)
        locs = pyro.sample("locs", distribution)
        probs = torch.arange(1.0, count + 1) / sum(range(1, count + 1))
        if self.with_probs:
            probs = pyro.sample("probs", dist.Dirichlet(torch.ones(count)))
        if self.more:
            pyro.sample("x", dist.Normal(locs[..., 0], 1.0), obs=torch.tensor(0.7))
        with poutine.scale(scale=self.scale):
            getattr(self, self.kind)(locs, probs)

    def mixture(self, locs, probs):
        with pyro.plate("data", self.size, subsample_size=3), self.mask():
            kind = pyro.sample("kind", dist.Categorical(probs))
            self.emit("y", locs, kind, torch.tensor([0.3, -1.0, 2.0]))

    def chain(self, locs, probs):
        state = pyro.sample("state_0", dist.Categorical(probs))
        rows = torch.eye(self.states) * 0.5 + 0.5 / self.states
        for t in range(3):
            if t:
                state = pyro.sample(f"state_{t}", dist.Categorical(Vindex(rows)[state]))
            self.emit(f"y_{t}", locs, state, torch.tensor(0.4 * t))

    def levels(self, locs, probs):
        with pyro.plate("outer", 2, dim=-2):
            group = pyro.sample("group", dist.Categorical(probs))
            with pyro.plate("inner", self.size, subsample_size=3, dim=-1), self.mask():
                self.emit("y", locs, group, torch.linspace(-1.0, 2.0, 6).reshape(2, 3))

    def mask(self):
        return poutine.mask(mask=torch.tensor([True, False, True]) if self.masked else True)

    def emit(self, name, locs, kind, value):
        pyro.sample(name, dist.Normal(Vindex(locs)[..., kind], 0.8), obs=value)


@st.composite
def discrete_models(draw):
    return Discrete(
        draw(st.sampled_from(["mixture", "chain", "levels"])),
        draw(st.sampled_from([2, 3])),
        draw(st.sampled_from([3, 3, 30])),
        draw(st.sampled_from([1.0, 0.1, 2.5])),
        *(draw(st.booleans()) for _ in range(3)),
    )


@attack(few=8, model=discrete_models(), number=st.integers(0, 99))
def test_summed_out(model, number):
    """Against Pyro's own sum, a draw at a time; what Pyro refuses is refused."""
    marked = config_enumerate(model)
    names = ["locs", *(["probs"] if model.with_probs else [])]

    def by_pyro(values):
        def guide():
            for name in names:
                pyro.sample(name, dist.Delta(values[name], event_dim=1))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return -TraceEnum_ELBO(max_plate_nesting=2).loss(marked, guide)

    try:
        log_joint = LogJoint(marked)
    except ValueError as error:
        assert "the same scale" in str(error)  # noqa: PT017
        note("models with two scales of a sum refused")
        return
    torch.manual_seed(number)
    z = torch.randn(5, log_joint.latents.latent_dim)
    values, ladj = log_joint.latents.constrain_with_ladj(z)
    found = log_joint.checked(z).values - ladj
    for i in range(5):
        expected = by_pyro({name: value[i] for name, value in values.items()})
        assert abs(found[i] - expected) <= 1e-8 * (1 + abs(expected)), (
            log_joint.strategy,
            found[i],
            expected,
        )
