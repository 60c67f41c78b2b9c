# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import warnings

import pyro
import pytest
import torch
from pyro.distributions import TransformModule, constraints
from torch import nn
from torch.distributions import AffineTransform

from pyro_artransform.conditioners import MaskedInput, MaskedMLP
from pyro_artransform.testing import redraw
from pyro_artransform.transforms import (
    AutoregressiveTransform,
    ConditionalAutoregressiveTransform,
    ConditionedUnivariate,
    check_structure,
)
from pyro_artransform.univariate import Affine, MonotonicAffineTransform
from tests.transforms.metas import CumulativeConditioner, Dense, DenseTransform


def test_is_a_pyro_transform_module():
    meta = ConditionedUnivariate(MaskedMLP(3, 2), Affine())
    t = AutoregressiveTransform(meta, passes=2)
    assert isinstance(t, TransformModule)
    assert t.domain is t.codomain is constraints.real_vector
    assert t.bijective
    assert t.sign == 1
    assert t.event_dim == 1
    assert t.meta is meta
    assert t.passes == 2
    assert set(meta.parameters()) == set(t.parameters())
    assert "passes=2" in repr(t)


def test_vector_and_elementwise_metas_give_the_same_shape():
    elementwise = AutoregressiveTransform(lambda x: AffineTransform(1.0, 2.0))
    vector = AutoregressiveTransform(lambda x: AffineTransform(1.0, 2.0, event_dim=1))
    for shape in ((3,), (4, 3), (2, 4, 3)):
        x = torch.randn(shape)
        for t in (elementwise, vector):
            y, ladj = t.call_and_ladj(x)
            assert torch.allclose(y, 1 + 2 * x)
            assert torch.allclose(ladj, 3 * torch.log(torch.tensor(2.0)).expand(shape[:-1]))
            assert torch.allclose(t.inv(y.clone()), x)


@pytest.mark.parametrize("meta", [None, 3, "mlp"])
@pytest.mark.parametrize("cls", [AutoregressiveTransform, ConditionalAutoregressiveTransform])
def test_meta_must_be_callable(cls, meta):
    with pytest.raises(TypeError, match="meta: expected a callable"):
        cls(meta)


@pytest.mark.parametrize("passes", [0, -1, 1.5, True, "3"])
@pytest.mark.parametrize("cls", [AutoregressiveTransform, ConditionalAutoregressiveTransform])
def test_passes_must_be_a_positive_integer(cls, passes):
    with pytest.raises(ValueError, match="passes: expected a positive integer, got"):
        cls(lambda x: x, passes=passes)


def test_bad_input():
    t = AutoregressiveTransform(ConditionedUnivariate(MaskedMLP(3, 2), Affine()))
    for shape in ((), (4,), (3, 2)):
        with pytest.raises(ValueError, match="expected"):
            t(torch.zeros(shape))
        with pytest.raises(ValueError, match="expected"):
            t.inv(torch.zeros(shape))


