# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Specifications of guides, their serialization, and checks of state dicts before building a guide."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn
from torch.nn.modules import activation

from ...flows.conditioners import TiltedSiLU
from ...model.sites import Latents, Site, map_bounds

Arguments = dict[str, Any]
State = Mapping[str, Tensor]

_SUPPORTS = (
    *("real", "independent", "greater_than", "greater_than_eq", "less_than", "interval"),
    *("half_open_interval", "simplex", "corr_cholesky", "corr_matrix", "ordered_vector"),
    *("positive_ordered_vector", "softplus_positive"),
)
_ACTIVATIONS = {*activation.__all__} - {"MultiheadAttention", "PReLU"}  # without parameters
_NAMED = [getattr(constraints, n) for n in _SUPPORTS] + [
    getattr(activation, n) for n in _ACTIVATIONS
]
_KINDS = [named if isinstance(named, type) else type(named) for named in _NAMED]
#: classes of objects that files may hold
_CLASSES: dict[str, Any] = {kind.__name__: kind for kind in (*_KINDS, TiltedSiLU)}


@dataclass(frozen=True, eq=False)
class GuideSpec:
    """The specification from which a guide is built, also after it was loaded from a file.

    :param arguments: the constructor arguments that determine the parameters.
    :param observed: the sites that had data at set-up.
    """

    latents: Latents
    arguments: Arguments
    observed: tuple[str, ...]
    device: torch.device

    @property
    def sites(self) -> tuple[Site, ...]:
        """The latent sites, in the order of the latent vector."""
        return tuple(self.latents.sites.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latent vector, promoted over all sites."""
        return reduce(torch.promote_types, (site.dtype for site in self.sites))

    def zeros(self) -> Tensor:
        return torch.zeros(self.latents.latent_dim, dtype=self.dtype, device=self.device)

    def to(self, fn: Callable[[Tensor], Tensor]) -> "GuideSpec":
        """Converts the spec's tensors, for example by ``Tensor.double``."""
        latents = Latents(site.to(fn) for site in self.sites)
        return replace(self, latents=latents, device=fn(self.zeros()).device)

    def to_json(self) -> str:
        """Serializes the spec.

        :raises ValueError: if a support or an argument cannot be serialized.
        """
        parts = [(f"the support of site '{site.name}'", site) for site in self.sites]
        sites = [_plain(name, {f.name: getattr(s, f.name) for f in fields(s)}) for name, s in parts]
        arguments = {name: _plain(name, value) for name, value in self.arguments.items()}
        return json.dumps({"sites": sites, "arguments": arguments, "observed": self.observed})

    @classmethod
    def from_json(cls, text: str, device: torch.device) -> "GuideSpec":
        """Reads a spec written by :meth:`to_json`, with bounds of supports on a device."""
        plain = json.loads(text, object_hook=partial(_decode, device))
        latents = Latents(_site(**site) for site in plain["sites"])
        return cls(latents, plain["arguments"], tuple(plain["observed"]), device)


def _site(*, shape: list[int], support: Any, plates: list[Any], **rest: Any) -> Site:
    map_bounds(support, lambda bound: bound.expand(shape))  # larger ones would make larger values
    frames = tuple(CondIndepStackFrame(*plate) for plate in plates)
    return Site(shape=torch.Size(shape), support=support, plates=frames, **rest)


def _plain(name: str, value: Any) -> Any:
    return json.loads(json.dumps(value, default=partial(_encode, name)))


def _encode(name: str, value: Any) -> Arguments:
    """Encodes an object as plain data; ``name`` is for the error message."""
    kind, function = type(value).__name__, getattr(value, "__name__", "")
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "of": value.dtype}
    if type(value) is _CLASSES.get(kind):
        return {"class": kind, "fields": _public(vars(value))}
    if value in (getattr(nn.functional, function, None), getattr(torch, function, None)):
        return {"function": function}
    raise ValueError(
        f"{name} cannot be written to a file: expected one of {', '.join(_SUPPORTS)}, an activation of "
        f"torch.nn without parameters, or a function of torch, got {kind}; save the guide's "
        "state_dict() instead"
    )


def _decode(device: torch.device, plain: Arguments) -> Any:
    """Inverts :func:`_encode`, with tensors on a device."""
    match plain:
        case {"dtype": str(name)} if isinstance(dtype := getattr(torch, name), torch.dtype):
            return dtype
        case {"tensor": values, "of": torch.dtype() as dtype}:
            return torch.tensor(values, dtype=dtype, device=device)
        case {"class": str(kind), "fields": dict(found)}:
            made = _CLASSES[kind].__new__(_CLASSES[kind])
            if isinstance(made, nn.Module):
                nn.Module.__init__(made)
            vars(made).update(_public(found))
            return made
        case {"function": str(name)}:
            return getattr(nn.functional, name, None) or getattr(torch, name)
    return plain


def _public(attributes: Arguments) -> Arguments:
    """Drops torch's own attributes, such as the hooks of a module."""
    return {name: value for name, value in attributes.items() if name[0] != "_"}


def check_finite(state: State) -> None:
    """Refuses a state dict with NaN or infinite entries."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            bad = f"{int((~value.isfinite()).sum())} of {value.numel()} that are not"
            raise ValueError(f"parameter '{name}': expected finite numbers, got {bad}")
