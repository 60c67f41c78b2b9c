# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Random flows (families, conditioners, orders, graphs, contexts, chains and inverses), and how many."""

import functools
import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import AffineTransform

from pyro_artransform import hinged_marginals, iaf, maf
from pyro_artransform.flows.conditioners import MaskedInput, MaskedMLP, TiltedSiLU
from pyro_artransform.flows.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    ConditionedUnivariate,
    LocationScale,
    PermutationTransform,
    chain,
)
from pyro_artransform.testing import redraw
from tests.flows.conditioners.test_masks import random_dag
from tests.flows.transforms.metas import CONDITIONERS, FAMILIES, DenseTransform, make_meta

TIMES = int(os.environ.get("ATTACK_TIMES", "1"))
SEED = int(os.environ.get("ATTACK_SEED", "0"))
COMMON = {
    "database": None,
    "deadline": None,
    "print_blob": False,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}


def attack(few=5, **strategies):
    """Makes a property of given strategies a test, marked slow.

    :param few: examples, of which ``ATTACK_TIMES`` makes a multiple.
    """

    def decorate(prop):
        @functools.wraps(prop)
        def afresh(**values):
            """Each example starts alike, whatever the one before it left."""
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float64)
            prop(**values)

        options = {"max_examples": few * TIMES, "derandomize": SEED == 0, **COMMON}
        run = settings(**options)(given(**strategies)(afresh))
        return pytest.mark.slow(seed(SEED)(run) if SEED else run)

    return decorate


GAINS = (0.3, 1.0, 2.0, 4.0)
BATCHES = ((), (1,), (3,), (2, 3), (2, 1, 2), (0,))
ACTIVATIONS = (nn.ELU, nn.SiLU, nn.Tanh, nn.ReLU, nn.Softplus, TiltedSiLU, lambda: torch.sin)


class Case(NamedTuple):
    """A flow without a context, at random parameters, and the dimension it acts on."""

    flow: torch.nn.Module
    dim: int
    words: str

    def __repr__(self):
        return f"{self.words} (D = {self.dim})"


@st.composite
def metas(draw, dim, context_dim=0):
    """A meta, of a named kind or of any network, and words for it."""
    family = draw(st.sampled_from([*FAMILIES]))
    kind = draw(st.sampled_from(["dense transform", *4 * ["network"], *CONDITIONERS]))
    if kind == "dense transform" and not context_dim:
        return MaskedInput(DenseTransform(dim, 2)), kind
    if kind in CONDITIONERS:
        return make_meta(family, kind, dim, context_dim), f"{kind} {family}"
    univariate, number = FAMILIES[family](), draw(st.integers(0, 99))
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(number))
    graph = {"adjacency": random_dag(dim, 0.5, seed=number)}
    options = draw(st.sampled_from([{}, {"order": order}, graph]))
    activation = draw(st.sampled_from(ACTIVATIONS))()
    net = MaskedMLP(
        dim,
        univariate.num_params,
        hidden_dims=draw(st.sampled_from([1, 3, 16, [8, 8], [2, 9, 4]])),
        context_dim=context_dim,
        nonlinearity=activation,
        skip_connections=draw(st.booleans()),
        **options,
    )
    words = f"{family} by {activation} and {' '.join(options) or 'no order'} #{number}"
    return ConditionedUnivariate(net, univariate), words


@st.composite
def layers(draw, dim):
    kind = draw(st.sampled_from(["layer"] * 6 + ["context", "inverse", "others", "iaf", "maf"]))
    if kind == "iaf":
        return iaf(dim, 2, 8), "iaf"
    if kind == "maf":
        return maf(dim, 2, 8), "maf"
    if kind == "others":
        shift, number = AffineTransform(0.3, 1.7), draw(st.integers(0, 9))
        order = torch.randperm(dim, generator=torch.Generator().manual_seed(number))
        scale = LocationScale(torch.ones(dim), 0.5, full_rank=True)
        parts = [scale, PermutationTransform(order), shift, hinged_marginals(dim)]
        return chain(parts), f"others #{number}"
    if kind == "context":
        meta, words = draw(metas(dim, context_dim=2))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        context = torch.randn(draw(st.sampled_from([(2,), (1, 2)])), generator=generator)
        return ConditionalAutoregressiveTransform(meta).condition(context), f"{words} | context"
    meta, words = draw(metas(dim))
    passes = draw(st.sampled_from([None, None, dim]))
    layer = AutoregressiveTransform(meta, passes)
    return (layer.inv, f"inverse of {words}") if kind == "inverse" else (layer, words)


@st.composite
def flows(draw, gains=GAINS, max_layers=3, large=(17, 40)):
    # inverses of larger ones go block by block
    dim = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 6, *large]))
    parts = [draw(layers(dim)) for _ in range(draw(st.integers(1, max_layers)))]
    made = [part for part, _ in parts]
    flow, words = made[0], parts[0][1]
    if len(parts) > 1 or draw(st.booleans()):
        flow, words = chain(made), " -> ".join(words for _, words in parts)
    if draw(st.sampled_from([False, False, True])):
        flow, words = flow.inv, f"inverse of ({words})"
    gain, number = draw(st.sampled_from(gains)), draw(st.integers(0, 999))
    redraw(flow.double(), gain, number)
    return Case(flow, dim, f"{words} at gain {gain} #{number}")


@st.composite
def inputs(draw, scales=(1e-3, 1.0, 5.0, 30.0)):
    """The shape of a batch, and a function of D that gives such a batch."""
    batch, number = draw(st.sampled_from(BATCHES)), draw(st.integers(0, 999))
    return batch, draw(st.sampled_from(scales)), number


def make_input(spec, dim, dtype=torch.float64):
    batch, scale, number = spec
    generator = torch.Generator().manual_seed(number)
    return (scale * torch.randn((*batch, dim), generator=generator, dtype=torch.float64)).to(dtype)
