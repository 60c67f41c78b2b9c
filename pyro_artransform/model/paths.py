# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Runs a model under ``torch.vmap``, once for each path that draws take through its branches.

``if z > 0``, ``while error > 1e-6`` and ``range(int(n))`` read the value of a tensor, which under vmap has
one value per draw. If all draws agree, the model gets their value. If they differ, the run ends, and each
group of draws with equal values is run separately. Many draws usually take few paths.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
)
from torch.overrides import TorchFunctionMode

Draws = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Evaluate = Callable[[Draws, int | None], Terms]

# operations by which a model reads a value that may decide its path, and the value that they return
_READS: dict[Any, Callable[[Tensor], Tensor]] = {
    Tensor.__bool__: Tensor.bool,
    Tensor.__int__: Tensor.trunc,
    Tensor.__index__: Tensor.trunc,
    Tensor.item: Tensor.clone,
}
_DATA = vars(torch._C.TensorBase)["data"].__get__
# maximum number of runs, or of runs per draw: with more, a loop over draws is about as fast
_FEW_RUNS, _DRAWS_OF_RUN = 10, 4


class ManyPathsError(RuntimeError):
    """Raised if draws take so many paths through a model that a loop over draws is as fast."""


class BranchError(BaseException):
    """Ends a run whose draws branch at a value, its argument; no ``Exception``, which models may catch."""


def evaluate_by_path(evaluate: Evaluate, draws: Draws, *, has_copies: bool = False) -> Terms:
    """The terms ``(n, ...)`` of many draws ``(n, ...)``, evaluated path by path.

    :param has_copies: whether each draw has its own copy of the tensors that do not depend on draws.
    :raises ManyPathsError: if there are so many paths that a loop over draws is as fast.
    """

    def one(row: Draws) -> Terms:
        with SingleDraw(next(iter(row.values())), has_copies):
            return evaluate(row, None)

    every = torch.arange(len(next(iter(draws.values()))), device="cpu")
    most_runs, state = max(_FEW_RUNS, len(every) // _DRAWS_OF_RUN), torch.get_rng_state()
    groups, found = [every], list[tuple[Tensor, Terms]]()
    for _ in range(most_runs):
        rows = groups.pop()
        is_all = len(rows) == len(every)
        part = draws if is_all else {name: value[rows] for name, value in draws.items()}
        torch.set_rng_state(state)  # the model draws the same random numbers on all paths
        try:
            terms: Terms = torch.vmap(one, randomness="same")(part)
        except BranchError as branch:
            (asked,) = branch.args
            groups += [rows[asked == value] for value in asked.unique()]
        else:
            if is_all:
                return terms
            found.append((rows, terms))
        if not groups:
            order = torch.cat([rows for rows, _ in found]).argsort()
            return {name: torch.cat([t[name] for _, t in found])[order] for name in found[0][1]}
    raise ManyPathsError(
        f"the branches of the model split {len(every)} draws into more than {len(found)} paths"
    )


class SingleDraw(TorchFunctionMode):
    """Lets a model under ``torch.vmap`` use operations that a single draw permits.

    :param like: a batched draw, for its vmap level, dtype and device.
    :param has_copies: whether each draw has its own copy of the tensors that do not depend on draws. A model
        may then write batched values into floating-point tensors that it creates, as Pyro's ``Multinomial``
        does, but not into earlier ones.
    """

    def __init__(self, like: Tensor, has_copies: bool = False) -> None:
        super().__init__()
        self._level, self._has_copies = maybe_get_level(like), has_copies
        self._zero = torch.zeros_like(like.detach()).sum()  # for each draw

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS and is_batchedtensor(args[0]):
            args = (self._common(args[0], _READS[func]), *args[1:])
        elif func is torch.tensor and (first := _first_batched(args[0])) is not None:
            return _stacked(args[0], kwargs.get("dtype") or first.dtype, first.device)
        elif func == _DATA:  # read by Pyro's enumeration handler and Kalman filter
            return args[0].detach()
        if not self._has_copies:
            return func(*args, **kwargs)
        if func is Tensor.__setitem__:
            tensor, index, value = args
            is_mask = isinstance(index, Tensor) and index.dtype is torch.bool
            if is_mask and index.dim() == tensor.dim() and isinstance(value, (int, float)):
                func = Tensor.masked_fill_  # equivalent, with a vmap rule
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor) or is_batchedtensor(found):
            return found
        is_copied = found.is_floating_point() and found.device == self._zero.device
        return found + self._zero.to(found.dtype) if is_copied else found

    def _common(self, value: Tensor, told: Callable[[Tensor], Tensor]) -> Tensor:
        """The common value of all draws, or the tensor itself if it is not a batched scalar to be read."""
        plain = get_unwrapped(value)
        is_real = told is Tensor.clone and value.is_floating_point()
        if is_real or maybe_get_level(value) != self._level or value.numel() != 1:
            return value
        while is_functorch_wrapped_tensor(plain) and not is_batchedtensor(plain):
            plain = get_unwrapped(plain)
        if is_batchedtensor(plain):
            return value
        values = told(plain.detach().flatten())
        if values.isnan().any():
            raise ValueError("cannot convert float NaN to integer")  # as Python says
        if not bool((values == values[0]).all()):
            raise BranchError(values.to("cpu"))
        return values[0]


def _first_batched(value: Any) -> Tensor | None:
    """The first batched number in nested lists of numbers."""
    if isinstance(value, (list, tuple)):
        return next((found for v in value if (found := _first_batched(v)) is not None), None)
    return value if isinstance(value, Tensor) and is_batchedtensor(value) else None


def _stacked(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A differentiable ``torch.tensor`` of nested lists of numbers."""
    if isinstance(value, (list, tuple)):
        return torch.stack([_stacked(v, dtype, device) for v in value])
    if isinstance(value, Tensor):
        return value.reshape(()).to(dtype)
    return torch.full((), value, dtype=dtype, device=device)
