# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a guide is built from, also as plain data, and checks of a state dict before it is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn
from torch.nn.modules import activation

from ...conditioners import TiltedSiLU
from ...joint.sites import Latents, Site

Arguments = dict[str, Any]
State = Mapping[str, Tensor]

_FUNCTIONS = {"torch": torch, "torch.nn.functional": nn.functional}
_NAMES = (
    *("real", "independent", "greater_than", "greater_than_eq", "less_than", "interval"),
    *("half_open_interval", "simplex", "corr_cholesky", "corr_matrix", "ordered_vector"),
    *("positive_ordered_vector", "softplus_positive"),
)
_SUPPORTS = {name: getattr(constraints, name) for name in _NAMES}
_NAME_TO_CLASS = {k: v if isinstance(v, type) else type(v) for k, v in _SUPPORTS.items()}
_CLASS_TO_NAME = {kind: name for name, kind in _NAME_TO_CLASS.items()}


@dataclass(frozen=True, eq=False)
class GuideSpec:
    """What a guide is built from, a file holds, and a loaded guide is built from again.

    :param arguments: those of the constructor that decide which parameters there are.
    :param observed: the sites that had data at the set-up.
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
        """The dtype of the latent vector, which holds the values of each site."""
        return reduce(torch.promote_types, (site.dtype for site in self.sites))

    def zeros(self) -> Tensor:
        return torch.zeros(self.latents.latent_dim, dtype=self.dtype, device=self.device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {site.name: tuple(site.shape) for site in self.sites}

    def to(self, fn: Callable[[Tensor], Tensor]) -> "GuideSpec":
        """The spec as a conversion of tensors leaves it, such as ``Tensor.double``."""
        latents = Latents(site.to(fn) for site in self.sites)
        return replace(self, latents=latents, device=fn(self.zeros()).device)

    def to_plain(self) -> Arguments:
        """The spec as plain data."""
        sites = []
        for site in self.sites:
            plain = {"name": site.name, "shape": list(site.shape), "event_dim": site.event_dim}
            plain["support"] = to_plain(f"the support of site '{site.name}'", site.support)
            plain["dtype"] = str(site.dtype).removeprefix("torch.")
            plain["plates"] = [list(frame) for frame in site.plates]
            sites.append(plain)
        arguments = {name: to_plain(name, value) for name, value in self.arguments.items()}
        return {"sites": sites, "arguments": arguments, "observed": list(self.observed)}

    @classmethod
    def from_plain(cls, plain: Arguments, device: torch.device) -> "GuideSpec":
        """The spec from what :meth:`to_plain` made of it, with bounds of supports on a device."""
        sites = []
        for site in plain["sites"]:
            support = from_plain(site["support"], device)
            shape, dtype = torch.Size(site["shape"]), getattr(torch, site["dtype"])
            plates = tuple(CondIndepStackFrame(*frame) for frame in site["plates"])
            sites.append(Site(site["name"], shape, site["event_dim"], support, dtype, plates))
            # on the meta device: what the bounds of a support broadcast to may be huge
            on_meta = sites[-1].to(partial(Tensor.to, device="meta"))
            shape_of = on_meta.unconstrained_shape
            value = on_meta.bijection(torch.empty(shape_of, dtype=dtype, device="meta"))
            if value.shape != shape:
                where, got = f"site '{site['name']}'", tuple(value.shape)
                raise ValueError(f"{where}: expected values of shape {tuple(shape)}, got {got}")
        arguments = {key: from_plain(value, device) for key, value in plain["arguments"].items()}
        return cls(Latents(sites), arguments, tuple(plain["observed"]), device)


def to_plain(name: str, value: Any) -> Any:
    """A support or an argument of a guide as plain data; ``name`` is for errors."""
    if type(value) in _CLASS_TO_NAME:
        bounds = {key: to_plain(name, bound) for key, bound in vars(value).items()}
        return {"support": _CLASS_TO_NAME[type(value)], "bounds": bounds}
    if isinstance(value, constraints.Constraint):
        wanted, got = ", ".join(_NAME_TO_CLASS), type(value).__name__.lstrip("_")
        raise ValueError(f"{name} cannot be written to a file: expected one of {wanted}, got {got}")
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if not callable(value):
        return value
    kind = getattr(value, "__name__", type(value).__name__)
    for owner, functions in _FUNCTIONS.items():
        if value is getattr(functions, kind, None):
            return {"function": kind, "owner": owner}
    if type(value) in (TiltedSiLU, getattr(activation, kind, None)):
        names = getattr(value, "__constants__", ())
        plain = {"module": kind, "constants": {key: getattr(value, key) for key in names}}
        if repr(from_plain(plain)) == repr(value):
            return plain
    raise ValueError(
        f"{name}: expected an activation of torch.nn or a function of torch, which can be written "
        f"to a file by its name, got {value!r}; save the guide's state_dict() instead"
    )


def from_plain(plain: Any, device: torch.device | None = None) -> Any:
    """What :func:`to_plain` made plain data of, with tensors on a device."""
    match plain:
        case {"support": str(kind), "bounds": dict(bounds)}:
            given = {key: from_plain(value, device) for key, value in bounds.items()}
            return _NAME_TO_CLASS[kind](**given)
        case {"tensor": values, "dtype": str(dtype)}:
            return torch.tensor(values, dtype=getattr(torch, dtype), device=device)
        case {"function": str(kind), "owner": str(owner)}:
            return getattr(_FUNCTIONS[owner], kind)
        case {"module": str(kind), "constants": dict(constants)}:
            make = TiltedSiLU if kind == TiltedSiLU.__name__ else getattr(activation, kind)
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in make(**constants).parameters())
            if size > 2**16:
                raise ValueError(f"expected an activation, got {kind} of {size} parameters")
            return make(**constants)
    return plain


def check_size(state: State, least: int) -> None:
    """Refuses a state dict smaller than that of its guide, before memory and time go into building it."""
    # by storage: an expanded tensor declares more numbers than there are
    storages = {value.untyped_storage().data_ptr(): value for value in state.values()}
    numbers = sum(v.untyped_storage().nbytes() // v.element_size() for v in storages.values())
    if numbers < least:
        raise RuntimeError(
            "the state does not fit the sites and arguments of its guide: expected at least "
            f"{least} numbers, got {numbers}"
        )


def check_finite(state: State) -> None:
    """Refuses a state dict with NaN or infinite entries."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            bad = f"{int((~value.isfinite()).sum())} of {value.numel()} that are not"
            raise ValueError(f"parameter '{name}': expected finite numbers, got {bad}")
