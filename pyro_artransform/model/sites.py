# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The continuous latent sites of a model, their supports, and their packing into one vector."""

import copy
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, is_validation_enabled
from pyro.distributions.constraints import Constraint
from pyro.distributions.util import broadcast_shape
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import ComposeTransform, IndependentTransform, Transform, biject_to

from .._base.arguments import shown, to_tensor, values_can_be_read
from .coordinates.families import is_identity_or_exp
from .traces import is_enumerated, latent_nodes, support_of_latent, unwrapped


@dataclass(frozen=True, eq=False)
class Site:
    """A continuous latent site of a model, without its distribution.

    :param shape: the shape of the value, event dimensions last.
    :param event_dim: the number of event dimensions.
    :param plates: the frames of enclosing plates, as in Pyro's traces.
    """

    name: str
    shape: torch.Size
    event_dim: int
    support: Constraint
    dtype: torch.dtype
    plates: tuple[CondIndepStackFrame, ...] = ()

    @classmethod
    def from_node(cls, node: Any) -> "Site":
        """Makes a site from a trace node, with the bounds of its support detached."""
        fn, value = node["fn"], node["value"]
        support, plates = map_bounds(support_of_latent(fn), Tensor.detach), node["cond_indep_stack"]
        return cls(node["name"], value.shape, fn.event_dim, support, value.dtype, plates)

    @cached_property
    def bijection(self) -> Transform:
        """Pyro's bijection from the unconstrained space onto the support."""
        return bijection_onto(self.support, self.name)

    @cached_property
    def unconstrained_shape(self) -> torch.Size:
        """The shape of the value on the unconstrained space."""
        bijection = self.bijection
        if bijection.domain.event_dim == bijection.codomain.event_dim == 0:
            return torch.Size(self.shape)  # inverse_shape imports SymPy
        return torch.Size(bijection.inverse_shape(self.shape))

    @cached_property
    def unconstrained_event_dim(self) -> int:
        """The number of event dimensions of the value on the unconstrained space."""
        return len(self.unconstrained_shape) - len(self.batch_shape)

    @cached_property
    def is_unconstrained(self) -> bool:
        """Whether the bijection is the identity."""
        bijection = self.bijection
        while isinstance(bijection, IndependentTransform):
            bijection = bijection.base_transform
        return isinstance(bijection, ComposeTransform) and not bijection.parts

    @property
    def size(self) -> int:
        """The number of coordinates of this site in the latent vector."""
        return self.unconstrained_shape.numel()

    @property
    def batch_shape(self) -> torch.Size:
        """The shape without the event dimensions."""
        return self.shape[: len(self.shape) - self.event_dim]

    def constrain_with_ladj(
        self, part: Tensor, batch: torch.Size | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps ``batch + unconstrained_shape`` to the value; returns log-determinants ``batch``, too."""
        if batch is None:
            batch = part.shape[: part.dim() - self.unconstrained_event_dim]
        value = self.bijection(part)
        ladj = self.bijection.log_abs_det_jacobian(part, value)
        return value, ladj.reshape((*batch, -1)).sum(-1)

    def to(self, fn: Callable[[Tensor], Tensor]) -> "Site":
        """Converts the dtype and the bounds of the support, for example by ``Tensor.double``."""
        dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return replace(self, support=map_bounds(self.support, fn), dtype=dtype)


class Latents:
    """The continuous latents of a model in one vector.

    Sites, at least one, follow the order of the model's trace; each is mapped to the unconstrained space by
    Pyro's ``biject_to`` and flattened, as in Pyro's ``AutoContinuous``.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self.sites = {site.name: site for site in sites}
        if not self.sites:
            raise ValueError("the model has no continuous latent: expected at least one")
        self.event_dims = {name: site.event_dim for name, site in self.sites.items()}
        self.sizes = [site.size for site in self.sites.values()]
        self.latent_dim = sum(self.sizes)
        #: machine epsilon of the coarsest dtype
        self.eps = max(torch.finfo(site.dtype).eps for site in self.sites.values())

    @classmethod
    def from_trace(cls, trace: poutine.Trace) -> "Latents":
        """The latents of a trace, without discrete ones, which must be enumerated in parallel."""
        sites = []
        for node in latent_nodes(trace):
            if is_enumerated(node):  # a sampled one would make the density random
                how, count = node["infer"]["enumerate"], node["infer"].get("num_samples")
                if how == "parallel" and count is None:
                    continue
                got = f"'{how}'" if count is None else f"num_samples={count}"
                raise ValueError(
                    f"site '{node['name']}': expected parallel enumeration over all of its values, as marked "
                    f"by pyro.infer.config_enumerate(model), got {got}"
                )
            if node["fn"].support.is_discrete:
                raise ValueError(
                    f"site '{node['name']}' is a discrete latent; if it is data, pass it as obs=, otherwise "
                    "mark it by pyro.infer.config_enumerate(model), to be summed out"
                )
            check_continuous(node)
            sites.append(Site.from_node(node))
        return cls(sites)

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """Splits z ``batch + (latent_dim,)`` into ``batch + unconstrained shape``, in the sites' dtypes."""
        return {name: part.to(self.sites[name].dtype) for name, part in self.views(z).items()}

    def views(self, z: Tensor) -> dict[str, Tensor]:
        """Like :meth:`split`, in the dtype of z; parts of a contiguous vector are views into it."""
        parts = zip(self.sites.values(), z.split(self.sizes, -1))
        return {s.name: part.reshape(z.shape[:-1] + s.unconstrained_shape) for s, part in parts}

    def place(self, z: Tensor) -> dict[str, Tensor]:
        """Like :meth:`split`, with batch dimensions of z aligned with the plates around a guide."""
        placed = {}
        for site, part in zip(self.sites.values(), z.split(self.sizes, -1)):
            ones = z.shape[:-1] + (1,) * site.unconstrained_event_dim
            shape = broadcast_shape(site.unconstrained_shape, ones)  # many times as fast as torch's
            placed[site.name] = part.reshape(shape).to(site.dtype)
        return placed

    def elements_of(self, frame: CondIndepStackFrame) -> Tensor:
        """The plate element of each coordinate, shape ``(latent_dim,)``; -1 outside of the plate."""
        parts = []
        for site in self.sites.values():
            shape = site.unconstrained_shape
            found = torch.full(shape, -1, dtype=torch.long, device="cpu")
            if frame in site.plates and frame.dim is not None:
                num_right = len(shape) - len(site.batch_shape) - frame.dim - 1
                index = torch.arange(frame.size, device="cpu").reshape(-1, *(1,) * num_right)
                found = index.expand(shape)
            parts.append(found.reshape(-1))
        return torch.cat(parts)

    def name_of(self, coordinate: int) -> str:
        """The site and index of a coordinate of the vector, such as ``z[3, 1]``."""
        for site in self.split(torch.arange(self.latent_dim, device="cpu") == coordinate).items():
            if (place := site[1] > 0).any():
                return f"{site[0]}{place.nonzero()[0].tolist() or ''}"
        raise IndexError(coordinate)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Maps z ``batch + (latent_dim,)`` to the value of each site, ``batch + site shape``."""
        return {name: self.sites[name].bijection(part) for name, part in self.split(z).items()}

    def constrain_with_ladj(
        self, z: Tensor, left_out: Container[str] = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Like :meth:`constrain`, with the log-determinant.

        :param left_out: sites to leave on the unconstrained space.
        :return: values by site, ``batch + site shape``, and log-determinants ``batch``.
        """
        batch = z.shape[:-1]
        values, total = {}, z.new_zeros(batch)
        for name, part in self.split(z).items():
            site = self.sites[name]
            values[name] = part
            if not (site.is_unconstrained or name in left_out):
                values[name], ladj = site.constrain_with_ladj(part, batch)
                total = total + ladj
        return values, total

    def to_sites(
        self, parts: Mapping[str, Tensor], left_out: Container[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The value of each site of :meth:`place`, and the log-determinant, of its batch shape."""
        values, ladjs = dict(parts), dict[str, Tensor]()
        for name, site in self.sites.items():
            if name not in left_out:
                values[name], ladjs[name] = site.constrain_with_ladj(parts[name])
        return values, ladjs

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Maps values ``batch + site shape``, bounds included, to the vector ``batch + (latent_dim,)``."""
        given, batch = self._check_values(values, None)
        parts = [self.sites[k].bijection.inv(v).reshape((*batch, -1)) for k, v in given.items()]
        return torch.cat(parts, -1)

    def unconstrain_with_ladj(
        self, values: Mapping[str, Any], device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps a user's values to the latent vector, with the log-determinant of :meth:`constrain`.

        At the edge of a support, where the density of the latents is zero, returns 0 and infinity.

        :param values: values by site, ``batch + site shape``; arrays and lists become tensors of its dtype.
        :param device: the device of these tensors.
        :raises ValueError: if a site is missing or unknown, or a value has the wrong shape or, with Pyro's
            validation on, is outside its support.
        """
        given, batch = self._check_values(values, device)
        if not batch.numel():
            # torch's bijections and supports fail on empty tensors
            zeros = next(iter(given.values())).new_zeros((*batch, self.latent_dim))
            return zeros, zeros.sum(-1)
        latents, ladjs = [], []
        for name, site in self.sites.items():
            value = given[name]
            if is_validation_enabled() and values_can_be_read(value):
                inside = site.support.check(value)
                if not inside.all():
                    raise ValueError(
                        f"values: expected '{name}' inside its support {site.support}, got "
                        f"{shown(value[~inside][0].tolist())}"
                    )
            z = site.bijection.inv(value)
            latents.append(z.reshape((*batch, -1)))
            ladjs.append(site.bijection.log_abs_det_jacobian(z, value).reshape((*batch, -1)))
        z, total = torch.cat(latents, -1), torch.cat(ladjs, -1).sum(-1)
        at_edge = z.isinf().any(-1)
        return z.masked_fill(at_edge[..., None], 0.0), total.masked_fill(at_edge, torch.inf)

    def _check_values(
        self, values: Mapping[str, Any], device: torch.device | None
    ) -> tuple[dict[str, Tensor], torch.Size]:
        """The values as tensors by site, and their common batch shape."""
        if values.keys() != self.sites.keys():
            raise ValueError(
                f"values: expected the sites {sorted(self.sites)}, got {sorted(values)}"
            )
        given: dict[str, Tensor] = {}
        batch = torch.Size()
        for name, site in self.sites.items():
            like = torch.empty(0, dtype=site.dtype, device=device)
            value = to_tensor(f"values['{name}']", values[name], like)
            if not given:
                batch = value.shape[: max(value.dim() - len(site.shape), 0)]
            given[name] = value
            expected, got = tuple(batch + site.shape), tuple(value.shape)
            if expected != got:
                raise ValueError(f"values: expected '{name}' of shape {expected}, got {got}")
        return given, batch


def check_continuous(site: Any) -> None:
    """Rejects a latent without a density on the reals: a Delta, or a support without a bijection."""
    if isinstance(unwrapped(site["fn"]), Delta):
        raise ValueError(
            f"site '{site['name']}' is a Delta, which is a value, not a latent: expected it to be written as "
            f"pyro.deterministic('{site['name']}', ...)"
        )
    bijection_onto(support_of_latent(site["fn"]), site["name"])


def bijection_onto(support: Any, name: str) -> Transform:
    """Pyro's bijection from the unconstrained space onto the support of site ``name``."""
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"site '{name}': expected a support with a bijection from the reals onto it "
            f"(torch.distributions.biject_to), got {support}, which has none. Write a covariance matrix as "
            "scales and LKJCholesky, a mixture as a Categorical that is enumerated, a direction as a "
            "ProjectedNormal with ProjectedNormalReparam (pyro.infer.reparam)"
        ) from error


def initial_value(init_loc_fn: Callable[[Any], Tensor], site: Any) -> Tensor:
    """The initial value of a latent: a draw if it is discrete, the origin if its prior is improper."""
    if is_enumerated(site) or site["fn"].support.is_discrete:
        return torch.as_tensor(site["fn"].sample())
    try:
        return _rows_of_minibatch(init_loc_fn(site), site)
    except NotImplementedError:  # an improper prior has no median either
        bijection = bijection_onto(support_of_latent(site["fn"]), site["name"])
        shape = bijection.inverse_shape(site["fn"].shape())
        # None: PyTorch 2.9 and older cannot name the default device after a reset
        origin = torch.zeros(shape, dtype=torch.get_default_dtype(), device=None)
        return torch.as_tensor(bijection(origin))


def _rows_of_minibatch(value: Tensor, site: Any) -> Tensor:
    """Selects the mini-batch from a value that has a row for each element of a subsampled plate."""
    entered = {each.name: each for each in _PYRO_STACK if isinstance(each, pyro.plate)}
    event_dim = site["fn"].event_dim
    for frame in site["cond_indep_stack"]:
        dim = (frame.dim or 0) - event_dim
        is_whole = value.dim() >= -dim and value.shape[dim] == frame.full_size != frame.size
        if is_whole and frame.name in entered:
            value = value.index_select(dim, entered[frame.name].indices.to(value.device))
    return value


def map_bounds(support: Constraint, fn: Callable[[Tensor], Tensor]) -> Constraint:
    """A copy of a support with a function applied to each tensor in it."""
    changed = copy.copy(support)
    for key, value in vars(support).items():
        if isinstance(value, Tensor):
            setattr(changed, key, fn(value))
        elif isinstance(value, Constraint):
            setattr(changed, key, map_bounds(value, fn))
    return changed


#: the error for a support that depends on other latents
SUPPORT_DEPENDS = (
    "the support of site '{name}' depends on other latents: expected one support, got "
    "{expected} and {got}. Draw it on a fixed scale and transform it: instead of x ~ Uniform(0, a), "
    "u ~ Uniform(0, 1) and pyro.deterministic('x', a * u)"
)


def same_support(a: Any, b: Any) -> bool:
    """Whether two supports have the same type and equal bounds; recurses into bounds."""
    if isinstance(a, Constraint):
        return type(a) is type(b) and same_support(sorted(vars(a).items()), sorted(vars(b).items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_support, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    same = a == b
    return bool(same.all() if isinstance(same, Tensor) else same)


class Rounding(NamedTuple):
    """Sites whose draws lose digits, or are cut off."""

    coarse: list[str]  #: sites whose sds are below two spacings of their dtype
    at_edge: list[str]  #: sites of whose draws some reach the edge of what their dtype holds


def find_rounding(latents: Latents, z: Tensor) -> Rounding:
    """The sites that the dtype of their draws ``(n, latent_dim)`` can hardly hold.

    Draws are coarse near the edge of a support. Sites with more or fewer values than coordinates, such as
    simplices, are not checked for that: a value may be constant. At the edge of a dtype, ``exp`` is zero, or
    a logistic function is one, so that the rest of a posterior is cut off.
    """
    found, parts = Rounding([], []), latents.split(z)
    for name, value in latents.constrain(z).items():
        site, part, values = latents.sites[name], parts[name], value.reshape(len(z), -1)
        spacing = torch.finfo(value.dtype).eps * values.abs().mean(0)
        if values.shape[1] == site.size and (values.std(0) < 2 * spacing).any():
            found.coarse.append(name)
        if site.is_unconstrained or not part.numel():
            continue
        is_at_edge = part < math.log(torch.finfo(part.dtype).tiny) + 5.0
        if not is_identity_or_exp(site.bijection):
            is_at_edge = is_at_edge | (part > -math.log(torch.finfo(part.dtype).eps))
        if bool((is_at_edge.double().mean(0) > 0.005).any()):
            found.at_edge.append(name)
    return found