def structure_warnings(t, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t(x)
    return [str(w.message) for w in caught]


def test_unmasked_network_is_reported_once_at_the_users_line():
    t = AutoregressiveTransform(DenseTransform(3, 2))
    with pytest.warns(UserWarning, match=r"not autoregressive.*\[0, 1, 2\]") as caught:
        t(torch.randn(4, 3))
    assert caught[0].filename == __file__
    assert structure_warnings(t, torch.randn(4, 3)) == []


def test_only_the_coordinates_at_fault_are_named():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            mask = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
            self.weight = nn.Parameter(torch.zeros(4, 4))
            self.register_buffer("mask", mask.double())

        def forward(self, x):
            shift = x @ (self.weight * self.mask).T
            return MonotonicAffineTransform(shift, torch.zeros_like(shift))

    # 1 and 2 depend on each other; 3 comes after them and is not at fault
    (message,) = structure_warnings(AutoregressiveTransform(Partly()), torch.randn(5, 4))
    assert "[1, 2]" in message


def test_any_order_is_autoregressive():
    def backwards(x):
        return AffineTransform(x.flip(-1).cumsum(-1).flip(-1) - x, 1.0)

    assert structure_warnings(AutoregressiveTransform(backwards), torch.randn(5, 4)) == []


def test_dependence_on_its_own_value_is_a_fault():
    t = AutoregressiveTransform(lambda x: AffineTransform(0.5 * x, 1.0))
    (message,) = structure_warnings(t, torch.randn(5, 2))
    assert "[0, 1]" in message


def test_vector_meta_is_checked_too():
    def couples(x):
        return AffineTransform(0.1 * x.flip(-1), 1.0, event_dim=1)

    (message,) = structure_warnings(AutoregressiveTransform(couples), torch.randn(5, 2))
    assert "[0, 1]" in message


def test_check_leaves_parameters_and_random_numbers_alone():
    foreign = AutoregressiveTransform(
        ConditionedUnivariate(redraw(CumulativeConditioner(3, 2)), Affine())
    )
    before = {name: p.detach().clone() for name, p in foreign.named_parameters()}
    x = torch.randn(4, 3)
    state = torch.get_rng_state()
    foreign(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in foreign.named_parameters())


@pytest.mark.parametrize("make", [MaskedMLP, lambda d, p: MaskedInput(Dense(d, p))])
def test_own_conditioners_skip_the_check(make, monkeypatch):
    def fail(*_):
        raise RuntimeError("checked")

    monkeypatch.setattr("pyro_artransform.transforms.structure_check.dependencies", fail)
    AutoregressiveTransform(ConditionedUnivariate(make(3, 2), Affine()))(torch.zeros(3))
    with pytest.raises(RuntimeError, match="checked"):
        AutoregressiveTransform(DenseTransform(3, 2))(torch.zeros(3))


def test_no_check_without_validation():
    with pyro.validation_enabled(False):
        assert (
            structure_warnings(AutoregressiveTransform(DenseTransform(3, 2)), torch.randn(3)) == []
        )


def test_check_structure_raises():
    good = AutoregressiveTransform(ConditionedUnivariate(CumulativeConditioner(3, 2), Affine()))
    check_structure(nn.Sequential(good), torch.zeros(3))
    bad = AutoregressiveTransform(DenseTransform(3, 2))
    with pytest.raises(ValueError, match=r"not autoregressive.*\[0, 1, 2\]"):
        check_structure(nn.ModuleList([good, bad]), torch.zeros(3))


def test_condition():
    t = ConditionalAutoregressiveTransform(
        ConditionedUnivariate(MaskedMLP(3, 2, context_dim=2), Affine()), passes=3
    )
    conditioned = t.condition(torch.zeros(5, 2))
    assert isinstance(conditioned, AutoregressiveTransform)
    assert conditioned.passes == 3
    assert set(conditioned.parameters()) == set(t.parameters())
    assert conditioned.forward_shape(torch.Size([3])) == (5, 3)
    assert conditioned.inverse_shape(torch.Size([7, 1, 3])) == (7, 5, 3)
    assert set(t.inv.condition(torch.zeros(5, 2)).parameters()) == set(t.parameters())
    with pytest.raises(ValueError, match=r"context: expected shape \(\*, 2\), got \(5, 1\)"):
        t.condition(torch.zeros(5, 1))(torch.zeros(5, 3))
    with pytest.raises(
        ValueError, match=r"context: expected a tensor of shape \(\*, C\), got None"
    ):
        t.condition(None)


def test_conditioned_distribution_has_the_batch_shape_of_the_context():
    import pyro.distributions as dist

    t = redraw(
        ConditionalAutoregressiveTransform(
            ConditionedUnivariate(MaskedMLP(3, 2, context_dim=2), Affine())
        )
    )
    base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    q = dist.TransformedDistribution(base, [t.condition(torch.randn(5, 2))])
    assert q.batch_shape == (5,)
    assert q.rsample((7,)).shape == (7, 5, 3)
    assert q.log_prob(q.rsample((7,))).shape == (7, 5)


def test_conditional_network_is_checked_once_for_all_contexts():
    t = ConditionalAutoregressiveTransform(DenseTransform(3, 2, context_dim=1))
    with pytest.warns(UserWarning, match="not autoregressive"):
        t.condition(torch.zeros(4, 1))(torch.randn(4, 3))
    assert structure_warnings(t.condition(torch.ones(4, 1)), torch.randn(4, 3)) == []


class Leaks(MaskedMLP):
    """A subclass that breaks what its base class promises."""

    def forward(self, x, context=None):
        return super().forward(x, context) + x.sum(-1)[..., None, None]


class Doubles(MaskedMLP):
    def forward(self, x, context=None):
        return 2 * super().forward(x, context)


def test_a_subclass_answers_for_itself():
    t = AutoregressiveTransform(ConditionedUnivariate(Leaks(3, 2), Affine()))
    (message,) = structure_warnings(t, torch.randn(5, 3))
    assert "[0, 1, 2]" in message
    t = AutoregressiveTransform(redraw(ConditionedUnivariate(Doubles(3, 2), Affine())))
    x = torch.randn(5, 3)
    assert structure_warnings(t, x) == []
    assert torch.allclose(t.inv(t(x).detach()), x)


@pytest.mark.parametrize("part", ["conditioner", "conditioner.layers.2", "univariate"])
def test_hooks_act_in_both_directions(part):
    t = AutoregressiveTransform(redraw(ConditionedUnivariate(MaskedMLP(3, 2), Affine())))

    def changes(module, given, out):
        return (
            out + 1
            if isinstance(out, torch.Tensor)
            else MonotonicAffineTransform(out.shift + 1, out.log_scale)
        )

    t.meta.get_submodule(part).register_forward_hook(changes)
    x = torch.randn(5, 3)
    y = t(x).detach()
    assert torch.allclose(t.inv(y), x)


def test_batch_normalisation_is_probed_on_a_copy():
    class Normalises(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return MonotonicAffineTransform(self.norm(x), torch.zeros_like(x))

    meta = Normalises()
    (message,) = structure_warnings(AutoregressiveTransform(meta), torch.randn(5, 3))
    assert "[0, 1, 2]" in message
    assert meta.norm.num_batches_tracked == 1
    wrapped = MaskedInput(nn.Sequential(Dense(3, 2), nn.BatchNorm2d(3)))
    assert not wrapped.autoregressive
    assert wrapped.eval().autoregressive


def test_hidden_network_with_a_last_layer_of_zeros_is_found_later():
    net = nn.Linear(3, 3)
    nn.init.zeros_(net.weight)
    t = AutoregressiveTransform(lambda x: MonotonicAffineTransform(0 * x, net(x)))
    x = torch.randn(5, 3)
    assert structure_warnings(t, x) == []
    nn.init.normal_(net.weight)
    assert any("[0, 1, 2]" in message for _ in range(3) for message in structure_warnings(t, x))


def test_what_a_meta_must_return():
    x = torch.randn(5, 3)
    for meta in (nn.Linear(3, 3), MaskedMLP(3, 2)):
        for use in (lambda t: t(x), lambda t: t.inv(x)):
            with pytest.raises(TypeError, match=r"returns a Tensor.*ConditionedUnivariate"):
                use(AutoregressiveTransform(meta))
    for transform in (
        torch.distributions.SigmoidTransform(),
        AffineTransform(0.0, 1.0, event_dim=2),
    ):
        with pytest.raises(
            ValueError, match="expected a transform of real numbers or vectors, got"
        ):
            AutoregressiveTransform(lambda x, t=transform: t)(x)


def test_numbers_of_the_wrong_kind():
    t = AutoregressiveTransform(ConditionedUnivariate(MaskedMLP(3, 2), Affine()))
    with pytest.raises(ValueError, match=r"expected floating-point numbers .*got torch\.int64"):
        t(torch.zeros(5, 3, dtype=torch.long))
    for use in (t, t.inv):
        with pytest.raises(ValueError, match=r"expected torch\.float64.*got torch\.float32"):
            use(torch.zeros(5, 3).float())


def test_context_and_x_that_do_not_broadcast():
    t = ConditionalAutoregressiveTransform(
        ConditionedUnivariate(MaskedMLP(3, 2, context_dim=2), Affine())
    )
    conditioned = t.condition(torch.zeros(4, 2))
    for use in (conditioned, conditioned.inv):
        with pytest.raises(ValueError, match=r"that broadcast .*, got \(4,\), \(5,\)"):
            use(torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"call \.condition\(context\)"):
        t(torch.zeros(5, 3))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_batch(shape):
    t = redraw(AutoregressiveTransform(ConditionedUnivariate(MaskedMLP(3, 2), Affine())))
    for use in (t, t.inv):
        y, ladj = use.call_and_ladj(torch.zeros(shape))
        assert y.shape == shape
        assert ladj.shape == shape[:-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    t = redraw(AutoregressiveTransform(ConditionedUnivariate(MaskedMLP(3, 2), Affine()))).to(dtype)
    x = torch.randn(5, 3).to(dtype)
    y, ladj = t.call_and_ladj(x)
    assert y.dtype == ladj.dtype == dtype
    assert (t.inv(y.detach()) - x).abs().max() < 0.1
