# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_artransform.conditioners import MaskedMLP
from pyro_artransform.testing import check_conditioner, redraw
from tests.conditioners.test_masks import random_dag

CHAIN = torch.diag(torch.ones(4), -1).bool()
COUPLING = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]).bool()
OPTIONS = {
    "default": {},
    "one narrow layer": {"hidden_dims": 3},
    "three layers": {"hidden_dims": [8, 16, 8]},
    "context": {"context_dim": 2},
    "context and a narrow layer": {"context_dim": 1, "hidden_dims": (2, 2)},
    "tanh": {"nonlinearity": torch.tanh},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("input_dim", [1, 2, 5, 64])
def test_contract(input_dim, options):
    check_conditioner(
        lambda: MaskedMLP(input_dim, 3, **options),
        input_dim,
        context_dim=options.get("context_dim", 0),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    "adjacency",
    [CHAIN, COUPLING, random_dag(9, 0.3), random_dag(9, 0.8, 1), torch.zeros(3, 3).bool()],
    ids=["chain", "coupling", "sparse", "dense", "elementwise"],
)
def test_contract_with_a_graph(adjacency, options):
    dim = len(adjacency)
    check_conditioner(
        lambda: MaskedMLP(dim, 2, adjacency=adjacency, **options),
        dim,
        context_dim=options.get("context_dim", 0),
        adjacency=adjacency,
    )


def test_contract_with_an_order():
    order = [2, 0, 3, 1]
    conditioner = MaskedMLP(4, 2, order=order)
    check_conditioner(lambda: MaskedMLP(4, 2, order=order), 4, adjacency=conditioner.adjacency)
    jacobian = torch.autograd.functional.jacobian(redraw(conditioner), torch.randn(4))
    assert (jacobian != 0).any(1).sum(-1).tolist() == [1, 3, 0, 2]


def test_masks_and_order_are_in_the_state_dict_and_deterministic():
    first, second = MaskedMLP(5, 2).state_dict(), MaskedMLP(5, 2).state_dict()
    fixed = [name for name in first if "mask" in name or name in ("order", "adjacency")]
    assert len(fixed) == 5
    assert all(torch.equal(first[name], second[name]) for name in fixed)


def test_depth_follows_the_buffers():
    conditioner = MaskedMLP(5, 2)
    assert conditioner.depth == 5
    conditioner.load_state_dict(MaskedMLP(5, 2, adjacency=CHAIN[[0] * 5]).state_dict())
    assert conditioner.depth == 1


def test_all_parameters_move_within_two_steps():
    conditioner = MaskedMLP(4, 2, hidden_dims=[16, 16], context_dim=3)
    before = {name: p.detach().clone() for name, p in conditioner.named_parameters()}
    optim = torch.optim.Adam(conditioner.parameters(), lr=1e-2)
    for _ in range(2):
        optim.zero_grad()
        (conditioner(torch.randn(8, 4), torch.randn(8, 3)) - 1).square().sum().backward()
        optim.step()
    for name, p in conditioner.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 0}, "input_dim: expected an integer of at least 1, got 0"),
        ({"input_dim": 2.0}, "input_dim"),
        ({"num_params": True}, "num_params"),
        ({"num_params": torch.tensor(True)}, "num_params: expected an integer of at least 1"),
        ({"context_dim": -1}, "context_dim"),
        ({"context_dim": "2"}, "context_dim: expected an integer of at least 0, got '2'"),
        ({"hidden_dims": ()}, "hidden_dims: expected at least one width, got an empty sequence"),
        ({"hidden_dims": [8, 0]}, "hidden_dims: expected an integer of at least 1, got 0"),
        ({"hidden_dims": [8, 2.0]}, r"hidden_dims: expected an integer of at least 1, got 2\.0"),
        ({"hidden_dims": 0}, "hidden_dims: expected an integer of at least 1, got 0"),
        ({"hidden_dims": 64.0}, r"an integer of at least 1, or a sequence of them, got 64\.0"),
        ({"hidden_dims": "64"}, "an integer of at least 1, or a sequence of them, got '64'"),
        ({"hidden_dims": True}, "or a sequence of them, got True"),
        ({"order": [0, 1, 1]}, "permutation"),
        (
            {"order": [0, 1, 2], "adjacency": torch.zeros(3, 3)},
            "an order or an adjacency, got both",
        ),
        ({"adjacency": torch.eye(3)}, "cycle 0 -> 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedMLP(**{"input_dim": 3, "num_params": 2, **options})


def test_integers_of_other_libraries():
    conditioner = MaskedMLP(np.int64(3), np.int32(2), np.int64(8), context_dim=torch.tensor(2))
    sizes = (conditioner.input_dim, conditioner.num_params, conditioner.context_dim)
    assert [type(size) for size in (*sizes, *conditioner.hidden_dims)] == [int] * 4
    assert MaskedMLP(3, 2, np.array([8, 4])).hidden_dims == (8, 4)
    assert MaskedMLP(3, 2, torch.tensor([8, 4])).hidden_dims == (8, 4)


@pytest.mark.parametrize("nonlinearity", [nn.ELU, "tanh", 3, torch.zeros(8)])
def test_what_is_no_function(nonlinearity):
    with pytest.raises(TypeError, match=r"a function or a module such as torch\.nn\.ELU\(\), got"):
        MaskedMLP(3, 2, 8, nonlinearity=nonlinearity)


NOT_ELEMENTWISE = {
    "mean of a row": (nn.LayerNorm(8), "another's input"),
    "groups of units": (lambda h: h.view(-1, 2, 4).sort(1).values.reshape(h.shape), "some shape"),
    "mean of a column": (lambda h: h - h.mean(0), "another's input"),
    "mean of all": (lambda h: h - h.mean(), "another's input"),
    "softmax": (nn.Softmax(-1), "another's input"),
    "later units": (lambda h: h.cumsum(-1), "another's input"),
    "earlier units": (lambda h: h.flip(-1).cumsum(-1).flip(-1), "another's input"),
    "one weight a unit": (nn.PReLU(8), "some shape"),
    "a slope for each unit": (lambda h: h * torch.linspace(1, 2, h.shape[-1]), "where an element"),
    "another shape": (nn.GLU(), r"turns shape \(3, 8\) into shape \(3, 4\)"),
    "no tensor": (lambda h: (h, h), r"turns shape \(3, 8\) into tuple"),
    "two arguments": (lambda h, scale: h * scale, "some shape"),
    "batch normalisation": (nn.BatchNorm1d(8), "mixes rows or is random"),
    "the same for evaluation": (nn.BatchNorm1d(8).eval(), "mixes rows or is random"),
    "dropout": (nn.Dropout(0.5), "mixes rows or is random"),
    "dropout inside": (nn.Sequential(nn.Tanh(), nn.Dropout(0.0)), "mixes rows or is random"),
    "random slope": (nn.RReLU().eval(), "mixes rows or is random"),
    "dropout as a function": (lambda h: F.dropout(h, 0.5), "by chance"),
    "in place": (nn.ReLU(inplace=True), "changes its argument in place"),
}


@pytest.mark.parametrize(
    ("nonlinearity", "fault"), NOT_ELEMENTWISE.values(), ids=NOT_ELEMENTWISE.keys()
)
@pytest.mark.parametrize("hidden_dims", [8, [1, 8]])
def test_nonlinearity_that_is_not_elementwise(nonlinearity, fault, hidden_dims):
    message = rf"(?s)nonlinearity: expected a deterministic elementwise function, .*{fault}"
    with pytest.raises(ValueError, match=message) as caught:
        MaskedMLP(3, 2, hidden_dims, nonlinearity=nonlinearity)
    assert repr(nonlinearity) in str(caught.value)


ELEMENTWISE = {
    "one weight": nn.PReLU(),
    "identity": lambda h: h,
    "constant": lambda h: h.new_zeros(1).expand_as(h),
    "not a number": torch.log,
    "integers, then floats": torch.sign,
    **{name: getattr(nn, name)() for name in ("SiLU", "Softplus", "GELU", "Mish", "Hardswish")},
}


@pytest.mark.parametrize("nonlinearity", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_elementwise_nonlinearity(nonlinearity, dtype, width):
    """Its own dtype, where it has one, is the one that it is checked in."""
    torch.set_default_dtype(dtype)
    state = torch.get_rng_state()
    for given in (nonlinearity, nn.Sequential(nn.PReLU(dtype=torch.float64), nn.PReLU().double())):
        torch.set_rng_state(state)
        default = MaskedMLP(3, 2, width)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert MaskedMLP(3, 2, width, nonlinearity=given).nonlinearity is given
        assert torch.equal(torch.get_rng_state(), after)
        assert default.hidden_dims == (width,)


def test_a_refused_nonlinearity_leaves_the_random_state():
    torch.manual_seed(1)
    MaskedMLP(3, 2, 8)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="by chance"):
        MaskedMLP(3, 2, 8, nonlinearity=lambda h: F.dropout(h, 0.5))
    assert torch.equal(torch.get_rng_state(), after)


def test_nothing_is_evaluated_on_the_meta_device():
    def refuse(h):
        raise AssertionError("evaluated")

    with torch.device("meta"):
        MaskedMLP(3, 2, 8, nonlinearity=refuse)


def test_bad_input():
    plain, conditional = MaskedMLP(3, 2), MaskedMLP(3, 2, context_dim=2)
    x = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 3\), got \(5, 4\)"):
        plain(torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 3\), got \(\)"):
        plain(torch.zeros(()))
    with pytest.raises(ValueError, match=r"context: expected none, got one of shape \(5, 2\)"):
        plain(x, torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"expected a context of shape \(\*, 2\), got none"):
        conditional(x)
    with pytest.raises(ValueError, match=r"context: expected shape \(\*, 2\), got \(5, 3\)"):
        conditional(x, torch.zeros(5, 3))


def test_representation_gives_the_sizes():
    assert "input_dim=3, num_params=2, hidden_dims=(8,)" in repr(MaskedMLP(3, 2, 8))
    assert isinstance(MaskedMLP(3, 2).nonlinearity, nn.ELU)
