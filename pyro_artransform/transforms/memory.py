# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The last pair of a transform, remembered so that it cannot be out of date.

Scoring a draw right after it was made needs the argument and the log-determinant that were just
computed. torch's own cache hands them out by the identity of the tensors alone, and so returns old
values after an optimiser step (pyro#2564), a graph that has been freed (pyro#2545), or a value without
the gradient that is asked for (pyro#1885). Here a pair is handed out only if recomputing would give the
same: everything that the transform reads is the same object with the same version *and the same
values* (a write through ``p.data`` moves no version counter), gradients are wanted now if and only if
they were then, and what carries a graph of the transform is handed out once.
"""

import weakref

import torch
from torch import Tensor

from .evaluate import values_are_readable
from .visible import State


class Pair:
    """A source, the result that a transform made of it, and the log-determinant of that step.

    :param source: what the transform was applied to.
    :param result: what came out; only a weak reference is kept, and when the result is gone, for which
        alone anybody could ask, everything else goes too.
    :param ladj: the log-determinant of the step from source to result.
    :param state: all that the transform reads.
    """

    def __init__(self, source: Tensor, result: Tensor, ladj: Tensor, state: State) -> None:
        self._source: Tensor | None = source
        self._ladj: Tensor | None = ladj
        self._carries_graph = ladj.requires_grad or result.requires_grad
        self._training = state.training
        self._evidence = [_fingerprint(tensor) for tensor in (source, result, *state.tensors)]
        self._result = weakref.ref(result, self._forget)

    def source_of(self, result: Tensor, state: State | None) -> Tensor | None:
        """The source, if recomputing it from ``result`` would give the same, else None."""
        if self._result() is not result or result.requires_grad != self._carries_graph:
            return None
        return self._source if self._holds(result, result, state) else None

    def ladj_of(self, source: Tensor, result: Tensor, state: State | None) -> Tensor | None:
        """The log-determinant, if recomputing it would give the same, else None."""
        if self._ladj is None or self._result() is not result or self._source is not source:
            return None
        if not self._holds(source, result, state):
            return None
        ladj = self._ladj
        if self._carries_graph:
            self._ladj = None
        return ladj

    def _holds(self, given: Tensor, result: Tensor, state: State | None) -> bool:
        if state is None or self._source is None or state.training != self._training:
            return False
        wants_graph = torch.is_grad_enabled() and any(
            t.requires_grad for t in (given, *state.tensors)
        )
        now = (self._source, result, *state.tensors)
        if wants_graph != self._carries_graph or len(now) != len(self._evidence):
            return False
        return _unchanged(now, self._evidence)

    def _forget(self, _: object) -> None:
        self._source = self._ladj = None
        self._evidence = []


def remember(source: Tensor, result: Tensor, ladj: Tensor, state: State | None) -> Pair | None:
    """A pair, or None where nothing may be remembered.

    That is where something may be read unseen, where no value can be read, and for tensors of
    ``torch.inference_mode``, which have no version.
    """
    if state is None or not values_are_readable(source, *state.tensors):
        return None
    if any(tensor.is_inference() for tensor in (source, result, *state.tensors)):
        return None
    return Pair(source, result, ladj, state)


_Fingerprint = tuple[int, int, bool, Tensor]


def _fingerprint(tensor: Tensor) -> _Fingerprint:
    return id(tensor), tensor._version, tensor.requires_grad, tensor.detach().clone()


def _unchanged(now: tuple[Tensor, ...], then: list[_Fingerprint]) -> bool:
    same = all(
        (id(tensor), tensor.requires_grad) == (identity, grad)
        and not tensor.is_inference()
        and tensor._version == version
        for tensor, (identity, version, grad, _) in zip(now, then)
    )
    return same and _equal([(t.detach(), value) for t, (*_, value) in zip(now, then)])


def _equal(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    if all(a.device.type == "cpu" for a, _ in pairs):
        return all(torch.equal(a, b) for a, b in pairs)
    # one look at an accelerator, where each one waits for it
    if any(a.shape != b.shape for a, b in pairs):
        return False
    return not bool(torch.stack([(a != b).any() for a, b in pairs]).any())
