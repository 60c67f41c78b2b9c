# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Metas of every kind: one line adds a family or a conditioner to the tests of the transforms."""

import torch
from torch import nn
from torch.distributions import AffineTransform

from pyro_artransform.flows.conditioners import Conditioner, MaskedInput, MaskedMLP, Unconditional
from pyro_artransform.flows.transforms import ConditionedUnivariate
from pyro_artransform.flows.univariate import (
    Affine,
    Hinged,
    MonotoneNeural,
    MonotonicAffineTransform,
    RationalQuadraticSpline,
    Univariate,
)
from tests.flows.conditioners.test_masks import random_dag


class Shift(Univariate):
    """A family from elsewhere that preserves volume: its log-determinant has no graph."""

    num_params = 1

    def forward(self, params):
        return AffineTransform(params[..., 0], 1.0)


FAMILIES = {
    "affine": Affine,
    "shift": Shift,
    "hinged": Hinged,
    "spline": lambda: RationalQuadraticSpline(count_bins=4, bound=3.0),
    "monotone": lambda: MonotoneNeural(count_units=3),
}


class Dense(nn.Module):
    """A network without masks, of x and maybe a context, that returns parameters."""

    def __init__(self, input_dim, num_params, context_dim=0):
        super().__init__()
        self.first = nn.Linear(input_dim + context_dim, 16)
        self.last = nn.Linear(16, input_dim * num_params)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.shape = input_dim, num_params

    def forward(self, x, context=None):
        if context is not None:
            batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
            x = torch.cat([x.expand(*batch, -1), context.expand(*batch, -1)], -1)
        return self.last(self.first(x).tanh()).unflatten(-1, self.shape)


class DenseTransform(Dense):
    """A network without masks that returns a transform, as in the original description."""

    def forward(self, x, context=None):
        params = super().forward(x, context)
        return MonotonicAffineTransform(params[..., 0], params[..., 1])


class CumulativeConditioner(Conditioner):
    """A conditioner from elsewhere, autoregressive but not known to be so."""

    def __init__(self, input_dim, num_params, context_dim=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(input_dim, num_params))
        self.context = nn.Linear(context_dim, num_params) if context_dim else None

    def forward(self, x, context=None):
        before = torch.nn.functional.pad(x.tanh().cumsum(-1)[..., :-1], (1, 0))
        params = before[..., None] * self.weight
        return params if context is None else params + self.context(context)[..., None, :]


CONDITIONERS = {
    "mlp": lambda d, p, c: MaskedMLP(d, p, hidden_dims=[16, 16], context_dim=c),
    "narrow": lambda d, p, c: MaskedMLP(d, p, hidden_dims=3, context_dim=c),
    "reverse": lambda d, p, c: MaskedMLP(d, p, context_dim=c, order=range(d - 1, -1, -1)),
    "graph": lambda d, p, c: MaskedMLP(d, p, context_dim=c, adjacency=random_dag(d, 0.4, seed=d)),
    "masked input": lambda d, p, c: MaskedInput(Dense(d, p, c)),
    "unconditional": lambda d, p, c: Unconditional(d, p),
    "foreign": CumulativeConditioner,
}


def make_meta(family, conditioner, dim, context_dim=0):
    univariate = FAMILIES[family]()
    network = CONDITIONERS[conditioner](dim, univariate.num_params, context_dim)
    return ConditionedUnivariate(network, univariate)
