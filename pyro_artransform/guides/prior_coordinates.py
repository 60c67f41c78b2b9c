# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides whose flow is in coordinates of the model's own prior, and the last layer of these."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from pyro import poutine
from torch import Tensor, nn

from ..arguments import asks_for_data
from ..joint import LogJoint
from ..joint.coordinates import Coordinates, coordinates_at
from ..joint.density import Args, Kwargs
from ..joint.sites import Latents
from ..transforms import FlowModule
from .persistence.persistent_guide import PersistentGuide
from .persistence.spec import Arguments, GuideSpec
from .prototype import Traces

CoordinatesArgument = str | Mapping[str, Any]


class PriorCoordinates(FlowModule):
    """From coordinates of the prior to the unconstrained space: see ``joint.coordinates``.

    It runs the model, whose log joint density :meth:`bind` gives it. No gradient flows to lambda and to the
    unit, which are parameters so that files and the param store hold them.

    :param like: a vector of all latents.
    """

    def __init__(self, with_location: Mapping[str, bool], like: Tensor) -> None:
        super().__init__()
        self.centered, self.unit = (nn.Parameter(torch.ones_like(like)) for _ in range(2))
        self.with_location = dict(with_location)
        self._log_joint: LogJoint | None = None

    @property
    def coordinates(self) -> Coordinates:
        """Which latents, and how centred now."""
        return Coordinates(self.centered, self.unit, self.with_location)

    def bind(self, log_joint: LogJoint) -> None:
        """Takes the log joint density of the model for the arguments of the next calls."""
        self._log_joint = log_joint.with_coordinates(self.coordinates)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found, ladj = self._bound().to_unconstrained(x.reshape(-1, x.shape[-1]))
        return found.reshape(x.shape), ladj.reshape(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        found, ladj = self._bound().from_unconstrained(y.reshape(-1, y.shape[-1]))
        return found.reshape(y.shape), ladj.reshape(y.shape[:-1])

    def _bound(self) -> LogJoint:
        if self._log_joint is None:
            raise RuntimeError("expected guide.get_transform(), which binds the model, before this")
        return self._log_joint

    def extra_repr(self) -> str:
        return ", ".join(self.with_location)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_log_joint": None}


def prior_layer(spec: GuideSpec, start: Tensor) -> PriorCoordinates | None:
    """The last layer of a guide of this specification, if it has coordinates from the prior."""
    with_location = spec.arguments.get("coordinates")
    if not with_location:
        return None
    if unknown := sorted(with_location.keys() - spec.latents.sites.keys()):
        raise ValueError(
            f"coordinates: expected sites of {list(spec.latents.sites)}, got {unknown}"
        )
    return PriorCoordinates(with_location, start)


class GuideInCoordinates(PersistentGuide):
    """A guide that draws in coordinates of the prior, where the prior of a latent depends on others."""

    asked: CoordinatesArgument  #: the argument ``coordinates``
    _found_arguments: ClassVar[tuple[str, ...]] = ("coordinates", "chooses_coordinates")
    _functions = (*PersistentGuide._functions, "_bound")
    _traces: Traces | None = None  # two runs of the model, while the guide is set up
    # the model's log joint density for the arguments of the last call, where draws need the model
    _bound: LogJoint | None = None
    # the last layer in a tuple: as a part of the transform it is registered already
    _prior: tuple[PriorCoordinates, ...] = ()

    @property
    def prior_coordinates(self) -> Coordinates | None:
        """The coordinates that fits work in; None where they are the unconstrained space."""
        self._checked_spec()
        return self._prior[0].coordinates if self._prior else None

    def centered_by_site(self) -> dict[str, Tensor]:
        """lambda by site, of its unconstrained shape; empty without coordinates from the prior."""
        found = self.prior_coordinates
        sites = {} if found is None else found.of_sites(self._checked_spec().latents)
        return {name: site.centered.clone() for name, site in sites.items()}

    @property
    def maps_priors(self) -> bool:
        """Whether there may be coordinates from the prior: not with ``coordinates="model"``."""
        return self._checked_spec().arguments.get("coordinates") != {}

    @property
    def chooses_coordinates(self) -> bool:
        """Whether a fit chooses how centred they are: not where the user has said it."""
        return bool(self._checked_spec().arguments.get("chooses_coordinates"))

    def _log_joint(self, *args: object, **kwargs: object) -> LogJoint:
        """The log density of the model, whose runs leave no trace and take no random numbers."""
        self.model  # noqa: B018 (raises where there is none)
        with torch.random.fork_rng(devices=[]), poutine.block():
            start, traces = self._model[2], self._traces
            return LogJoint(self._model[1], args, kwargs, init_loc_fn=start, traces=traces)

    def _bind(self, args: Args, kwargs: Kwargs) -> LogJoint:
        """Gives the last layer the model at these arguments, by default those of the last call."""
        model = self._model and self._model[1]
        if self._bound is None or self._bound.model is not model:
            wanted = "the model's arguments with the first call, as in sample_posterior(n, *data)"
            of_file = "coordinates from the prior, which the model says at its data, and no file has these"
            with asks_for_data(args, kwargs, f"expected {wanted}: this guide has {of_file}"):
                self._bound = self._log_joint(*args, **kwargs)
        elif args or kwargs:
            self._bound = self._bound.bound_to(args, kwargs)
        self._prior[0].bind(self._bound)
        return self._bound

    def log_joint_of(self, model: object, args: Args, kwargs: Kwargs) -> LogJoint | None:
        """See :class:`~pyro_artransform.joint.protocols.PriorGuide`."""
        if self._bound is None or self._bound.model is not model:
            return None
        return self._bound.with_arguments(args, kwargs)

    def _found_in_model(self, args: Args, kwargs: Kwargs, depends: bool) -> Arguments:
        """Arguments of the specification that the density of the model says; see :meth:`_mapped_sites`."""
        found = self._mapped_sites(args, kwargs, depends)
        return self._coordinate_arguments(dict.fromkeys(found, True))

    def _coordinate_arguments(self, with_location: dict[str, bool]) -> Arguments:
        if not (with_location or self.asked == "model"):
            return {}
        return {"coordinates": with_location, "chooses_coordinates": self.asked == "prior"}

    def _mapped_sites(self, args: Args, kwargs: Kwargs, depends: bool) -> dict[str, bool]:
        """The sites with coordinates from the prior, and whether this depends on other latents.

        :param depends: whether the prior of some latent was seen to depend on others.
        """
        if self.asked == "model" or not (depends or isinstance(self.asked, Mapping)):
            return {}
        self._bound = self._log_joint(*args, **kwargs)
        with torch.random.fork_rng(devices=[]), poutine.block():
            found = self._bound.mapped_sites()
        if isinstance(self.asked, Mapping):
            unknown = sorted(self.asked.keys() - found.keys())
            if unknown:
                raise ValueError(
                    "coordinates: expected latents whose prior has a location or a scale that depends "
                    f"on other latents, or a shape to be made normal, {list(found)}, got {unknown}"
                )
            found = {name: found[name] for name in found if name in self.asked}
        return found

    def _center_as_asked(self, latents: Latents) -> None:
        parts = latents.views(self._prior[0].centered)
        for name, value in cast(Mapping[str, Tensor], self.asked).items():
            try:
                parts[name].copy_(value)
            except RuntimeError as error:
                raise ValueError(
                    f"coordinates['{name}']: expected a number, or some that broadcast to shape "
                    f"{tuple(parts[name].shape)}, got shape {tuple(value.shape)}"
                ) from error

    def _colors(self) -> Tensor | None:
        """Labels ``(latent_dim,)`` of latents whose curvatures can be told apart when they move at once."""
        return None

    def _start_coordinates(self, start: Tensor) -> Tensor:
        """Sets lambda as asked for, or by the curvature at a start, and returns this in coordinates."""
        prior, log_joint = self._prior[0], cast(LogJoint, self._bound)
        with torch.random.fork_rng(devices=[]), poutine.block(), torch.no_grad():
            if isinstance(self.asked, Mapping):
                prior.unit.copy_(log_joint.prior_scales(log_joint.or_origin(start)))
                self._center_as_asked(log_joint.latents)
            else:
                found = coordinates_at(log_joint, prior.coordinates, start[None], self._colors())
                prior.unit.copy_(found.unit)
                prior.centered.copy_(found.centered)
            mapped = log_joint.with_coordinates(prior.coordinates)
            return mapped.from_unconstrained(start[None])[0][0]


def check_coordinates(coordinates: CoordinatesArgument) -> CoordinatesArgument:
    """The argument ``coordinates`` of a guide, with numbers as tensors.

    :raises ValueError: if it is neither "prior", "model" nor a mapping of sites to numbers from 0 to 1.
    """
    if isinstance(coordinates, str) and coordinates in ("prior", "model"):
        return coordinates
    if isinstance(coordinates, Mapping):
        given = {name: torch.as_tensor(value) for name, value in coordinates.items()}
        if all(bool(((value >= 0) & (value <= 1)).all()) for value in given.values()):
            return given
    raise ValueError(
        "coordinates: expected 'prior', 'model', or a mapping of sites to how centred they are, between 0 "
        f"(in units of the prior) and 1 (as the model is written), got {coordinates!r}"
    )
