# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What an encoder returns: the features of each element of the plates of a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from .layout import Group

Features = dict[str, Tensor]


def check_encoder(encoder: Any) -> Any:
    """Refuses what cannot be an encoder.

    :raises TypeError: if it cannot be called, or is a class or a module of Pyro's.
    """
    if encoder is None:
        return None
    if isinstance(encoder, type) or not callable(encoder):
        raise TypeError(
            "encoder: expected a module or a function that takes the model's arguments, got "
            f"{encoder!r}"
        )
    modules = encoder.modules() if isinstance(encoder, nn.Module) else []
    if any(isinstance(module, PyroModule) for module in modules):
        raise TypeError(
            "encoder: expected a torch module or a function, got one with a PyroModule inside, "
            f"{type(encoder).__name__}, whose parameters the param store would have twice. Make it "
            "of torch.nn modules"
        )
    return encoder


class MiniBatch(Messenger):
    """Makes ``pyro.subsample`` take the mini-batch, without the plates: some share a dimension.

    :param plates: plates by name, each with its dimension.
    """

    def __init__(self, plates: Mapping[str, Any]) -> None:
        super().__init__()
        self._plates = plates

    def _pyro_post_subsample(self, message: Any) -> None:
        given, known = (*message["args"], None)[:2], message["kwargs"]
        event_dim = known.get("event_dim", given[1])
        size_by_dim: dict[int, list[str]] = {}
        for name, plate in self._plates.items():
            dim, value = plate.dim - event_dim, message["value"]
            if value.dim() >= -dim and value.shape[dim] == plate.size > plate.subsample_size:
                size_by_dim.setdefault(dim, []).append(name)
        for dim, names in size_by_dim.items():
            if len(names) > 1:
                raise ValueError(
                    f"encoder: pyro.subsample of shape {tuple(message['value'].shape)} fits the "
                    f"plates {sorted(names)}: expected one. Return a row for each of all elements"
                )
            message["value"] = message["value"].index_select(dim, self._plates[names[0]].indices)


def encode(
    encoder: Callable[..., Any],
    plates: Mapping[str, pyro.plate],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls an encoder where ``pyro.subsample`` means what it does in the model.

    :param encoder: a function of the model's arguments.
    :param plates: plates by name, each with its dimension.
    :param args: the model's arguments.
    :param kwargs: its keyword arguments.
    """
    with MiniBatch(plates):
        return encoder(*args, **kwargs)


def encode_registered(
    encoder: Callable[..., Any],
    plates: Mapping[str, pyro.plate],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """:func:`encode` for the first time: nothing is kept, and parameters that nobody would train are
    refused.

    :raises ValueError: if the encoder is a function with parameters that the param store has not.
    """
    tracer = poutine.trace(param_only=True)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), poutine.block(), tracer:
        found = encode(encoder, plates, args, kwargs)
    tensors = found.values() if isinstance(found, dict) else [found]
    trains = any(isinstance(value, Tensor) and value.requires_grad for value in tensors)
    if trains and not isinstance(encoder, nn.Module) and not tracer.trace.nodes:
        raise ValueError(
            "encoder: got a function whose result has gradients, but no parameters of it are "
            "known, so they would never train: expected a torch module, or a function that "
            "registers its modules by pyro.module"
        )
    return found


def features_by_group(found: Any, groups: Sequence[Group]) -> Features:
    """What an encoder returned, by the names of groups.

    :param found: a tensor, or a dict of tensors by name.
    :param groups: the groups of local latents.
    :raises TypeError: if it is neither.
    :raises ValueError: if it is one tensor for several groups, or is for a group that is not there.
    """
    names = [group.name for group in groups]
    if isinstance(found, Tensor):
        if len(names) > 1:
            raise ValueError(
                f"encoder: the model has local latents in several plates, {names}: expected a dict "
                f"of features by these names, got one tensor of shape {tuple(found.shape)}. Elements "
                "of plates that the dict leaves out have embeddings of their own"
            )
        found = {names[0]: found}
    if not isinstance(found, dict):
        raise TypeError(
            "encoder: expected it to return a tensor or a dict of tensors by plate, got "
            f"{type(found).__name__}"
        )
    for name, features in found.items():
        if name not in names:
            raise ValueError(f"encoder: expected a dict by plate, of {names}, got the key {name!r}")
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"encoder: expected features of '{name}' that are floats, got {got}")
    return found


def check_keys(features: Features, expected: Sequence[str]) -> None:
    """Refuses features for other plates than at the set-up.

    :raises ValueError: if there are such, or some are missing.
    """
    if sorted(features) != sorted(expected):
        raise ValueError(
            f"encoder: expected features of {sorted(expected)}, as at the guide's set-up, got "
            f"{sorted(features)}"
        )


def rows_of(
    group: Group,
    features: Tensor,
    feature_dim: int,
    sizes: Mapping[str, int],
    full_sizes: Mapping[str, int],
    indices: Mapping[str, Tensor],
) -> Tensor:
    """The features of the elements of a mini-batch.

    :param group: a group of local latents.
    :param features: a row for each element of the mini-batch, or for each element of the plates, of
        which the mini-batch's are taken.
    :param feature_dim: the number of features of an element.
    :param sizes: the number of elements in the mini-batch, by plate.
    :param full_sizes: the number of all elements, by plate.
    :param indices: the elements in the mini-batch, of each plate that is sub-sampled.
    :return: shape ``batch shape + (feature_dim,)``.
    :raises ValueError: if the features have another shape.
    """
    if torch.jit.is_tracing():
        return features.reshape(group.batch_shape(sizes) + features.shape[-1:])
    got = tuple(features.shape)
    wanted, whole = (tuple(s[name] for name in group.plates) for s in (sizes, full_sizes))
    if got == (*wanted, feature_dim):
        return features.reshape(*group.batch_shape(sizes), feature_dim)
    if got == (*whole, feature_dim):
        rows = features.reshape(*group.batch_shape(full_sizes), feature_dim)
        for name, dim in group.dims.items():
            rows = rows.index_select(dim - 1, indices[name]) if name in indices else rows
        return rows
    raise ValueError(
        f"encoder: expected features of shape {(*wanted, feature_dim)}, a row for each element of "
        f"{_described(group, sizes)}, got {got}"
        + (f"; or {(*whole, feature_dim)}, one for each of all elements" * (whole != wanted))
    )


def rows_as_given(
    group: Group, features: Tensor, feature_dim: int
) -> tuple[Tensor, dict[str, int]]:
    """The features of whatever elements there are, and how many these are, by plate.

    :param group: a group of local latents.
    :param features: a row for each element.
    :param feature_dim: the number of features of an element.
    :raises ValueError: if the features have another number of dimensions or columns.
    """
    *found, columns = features.shape
    if len(found) != len(group.plates) or columns != feature_dim:
        names = ", ".join(f"elements of '{name}'" for name in group.plates)
        raise ValueError(
            f"encoder: expected features of shape ({names}, {feature_dim}), got "
            f"{tuple(features.shape)}"
        )
    sizes = dict(zip(group.plates, found))
    return features.reshape(*group.batch_shape(sizes), feature_dim), sizes


def _described(group: Group, sizes: Mapping[str, int]) -> str:
    plates = " and ".join(f"plate '{name}' ({sizes[name]})" for name in group.plates)
    return f"{plates} around the sites {sorted(group.sites)}"
