# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which calls are recorded: none in which Python may read a value that varies."""

import contextlib
import copy
import functools
import math
import pickle
import struct
import time

import numpy as np
import pytest
import torch

from pyro_artransform._base.time_limit import TimeLimit
from pyro_artransform.model.replay import recording


def through_storage(x):
    return (x * struct.unpack("d", bytes(x.untyped_storage())[:8])[0],)


def through_dlpack(x):
    return (x * torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)).clone(),)


@functools.lru_cache
def remembered(number):
    return 2.0 if number > 0 else 1.0


def in_a_backward_pass(x):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, weight):
            return weight * (1 + weight.numpy().sum())

    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad((Scaled.apply(x) * x.exp().detach()).sum(), x)


def in_spite_of_errors(x):
    with contextlib.suppress(Exception):
        return (x * (2.0 if x.sum() > 0 else 1.0),)
    return (x,)


def through_a_view(x):
    b = torch.zeros(len(x), 3)
    b[..., 0] = x[:, 0].detach()
    return (b * (2.0 if (b > 0.5).any() else 1.0),)


def through_out(x):
    b = torch.zeros_like(x)
    torch.mul(x, 2.0, out=b)
    return (x * float(b.sum()),)


def element_by_element(x):
    return (x.clone().apply_(lambda value: value if value > 0 else 0.0),)


def by_a_copy(x):
    return (x * float(copy.deepcopy(x).sum()),)


TOTAL = torch.zeros(3)


def into_what_was_there(x):
    return (x + TOTAL.add_(x.sum(0)),)


#: by name, functions in which Python reads a value that varies, or may do so
READS = {
    "a branch": lambda x: (x * 2 if x.sum() > 0 else x,),
    "a mask as an index": lambda x: (x[x > 0].sum(),),
    "nonzero": lambda x: (x * x.nonzero().shape[0],),
    "unique": lambda x: (x * x.round().unique().shape[0],),
    "item": lambda x: (x * x.sum().item(),),
    "float": lambda x: (x * round(float(x.sum()), 3),),
    "math": lambda x: (x * math.exp(x[0, 0]),),
    "max": lambda x: (x * max(x[0]),),
    "sorted": lambda x: (torch.stack(sorted(x[0])),),
    "range": lambda x: (x * len(range(x[0, 0].abs().long())),),
    "a slice": lambda x: (x[: 1 + x[0, 0].abs().long().clamp(max=3)].sum(0),),
    "equal": lambda x: (x * (2.0 if torch.equal(x, x.abs()) else 1.0),),
    "in": lambda x: (x * (2.0 if 1.0 in x.round() else 1.0),),
    "tolist": lambda x: (x * sum(x.flatten().tolist()),),
    "numpy": lambda x: (x * float(x.detach().numpy().sum()),),
    "asarray": lambda x: (x * float(np.asarray(x.detach()).sum()),),
    "a function of numpy": lambda x: (torch.as_tensor(np.exp(x)),),
    "data": lambda x: (x * (2.0 if x.data.numpy().sum() > 0 else 1.0),),
    "text": lambda x: (x * float(f"{x[0, 0]:.3f}"),),
    "pickle": lambda x: (x * pickle.loads(pickle.dumps(x)),),
    "a list of tensors": lambda x: (x * torch.tensor([x[0, 0], x[0, 1], 1.0]),),
    "a constructor": lambda x: (x * torch.Tensor([x[0, 0], x[0, 1], 1.0]),),
    "new_tensor": lambda x: (x * x.new_tensor([x[0, 0], x[0, 1], 1.0]),),
    "an index of tensors": lambda x: (x[[x[0, 0].long().clamp(0, 1), 1]],),
    "a cache": lambda x: (x * remembered(float(x.sum())),),
    "repeat_interleave": lambda x: (x[0].repeat_interleave(x[0].abs().long()).sum(),),
    "normal numbers": lambda x: (x * (2.0 if torch.randn(()) > 0 else 1.0),),
    **{
        function.__name__: function
        for function in (
            *(through_storage, through_dlpack, through_a_view, through_out, by_a_copy),
            *(in_a_backward_pass, in_spite_of_errors, element_by_element, into_what_was_there),
        )
    },
}


@pytest.mark.parametrize("name", READS)
def test_what_gives_python_a_value_is_refused(name):
    inputs = torch.randn(5, 3, dtype=torch.float64)
    assert recording.record(READS[name], (inputs,), 100.0) is None


def test_a_capture_ends_in_time():
    """At the end of a phase, and after as many calls as the pages say."""

    def evaluate(x):
        for _ in range(4000):
            x = x.tanh()
        return (x,)

    x = torch.randn(3)
    began = time.process_time()
    evaluate(x)
    call = time.process_time() - began
    with TimeLimit(1e-6) as limit:
        limit.enter_phase(1.0)
        assert recording.record(evaluate, (x,), 100.0) is None
    assert recording.record(evaluate, (x,), call / 2) is None
    assert recording.record(evaluate, (x,), 100.0) is not None


@pytest.mark.parametrize("count", [10**3, 10**4])
def test_large_tensors_are_not_held(count, monkeypatch):
    """What shares memory counts once."""
    monkeypatch.setattr(recording, "_MOST_BYTES", 10**5)
    replay = recording.record(
        lambda x: (x.double().expand(count, 3).exp().view(3, count).sum(1),),
        (torch.ones(3),),
        100.0,
    )
    assert (replay is None) == (8 * 3 * count > 10**5)


def test_what_data_alone_decide_is_recorded_and_compared():
    data = torch.tensor([1.0, -1.0, 2.0])

    def evaluate(x):
        return ((2.0 if data.sum() > 0 else 1.0) * x[:, data > 0] + sum(data.tolist()),)

    replay, x = recording.record(evaluate, (torch.randn(5, 3),), 100.0), torch.randn(5, 3)
    assert torch.equal(replay(x)[0], evaluate(x)[0])
    data[0] = 1.5
    assert replay(x) is None


X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float32).reshape(4, 3)


@pytest.mark.parametrize(
    "evaluate",
    [
        # numbers with which vmap calls operations of tensors
        torch.vmap(lambda beta: (X * beta).sum(-1).sum() * 2 - 0.9189385332046727),
        torch.vmap(lambda beta: beta[0] / 3 + True),
        # as without it numbers have the precision of the tensors beside them
        lambda x: (x > 0) * 2.5 * x,
        lambda x: (x > 0) * 2.5,
    ],
)
def test_numbers_of_python_are_recorded(evaluate):
    torch.set_default_dtype(torch.float32)
    replay = recording.record(lambda x: (evaluate(x),), (torch.randn(5, 3),), 100.0)
    assert replay is not None
    x = torch.randn(5, 3)
    (found,) = replay(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, evaluate(x))
