# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Functions of tensors whose operations are captured once, and replayed without the Python around them.

The gradient of a small model is a thousand operations of a few microseconds. Pyro's handlers, ``torch.vmap``
and autograd take several times as long to find out which these are, and find the same ones each time.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .differentiation import leaves
from .recording import Replay, record

#: a function of tensors that returns tensors without a graph
Function = Callable[..., tuple[Tensor, ...]]

# calls with the same shapes after which a capture is worth while, and the seconds that it may take
_PATIENCE, _MOST_SECONDS = 12, 20.0
# every so many replays one is compared with a call of the function, the first ones more often
_CHECK_EVERY = 256
# units in the last place by which the two may differ
_SLACK = 64.0


class ReplayError(RuntimeError):
    """Replays were not what calls are: nothing that came of them since the last comparison can be kept.

    Who catches it goes on from there: the function is only called from then on.
    """


class Captured:
    """A function of tensors that replays its operations once it was called often enough.

    The function may read parameters and other tensors, which are seen as they are at each replay, and draw
    random numbers from PyTorch's own generators, of which a replay takes the same ones. It is called as it
    is, for good, where Python reads a value that varies, or anything else is not known to be replayed
    right (:mod:`~pyro_artransform.recording`), and at inputs where a replay fails.

    :param patience: after how many calls with the same shapes, 2 at least.
    :raises ReplayError: if replays turn out to differ from calls, as where other state of Python's decides.
        Now and then one is compared.
    """

    def __init__(self, function: Function | None = None, patience: int = _PATIENCE) -> None:
        self._function, self._patience = function, patience
        self._calls = Counter[Hashable]()
        self._replays: dict[Hashable, Replay] = {}
        # the last replay since a comparison
        self._last: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.can_replay = True  #: whether replays are what calls are, as far as is known
        self.num_compared = 0  #: how often they were compared, and were

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.can_replay:
            return self._evaluate(*inputs)
        key = tuple((value.shape, value.dtype, value.device) for value in inputs)
        replay = self._replays.get(key)
        if replay is not None and not replay.is_current():
            replay, self._calls[key] = self._replays.pop(key) and None, 0
        self._calls[key] += 1
        if replay is None:
            return self._called(key, inputs)
        count = self._calls[key] - self._patience
        if count % _CHECK_EVERY == 0 or math.log2(count).is_integer():
            return self._compared(replay, inputs)
        found = replay(*inputs)
        if found is None:
            return self._evaluate(*inputs)
        self._last = inputs, found
        return found

    def _evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Calls the function; a subclass has it here, since its own method would make a cycle."""
        return cast(Function, self._function)(*inputs)

    def confirm(self) -> None:
        """Compares the last replay with a call, of a function without random numbers."""
        if self._last is not None:
            inputs, found = self._last
            self._judge(found, self._evaluate(*inputs))

    def _called(self, key: Hashable, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._calls[key] == self._patience:
            replay = record(self._evaluate, inputs, _MOST_SECONDS)
            if replay is None:
                self.can_replay = False
            else:
                self._replays[key] = replay
        return self._evaluate(*inputs)

    def _compared(self, replay: Replay, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        devices = {value.device.index for value in inputs if value.is_cuda}
        with torch.random.fork_rng(devices=devices):
            found = replay(*inputs)
        expected = self._evaluate(*inputs)
        # one that fails is slower than a call, but nothing was wrong with others
        self._last = self._last if found is not None else None
        self._judge(found, expected)
        return expected

    def _judge(self, found: tuple[Tensor, ...] | None, expected: tuple[Tensor, ...]) -> None:
        was_used, self._last = self._last is not None, None
        if self.can_replay and found is not None and agree(found, expected):
            self.num_compared += 1
            return
        self.can_replay = False
        self._replays.clear()
        if was_used:
            raise ReplayError("expected replays that are what calls are, got others")


class CapturedLoss(Captured):
    """A function without arguments, a scalar, with gradients that are found along with it.

    It is a random function of parameters, whatever the loss depends on. Its operations are captured, and
    those of its gradients.

    :param loss: returns the scalar, differentiable in the parameters.
    """

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self._loss = loss
        self._parameters = list[Tensor]()  # leaves with a gradient
        # all that were reached last, and which of them the call before had reached, too
        self._reached, self._lasting = list[Tensor](), set[int]()

    def __call__(self) -> Tensor:  # type: ignore[override]  # a scalar with a graph
        if not self.can_replay:
            return self._loss()
        value, *gradients = super().__call__()
        found: Tensor = _KnownGradients.apply(value, gradients, *self._parameters)
        return found

    def _evaluate(self, *_: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            value = self._loss()
            reached = [*leaves([value])]
            found = torch.autograd.grad(value, reached, allow_unused=True) if reached else ()
        # some leaves are made by the call itself
        lasting = {*map(id, reached)} & {*map(id, self._reached)}
        if self._lasting and lasting != self._lasting:
            self.can_replay = False  # gradients of a replay would be those of others
        self._reached, self._lasting = reached, lasting
        pairs = [(p, g) for p, g in zip(reached, found) if g is not None]
        self._parameters = [parameter for parameter, _ in pairs]
        return value.detach(), *(gradient for _, gradient in pairs)


class _KnownGradients(torch.autograd.Function):
    """A value whose gradients are known."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(weights[0] * gradient for gradient in ctx.gradients)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results are equal to round-off, each number by itself, with the same ones not finite.

    Round-off is that of the number, of the median of its column or of the largest number of its row, where
    terms of that size may cancel: the gradient of a draw is a sum over data, whose order may be another.
    """
    return len(found) == len(expected) and all(map(_is_close, found, expected))


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (expected.is_floating_point() and expected.numel()):
        return torch.equal(found, expected)
    slack = _SLACK * torch.finfo(expected.dtype).eps
    size = expected.abs().nan_to_num(0.0, 0.0)
    unit = torch.maximum(size, size.median(0).values) if size.dim() else size
    unit = torch.maximum(unit, size.amax(-1, keepdim=True)) if size.dim() > 1 else unit
    is_close = (found - expected).abs() <= slack * unit
    same = (found == expected) | (found.isnan() & expected.isnan())
    return bool((is_close & expected.isfinite() | same).all())
