# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a guide holds of its model's prior: coordinates of the latents, and the density that says them."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor

from ..arguments import asks_for_data
from .coordinates import coordinates_at
from .prior_map import Coordinates
from .sites import Latents, LatentSpace

CoordinatesArgument = str | Mapping[str, Any]


class ModelPrior:
    """The coordinates of a guide from its model's prior, and the model's log joint density.

    :param asked: the argument ``coordinates`` of a guide: "prior", "model", or a mapping of sites to numbers
        from 0 to 1.
    """

    space: LatentSpace  #: the latents, and their coordinates, from :meth:`set_up` on

    def __init__(self, asked: CoordinatesArgument) -> None:
        self.asked = _checked(asked)
        self.is_chosen = False  #: whether a fit may change how centred they are, in place
        self.is_wanted = True  #: whether chains may have them: not with ``coordinates="model"``
        self.log_joint: Any = None  #: on the unconstrained space, see :meth:`bind`
        self._arguments: tuple[Any, Any] = (), {}

    @property
    def coordinates(self) -> Coordinates | None:
        """Those that a fit works in; None where they are the unconstrained space."""
        return self.space.coordinates

    def set_up(self, arguments: Mapping[str, Any], latents: Latents, like: Tensor) -> None:
        """Makes the coordinates of a specification's arguments, for vectors like this one."""
        with_location, coordinates = arguments.get("coordinates"), None
        self.is_wanted = with_location != {}
        self.is_chosen = bool(arguments.get("chooses_coordinates"))
        if with_location:
            if unknown := sorted(with_location.keys() - latents.sites.keys()):
                expected = f"expected sites of {list(latents.sites)}"
                raise ValueError(f"coordinates: {expected}, got {unknown}")
            ones = torch.ones_like(like)
            coordinates = Coordinates(ones, ones.clone(), with_location)
        self.space = LatentSpace(latents, coordinates)

    def arguments_of(self, with_location: dict[str, bool]) -> dict[str, Any]:
        """The arguments of a specification that :meth:`set_up` reads."""
        if not (with_location or self.asked == "model"):
            return {}
        return {"coordinates": with_location, "chooses_coordinates": self.asked == "prior"}

    def bind(self, model: Any, make: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Takes the model at these arguments, by default those before.

        :param make: makes the log joint density of the model from its arguments.
        """
        if self.log_joint is None or self.log_joint.model is not model:
            wanted = "the model's arguments with the first call, as in sample_posterior(n, *data)"
            of_file = "coordinates from the prior, which the model says at its data, and no file has these"
            with asks_for_data(args, kwargs, f"expected {wanted}: this guide has {of_file}"):
                self.log_joint = make(*args, **kwargs)
        elif not (args or kwargs):
            return
        self._arguments = args, kwargs

    def run(self) -> object:
        """Runs the model at the arguments of :meth:`bind`."""
        args, kwargs = self._arguments
        return self.log_joint.model(*args, **kwargs)

    @property
    def density(self) -> Any:
        """The log joint density at the arguments of :meth:`bind`, in the coordinates."""
        return self.log_joint.bound_to(*self._arguments).with_coordinates(self.coordinates)

    def log_joint_of(self, model: object, args: Any, kwargs: Any) -> Any:
        """The log joint density at these arguments; None of another model."""
        is_own = self.log_joint is not None and self.log_joint.model is model
        return self.log_joint.with_arguments(args, kwargs) if is_own else None

    def find_sites(self) -> dict[str, bool]:
        """The sites with coordinates from the prior, and whether it depends on other latents."""
        with torch.random.fork_rng(devices=[]), poutine.block():
            found: dict[str, bool] = self.log_joint.mapped_sites()
        if isinstance(self.asked, Mapping):
            if unknown := sorted(self.asked.keys() - found.keys()):
                raise ValueError(
                    "coordinates: expected latents whose prior has a location or a scale that depends "
                    f"on other latents, or a shape to be made normal, {list(found)}, got {unknown}"
                )
            found = {name: found[name] for name in found if name in self.asked}
        return found

    def center_as_asked(self, latents: Latents) -> None:
        """Sets lambda to the numbers of the user."""
        given = cast(Coordinates, self.coordinates)
        centered = torch.ones_like(given.centered)
        parts = latents.views(centered)
        for name, value in cast(Mapping[str, Tensor], self.asked).items():
            try:
                parts[name].copy_(value)
            except RuntimeError as error:
                raise ValueError(
                    f"coordinates['{name}']: expected a number, or some that broadcast to shape "
                    f"{tuple(parts[name].shape)}, got shape {tuple(value.shape)}"
                ) from error
        given.set_(centered)

    @torch.no_grad()
    def start_at(self, start: Tensor, together: Tensor | None) -> Tensor:
        """Sets lambda as asked for, or by the curvature at a start, and returns this in coordinates.

        :param start: on the unconstrained space, shape ``(latent_dim,)``.
        :param together: see :func:`~pyro_artransform.joint.coordinates.centered_by_curvature`.
        """
        log_joint, given = self.log_joint, cast(Coordinates, self.coordinates)
        with torch.random.fork_rng(devices=[]), poutine.block():
            near = log_joint.or_origin(start)
            if isinstance(self.asked, Mapping):
                given.set_(given.centered, log_joint.prior_scales(near))
                self.center_as_asked(log_joint.latents)
            else:
                found = coordinates_at(log_joint, given, near[None], together)
                given.set_(found.centered, found.unit)
            return log_joint.with_coordinates(given).from_unconstrained(start[None])[0][0]

    def __getstate__(self) -> dict[str, Any]:
        # a pickle has neither the model nor its data
        return {**self.__dict__, "log_joint": None, "_arguments": ((), {})}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelPrior":
        twin = type(self)(self.asked)
        twin.__dict__.update(self.__dict__)
        if hasattr(self, "space"):
            twin.space = deepcopy(self.space, memo)
        return twin


def _checked(coordinates: CoordinatesArgument) -> CoordinatesArgument:
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
