# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Capture of the operations of a function of tensors, and their replay without Python overhead.

The gradient of a small model is a thousand operations of a few microseconds each. Pyro's handlers,
``torch.vmap`` and autograd take several times as long to dispatch them, and dispatch the same ones each time.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..._base.comparison import agree, of_reordered_sums
from ..._base.differentiation import KnownGradients, leaves
from .execution import has_torchscript
from .recording import Replay, record

#: a function of tensors that returns detached tensors
Function = Callable[..., tuple[Tensor, ...]]

_PATIENCE = 2  # calls with the same shapes before a capture


class ReplayError(RuntimeError):
    """Raised if a replay differs from a call: results since the last comparison are invalid.

    After this error the function is only called, not replayed.
    """


class Captured:
    """Wraps a function of tensors; captures its operations after some calls, then replays them.

    The function may read parameters and other tensors, which each replay reads anew, and draw from PyTorch's
    generators, which a replay advances equally. Capture is given up for good if Python reads a varying value,
    or an operation is not known to replay correctly (:mod:`~pyro_artransform.model.replay.recording`). Where
    a replay fails, the function is called instead.

    :raises ReplayError: if one of the occasional comparisons of a replay with a call fails, as when the
        function depends on other Python state.
    """

    def __init__(self, function: Function | None = None) -> None:
        self._function, self._calls = function, Counter[Hashable]()
        self._replays: dict[Hashable, Replay] = {}
        # inputs and outputs of the last unverified replay
        self._last: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
        self.can_replay = True  #: False once capture is refused or a replay was wrong
        self.num_compared = 0  #: number of successful comparisons

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if not self.can_replay:
            return self._evaluate(*inputs)
        key = tuple((value.shape, value.dtype, value.device) for value in inputs)
        if key in self._replays and not self._replays[key].is_current():
            del self._replays[key]
            self._calls[key] = 0
        self._calls[key] += 1
        if key not in self._replays:
            if self._calls[key] < _PATIENCE:
                return self._evaluate(*inputs)
            captured = record(self._evaluate, inputs, 20.0) if has_torchscript() else None
            if captured is None:
                self.can_replay = False
                return self._evaluate(*inputs)
            self._replays[key] = captured
            return self._compared(captured, inputs)
        replay, count = self._replays[key], self._calls[key] - _PATIENCE
        # one in 256 replays is compared with a call, and more at first
        if count % 256 == 0 or (count > 1 and math.log(count, 4).is_integer()):
            return self._compared(replay, inputs)
        found = replay(*inputs)
        if found is None:
            return self._evaluate(*inputs)
        self._last = inputs, found
        return found

    def _evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Calls the function; overridden by subclasses, since storing a bound method would make a cycle."""
        return cast(Function, self._function)(*inputs)

    def confirm(self) -> None:
        """Compares the last replay with a call; only for functions without random numbers."""
        if self._last is not None:
            inputs, found = self._last
            self._judge(inputs, found, self._evaluate(*inputs))

    def give_up(self) -> None:
        """From now on the function is only called."""
        self.can_replay = False
        self._replays.clear()

    def _compared(self, replay: Replay, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        devices = {value.device.index for value in inputs if value.is_cuda}
        with torch.random.fork_rng(devices=devices):
            found = replay(*inputs)
        expected = self._evaluate(*inputs)
        if found is None:  # which costs time, but does not invalidate earlier replays
            self._last = None
        self._judge(inputs, found, expected)
        return expected

    def _judge(
        self,
        inputs: tuple[Tensor, ...],
        found: tuple[Tensor, ...] | None,
        expected: tuple[Tensor, ...],
    ) -> None:
        was_used = self._last is not None
        self._last = None
        is_right = found is not None and (
            (self.can_replay and agree(found, expected, 0.0, of_reordered_sums))
            # results may be more sensitive to round-off than their own
            or self._agree_nearby(inputs, found, expected)
        )
        if is_right:
            self.num_compared += 1
            return
        self.give_up()
        if was_used:
            raise ReplayError("expected replays that agree with calls, got different values")

    def _agree_nearby(
        self, inputs: Sequence[Tensor], found: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> bool:
        """Whether results agree up to the effect of a unit in the last place of the inputs."""
        is_random = any(replay.is_random for replay in self._replays.values())
        if is_random or not self.can_replay:
            return False
        again = self._evaluate(*inputs)
        # a single change may cancel by chance
        nearby = [self._evaluate(*(_nudged(value, ulps) for value in inputs)) for ulps in (1, -2)]
        # other Python state also changes results, those at the same inputs included
        is_same = all(
            torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(again, expected)
        )
        return is_same and agree(found, expected, 0.0, of_reordered_sums, nearby)


class CapturedLoss(Captured):
    """Captures a scalar loss, which may be random, together with its gradients by all parameters.

    :param loss: a function of tensors that do not require gradients, if any.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self._loss = loss
        self._parameters = list[Tensor]()  # leaves with a gradient
        # leaves of the last call, and ids of those that the call before reached, too
        self._reached, self._lasting = list[Tensor](), set[int]()

    def __call__(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]  # a scalar with a graph
        if not self.can_replay:
            return self._loss(*inputs)
        value, *gradients = super().__call__(*inputs)
        found: Tensor = KnownGradients.apply(value, gradients, None, None, *self._parameters)
        return found

    def _evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            value = self._loss(*inputs)
            reached = [*leaves([value])]
            found = torch.autograd.grad(value, reached, allow_unused=True) if reached else ()
        # the call itself creates some leaves
        lasting = {*map(id, reached)} & {*map(id, self._reached)}
        if self._lasting and lasting != self._lasting:
            self.can_replay = False  # a replay would have gradients of other leaves
        self._reached, self._lasting = reached, lasting
        pairs = [(p, g) for p, g in zip(reached, found) if g is not None]
        self._parameters = [parameter for parameter, _ in pairs]
        return value.detach(), *(gradient for _, gradient in pairs)


def _nudged(value: Tensor, ulps: int) -> Tensor:
    """Changes floating-point numbers by units in the last place, up and down in turn."""
    if not value.is_floating_point():
        return value
    up = torch.arange(value.numel(), device=value.device).reshape(value.shape) % 2 * 2 - 1
    return value * (1 + ulps * torch.finfo(value.dtype).eps * up.to(value.dtype))
