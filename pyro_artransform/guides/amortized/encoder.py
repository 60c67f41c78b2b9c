# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Encoders, which return the features of each element of a model's plates."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ..._base.arguments import check_callable, is_tracing
from ...model.density import Args, Kwargs
from .plates import Group, Plates

Features = dict[str, Tensor]
Encoder = Callable[..., Tensor | Features]
MakePlates = Callable[[], Plates]


def check_encoder(encoder: Encoder) -> None:
    """Rejects encoders that are not callable, or contain a PyroModule."""
    check_callable("encoder", encoder, "a module or a function that takes the model's arguments")
    modules = encoder.modules() if isinstance(encoder, nn.Module) else []
    if any(isinstance(module, PyroModule) for module in modules):
        # the param store would contain its parameters twice
        raise TypeError("encoder: expected a function or a module of torch.nn, got a PyroModule")


class MiniBatch(Messenger):
    """Makes ``pyro.subsample`` select the mini-batch outside of plates, which may share a dimension."""

    def __init__(self, plates: MakePlates, groups: Sequence[Group]) -> None:
        super().__init__()
        self._plates = plates
        self._names = {name for group in groups for name in group.dims}

    def _pyro_post_subsample(self, message: Any) -> None:
        value, event_dim = message["value"], message["kwargs"].get("event_dim")
        if event_dim is None:
            event_dim = message["args"][1]
        plates, found = self._plates(), dict[int, str]()
        for name in plates.keys() & self._names:
            plate = plates[name]
            dim = plate.dim - event_dim
            if value.dim() < -dim or not value.shape[dim] == plate.size > plate.subsample_size:
                continue
            if dim in found:
                both = sorted([found[dim], name])
                raise ValueError(f"encoder: expected one plate for pyro.subsample, got {both}")
            found[dim] = name
            message["value"] = message["value"].index_select(dim, plate.indices)


def encode(
    encoder: Encoder, plates: MakePlates, groups: Sequence[Group], args: Args, kwargs: Kwargs
) -> Features:
    """Runs an encoder; returns features by group. Plates are made only if it calls ``pyro.subsample``."""
    try:
        with MiniBatch(plates, groups):
            found: object = encoder(*args, **kwargs)
    except TypeError as error:
        wanted = "the model's arguments, as in sample_posterior(n, *data), and a function of them"
        raise TypeError(f"encoder: expected {wanted}, got: {error}") from error
    plates_of = {group.name: group.plates for group in groups}
    if isinstance(found, Tensor) and len(plates_of) == 1:
        found = dict.fromkeys(plates_of, found)
    if not isinstance(found, dict) or not found.keys() <= plates_of.keys():
        got = list(found) if isinstance(found, dict) else type(found).__name__
        wanted = "a tensor, or for several plates a dict of tensors, with some or all of the keys"
        raise TypeError(f"encoder: expected {wanted} {list(plates_of)}, got {got}")
    for name, features in found.items():
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"encoder: expected features of '{name}' that are floats, got {kind}")
        if features.dim() != len(plates_of[name]) + 1:
            wanted = f"a dimension for each of the plates {plates_of[name]} and one of features"
            raise ValueError(
                f"encoder: expected features with {wanted}, got shape {tuple(features.shape)}"
            )
    return found


def first_feature_units(
    encoder: Encoder, plates: MakePlates, groups: Sequence[Group], args: Args, kwargs: Kwargs
) -> dict[str, list[list[float]]]:
    """Means and sds of each group's features, by a first :func:`encode` without side effects.

    Returns 0 and 1 for trained features, and an sd of 1 for a constant feature.
    """
    tracer = poutine.trace(param_only=True)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), poutine.block(), tracer:
        found = encode(encoder, plates, groups, args, kwargs)
    trains = any(features.requires_grad for features in found.values())
    if trains and not isinstance(encoder, nn.Module) and not tracer.trace.nodes:
        raise ValueError(
            "encoder: expected a torch module, or a function that registers its modules by pyro.module, got "
            "parameters that are not registered"
        )
    units = {}
    for name, features in found.items():
        if not features.isfinite().all():
            raise ValueError(
                f"encoder: expected finite features of '{name}', got some that are not"
            )
        rows = features.detach().reshape(-1, features.shape[-1]).double()
        loc, scale = rows.mean(0), rows.std(0, correction=0)
        is_known = scale.isfinite() & (not trains)
        scale = scale.where(is_known & (scale > 0), 1.0)
        units[name] = [loc.where(is_known, 0.0).tolist(), scale.tolist()]
    return units


def minibatch_rows(group: Group, features: Tensor, feature_dim: int, plates: Plates) -> Tensor:
    """Features of a mini-batch, ``batch shape + (feature_dim,)``, from its rows or from all rows."""
    sizes = {name: plates[name].subsample_size for name in group.plates}
    of_batch = (*sizes.values(), feature_dim)
    of_all = (*(plates[name].size for name in group.plates), feature_dim)
    got = tuple(features.shape)
    if is_tracing() or got == of_batch:
        return features.reshape(*group.batch_shape(sizes), feature_dim)
    if got == of_all:
        indices = {name: plates[name].indices for name in group.plates}
        return group.select(given_rows(group, features, feature_dim), indices)
    raise ValueError(
        f"encoder: expected features of shape {of_batch}, or {of_all} of all elements, for plates "
        f"{group.plates} around the sites {sorted(group.latents.sites)}, got {got}"
    )


def given_rows(group: Group, features: Tensor, feature_dim: int) -> Tensor:
    """Reshapes features of any number of elements to ``batch shape + (feature_dim,)``."""
    *found, columns = features.shape
    if columns != feature_dim:
        raise ValueError(f"encoder: expected {feature_dim} features, got {columns}")
    return features.reshape(*group.batch_shape(dict(zip(group.plates, found))), feature_dim)
