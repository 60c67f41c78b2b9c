# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a guide is given: its arguments, and the flow that one of them makes."""

from collections.abc import Callable
from math import isfinite
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor, nn

from ....transforms import check_structure


def new_flow(make_flow: Callable[[int], Any], loc: Tensor) -> TransformModule:
    """Makes a flow with the dtype and the device of the guide.

    :param make_flow: takes the latent dimension and returns a flow.
    :param loc: shape ``(latent_dim,)``.
    :raises TypeError: if what it returns is no module, no transform, or has no parameters.
    :raises ValueError: if the flow is not autoregressive (where Pyro's validation is on).
    """
    # whatever the default device is
    with loc.device:
        flow: TransformModule = _check_flow(make_flow(len(loc)))
    flow.to(dtype=loc.dtype, device=loc.device)
    for parameter in flow.parameters():
        # of a parameter that is not contiguous the param store would train a copy
        parameter.data = parameter.data.contiguous()
    if dist.is_validation_enabled():
        check_structure(flow, loc)
    return flow


def check_model(model: Any) -> None:
    """Refuses what cannot be a model, and a transform in place of one.

    :raises TypeError: if it is such.
    """
    if not callable(model):
        raise TypeError(f"model: expected a callable, got {type(model).__name__}")
    if isinstance(model, (torch.distributions.Transform, ConditionalTransform)):
        raise TypeError(
            "model: expected a Pyro model, a callable with sample statements, got the transform "
            f"{type(model).__name__}; a flow goes into AutoAutoregressive(model, flow=...), as a "
            "callable that takes the latent dimension and returns it"
        )


def to_tensor(name: str, value: Any, like: Tensor) -> Tensor:
    """Numbers as a tensor; one that is a tensor of floats already stays as it is.

    :param name: what they are, for the message.
    :param value: a tensor, an array, or a list of numbers.
    :param like: a tensor of the dtype and device wanted.
    :raises ValueError: if it is none of these.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    try:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an array of numbers, got {value!r}: {error}") from None


def check_callables(**given: Any) -> None:
    """Refuses what cannot be called, and a flow that is one already.

    :raises TypeError: if one of them is such.
    """
    for name, value in given.items():
        if not callable(value):
            raise TypeError(f"{name}: expected a callable, got {type(value).__name__}")
    if isinstance(given["flow"], nn.Module):
        raise TypeError(
            "flow: expected a callable that takes the latent dimension and returns a flow, got the "
            f"module {type(given['flow']).__name__}; write flow=lambda latent_dim: ..."
        )


def _check_flow(flow: Any) -> Any:
    if not isinstance(flow, nn.Module) or not isinstance(flow, torch.distributions.Transform):
        raise TypeError(
            f"flow: expected it to return a TransformModule, got {type(flow).__name__}; "
            "pyro_artransform.transforms.chain([...]) makes one of transforms and keeps their "
            "parameters, in its .inv too"
        )
    if not any(parameter.requires_grad for parameter in flow.parameters()):
        raise TypeError(
            "flow: expected a module with parameters to train, got one without: "
            f"{type(flow).__name__}"
        )
    return flow


def check_scale(init_scale: float) -> float:
    """A positive number as a float.

    :raises ValueError: if it is none.
    """
    # numpy's numbers are real too
    is_number = isinstance(init_scale, (float, int, Real)) and not isinstance(init_scale, bool)
    if not is_number or not isfinite(init_scale) or init_scale <= 0:
        raise ValueError(f"init_scale: expected a positive number, got {init_scale!r}")
    return float(init_scale)


def check_count(name: str, count: int) -> int:
    """A positive integer.

    :raises ValueError: if it is none.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name}: expected a positive integer, got {count!r}")
    return count
