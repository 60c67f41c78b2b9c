# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a network is given: its sizes and its activation."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# They mix rows or are random once they are in training mode, whatever the mode is now.
NOT_ELEMENTWISE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)


def check_size(name: str, value: Any, least: int) -> int:
    """An integer, NumPy's too, that is large enough.

    :raises ValueError: if it is none; a bool is none.
    """
    size = _as_index(value)
    if size is None or size < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return size


def check_hidden_dims(hidden_dims: int | Sequence[int] | None, input_dim: int) -> tuple[int, ...]:
    """The widths of the hidden layers.

    :raises ValueError: if they are neither an integer nor a sequence of integers, or there is none.
    """
    if hidden_dims is None:
        return (max(64, 2 * input_dim),) * 2
    if _as_index(hidden_dims) is not None:
        return (check_size("hidden_dims", hidden_dims, 1),)
    if isinstance(hidden_dims, (str, bytes)) or not isinstance(hidden_dims, Iterable):
        raise ValueError(
            "hidden_dims: expected an integer of at least 1, or a sequence of them, "
            f"got {hidden_dims!r}"
        )
    widths = tuple(check_size("hidden_dims", width, 1) for width in hidden_dims)
    if not widths:
        raise ValueError("hidden_dims: expected at least one width, got an empty sequence")
    return widths


def check_callable(nonlinearity: Any) -> None:
    """Refuses a class, and what cannot be called.

    :raises TypeError: if it is such.
    """
    if isinstance(nonlinearity, type) or not callable(nonlinearity):
        raise TypeError(
            "nonlinearity: expected a function or a module such as torch.nn.ELU(), "
            f"got {nonlinearity!r}"
        )


def check_elementwise(nonlinearity: Callable[[Tensor], Tensor], width: int, like: Tensor) -> None:
    """Refuses an activation that is random or mixes elements, by evaluating it a few times.

    One that is not elementwise makes a network that is not autoregressive: its log-determinants and
    inverses would be wrong and nothing would say so. The random state stays as it is.

    :param width: the number of units of the array that it is evaluated at.
    :param like: its dtype and device are used where the activation has no parameters of its own.
    :raises ValueError: if it is such.
    """
    modules = list(nonlinearity.modules()) if isinstance(nonlinearity, nn.Module) else []
    if any(isinstance(module, NOT_ELEMENTWISE) for module in modules):
        raise _not_elementwise(nonlinearity, "which mixes rows or is random in training mode")
    like = next((p for module in modules for p in module.parameters()), like)
    if like.is_meta:
        return
    with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
        try:
            fault = _fault(nonlinearity, _probe(width, like))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = f"which fails on an array of some shape: {error}"
            raise _not_elementwise(nonlinearity, reason) from error
    if fault is not None:
        raise _not_elementwise(nonlinearity, fault)


def _as_index(value: Any) -> int | None:
    """The integer that a value stands for, None if it stands for none."""
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _probe(width: int, like: Tensor) -> Tensor:
    """Numbers of both signs in no order, shape ``(3, width)``."""
    count = torch.arange(3 * width, dtype=torch.float32, device=like.device)
    return (2 * (1.7 * count).sin()).to(like.dtype).reshape(3, width)


def _fault(function: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """What is wrong with an activation, None if nothing is."""
    given = x.clone()
    y = function(given)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        return f"which turns shape {tuple(x.shape)} into {got}"
    if not torch.equal(given, x):
        return "which changes its argument in place"
    row, unit = 1, x.shape[1] // 2
    x[row, unit] += 3
    moved = function(x.clone()).clone()
    own = moved[row : row + 1, unit : unit + 1].clone()
    moved[row, unit] = y[row, unit]
    if not _equal(moved, y):
        return "one of whose outputs moves with another's input, or by chance"
    if not _equal(function(x[row : row + 1, unit : unit + 1].clone()), own):
        return "whose output depends on where an element stands"
    return None


def _equal(first: Tensor, second: Tensor) -> bool:
    """To round-off, since arrays of different shapes may be evaluated by different kernels."""
    tolerance = 32 * torch.finfo(second.dtype).eps
    return torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)


def _not_elementwise(nonlinearity: object, fault: str) -> ValueError:
    return ValueError(
        "nonlinearity: expected a deterministic elementwise function, the same for every unit, "
        f"got {nonlinearity!r}, {fault}"
    )
