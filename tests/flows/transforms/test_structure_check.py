# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Networks and nonlinearities that the check at the first call finds, and those that it lets pass."""

import warnings

import pyro
import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform

from pyro_artransform import AutoIAF, affine_autoregressive
from pyro_artransform.flows.conditioners import MaskedInput, MaskedMLP
from pyro_artransform.flows.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    ConditionedUnivariate,
)
from pyro_artransform.flows.univariate import Affine, MonotonicAffineTransform
from pyro_artransform.testing import redraw
from tests.flows.transforms.metas import CumulativeConditioner, DenseTransform
from tests.guides.models import gaussian


def found_at_a_call(t, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t(x)
    return [str(w.message) for w in caught]


def with_affine(conditioner):
    return ConditionedUnivariate(conditioner, Affine())


class Partly(nn.Module):
    """Coordinates 1 and 2 depend on each other; 3 comes after them and is not at fault."""

    def __init__(self):
        super().__init__()
        mask = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.register_buffer("mask", mask.double())

    def forward(self, x):
        shift = x @ (self.weight * self.mask).T
        return MonotonicAffineTransform(shift, torch.zeros_like(shift))


class Leaks(MaskedMLP):
    """A subclass that breaks what its base class promises."""

    def forward(self, x, context=None):
        return super().forward(x, context) + x.sum(-1)[..., None, None]


class Doubles(MaskedMLP):
    def forward(self, x, context=None):
        return 2 * super().forward(x, context)


class Normalizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return MonotonicAffineTransform(self.norm(x), torch.zeros_like(x))


def activated(nonlinearity):
    return affine_autoregressive(3, 8, nonlinearity=nonlinearity).meta


METAS = {
    "partly": (Partly, 4, "[1, 2]"),
    "its own value": (lambda: lambda x: AffineTransform(0.5 * x, 1.0), 2, "[0, 1]"),
    "of vectors": (
        lambda: lambda x: AffineTransform(0.1 * x.flip(-1), 1.0, event_dim=1),
        2,
        "[0, 1]",
    ),
    # an order from the last coordinate to the first is as good as any
    "backwards": (
        lambda: lambda x: AffineTransform(x.flip(-1).cumsum(-1).flip(-1) - x, 1.0),
        4,
        None,
    ),
    "a subclass that leaks": (lambda: with_affine(Leaks(3, 2)), 3, "[0, 1, 2]"),
    "a subclass that does not": (lambda: with_affine(Doubles(3, 2)), 3, None),
    "batch normalization": (Normalizes, 3, "[0, 1, 2]"),
    "an activation that mixes units": (lambda: activated(nn.Softmax(-1)), 3, "not autoregressive"),
    "an activation of one's own": (lambda: activated(torch.sin), 3, None),
}


@pytest.mark.parametrize(("make", "dim", "at_fault"), METAS.values(), ids=METAS)
def test_the_coordinates_at_fault_are_named(make, dim, at_fault):
    found = found_at_a_call(AutoregressiveTransform(make()), torch.randn(5, dim))
    assert len(found) == (0 if at_fault is None else 1)
    assert at_fault is None or at_fault in found[0]


def test_unmasked_network_is_reported_once_at_the_users_line():
    t = AutoregressiveTransform(DenseTransform(3, 2))
    with pyro.validation_enabled(False):
        assert found_at_a_call(t, torch.randn(3)) == []
    with pytest.warns(UserWarning, match=r"not autoregressive.*\[0, 1, 2\]") as caught:
        t(torch.randn(4, 3))
    assert caught[0].filename == __file__
    assert found_at_a_call(t, torch.randn(4, 3)) == []
    with pytest.raises(ValueError, match="not autoregressive"):  # of a guide it is an error
        AutoIAF(gaussian, hidden_dims=8, nonlinearity=nn.Softmax(-1))(torch.zeros(1))


def test_conditional_network_is_checked_once_for_all_contexts():
    t = ConditionalAutoregressiveTransform(DenseTransform(3, 2, context_dim=1))
    with pytest.warns(UserWarning, match="not autoregressive"):
        t.condition(torch.zeros(4, 1))(torch.randn(4, 3))
    assert found_at_a_call(t.condition(torch.ones(4, 1)), torch.randn(4, 3)) == []


def test_check_leaves_parameters_buffers_and_random_numbers_alone():
    foreign = AutoregressiveTransform(redraw(with_affine(CumulativeConditioner(3, 2))))
    before = {name: p.detach().clone() for name, p in foreign.named_parameters()}
    x, state = torch.randn(4, 3), torch.get_rng_state()
    foreign(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in foreign.named_parameters())
    found_at_a_call(AutoregressiveTransform(meta := Normalizes()), x)
    assert meta.norm.num_batches_tracked == 1


def masked_layers(*others):
    return MaskedInput(nn.Sequential(nn.Linear(3, 6), *others, nn.Unflatten(-1, (3, 2))))


@pytest.mark.parametrize("make", [MaskedMLP, lambda d, p: masked_layers(nn.Tanh())])
def test_own_conditioners_skip_the_check(make, monkeypatch):
    def fail(*_):
        raise RuntimeError("checked")

    monkeypatch.setattr("torch.autograd.functional.jacobian", fail)
    AutoregressiveTransform(with_affine(make(3, 2)))(torch.zeros(3))
    with pytest.raises(RuntimeError, match="checked"):
        AutoregressiveTransform(DenseTransform(3, 2))(torch.zeros(3))


def test_a_subclass_is_inverted_by_its_own_forward():
    t, x = redraw(AutoregressiveTransform(with_affine(Doubles(3, 2)))), torch.randn(5, 3)
    assert torch.allclose(t.inv(t(x).detach()), x)
