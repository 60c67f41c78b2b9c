# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What diagnostics and fits use of a guide beyond Pyro's interface, if it inherits from these classes.

Any Pyro guide works. ``args`` and ``kwargs`` are the model's arguments; ``loc``, ``scale_tril`` and unnamed
draws are in the guide's coordinates: from the prior if it has such, else the unconstrained space. Their
shapes are ``(latent_dim,)``, ``(latent_dim, latent_dim)`` and ``(n, latent_dim)``; values by site have the
shape ``batch + site shape``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from torch import Tensor, nn

from .density import Args, Kwargs, LogJoint
from .elements import ElementTerms
from .graphs.element_precision import ElementGaussian
from .graphs.markov_graph import MarkovGraph
from .graphs.sparse_gaussian import SparseGaussian
from .run_once import run_once


class FlowGuide:
    """A guide that a fit initializes and trains by path gradients; the first two methods suffice."""

    coordinates: Any = None  #: its ``Coordinates``, in which it draws; None before the first call
    chooses_coordinates = False  #: whether a fit may change lambda, in place
    maps_priors = True  #: False if the user asks for the model's coordinates
    parameters: Callable[[], Iterator[nn.Parameter]]  #: like a module's

    def rsample_and_log_prob(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Reparametrized draws ``(n, latent_dim)`` and their log densities ``(n,)``, with gradients.

        :param path: whether the gradient of the log density flows through the draws only.
        """
        raise NotImplementedError

    def start_at(self, loc: Any, scale_tril: Any = None) -> None:
        """Becomes a Gaussian, by default of a new guide's scale; raises ``ValueError`` if it cannot."""
        raise NotImplementedError

    def set_up(self, *args: object, **kwargs: object) -> None:
        """Learns its latents, if this is the first call."""
        run_once(cast(Any, self), args, kwargs, validated=True)

    def log_joint_of(self, model: object, args: Args, kwargs: Kwargs) -> LogJoint | None:
        """The log joint density that the guide knows, at these arguments; None for another model."""
        return None

    def step_scales(self) -> Mapping[nn.Parameter, Tensor]:
        """Step-size factors, broadcastable to a parameter, for parameters in other units."""
        return {}

    def drop_orphans(self) -> None:
        """While new, deletes parameters of a dead guide of its name from Pyro's param store."""

    @property
    def components(self) -> "Sequence[FlowGuide]":
        """A component for each mode of a mixture; their draws do not need its weights."""
        return [self]

    def weigh(self, log_joint: LogJoint, n: int) -> tuple[Tensor, Tensor]:
        """Sets a mixture's weights to the posterior mass of components; returns these and standard errors.

        :param log_joint: the log joint density, in the guide's coordinates; ``n`` counts draws.
        """
        raise NotImplementedError

    def log_density(self, z: Tensor) -> Tensor:
        """The log density ``(n,)`` of a mixture at points ``(n, latent_dim)``."""
        raise NotImplementedError


class StructuredGuide(FlowGuide):
    """A guide with the Markov graph of the posterior, for too many latents for dense matrices."""

    @property
    def is_of_elements(self) -> bool:
        """Whether :meth:`set_up_on` found the graph."""
        raise NotImplementedError

    def markov_graph(self) -> MarkovGraph:
        """The conditional dependencies between coordinates, and their elimination order."""
        raise NotImplementedError

    def start_at_gaussian(self, gaussian: SparseGaussian) -> None:
        """Becomes a Gaussian along the elimination of :meth:`markov_graph`, or the nearest possible one."""
        raise NotImplementedError

    def missing_over_batches(
        self, batches: Sequence[tuple[tuple[object, ...], Mapping[str, object]]]
    ) -> list[str]:
        """Describes posterior dependencies that the guide's draws reveal and the graph lacks.

        :param batches: the ``args`` and ``kwargs`` of some mini-batches, or of all data only.
        """
        raise NotImplementedError

    def set_up_on(self, terms: ElementTerms, *args: object, **kwargs: object) -> None:
        """Learns the graph of elements of plates from all mini-batches, and the latents from one."""
        raise NotImplementedError

    def start_at_elements(self, gaussian: ElementGaussian) -> None:
        """Becomes a Gaussian with the graph that :meth:`set_up_on` found."""
        raise NotImplementedError


class MinibatchGuide:
    """A guide for the elements of a mini-batch, such as ``AutoAmortized``."""

    coordinates: Any  #: of one element of each plate
    chooses_coordinates: bool
    maps_priors: bool
    parameters: Callable[[], Iterator[nn.Parameter]]
    set_up: Callable[..., None]
    step_scales: Callable[[], Mapping[nn.Parameter, Tensor]]
    drop_orphans: Callable[[], None]

    @property
    def needs_indices(self) -> bool:
        """Whether the guide looks up elements by index, so that batches must include indices."""
        raise NotImplementedError

    def path_gradient(self) -> AbstractContextManager[None]:
        """A context in which the gradient of the guide's density flows through the draws only."""
        raise NotImplementedError

    def start_near(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Starts near draws ``(n,) + site shape`` of one mini-batch with ``share`` of all elements.

        Draws in coordinates of the prior are mapped to the supports by the sites' bijections only.
        """
        raise NotImplementedError

    def center_at(self, u: Tensor | None, log_joint: Any, share: float) -> float:
        """Sets lambda by the curvature at draws, or to 1; returns the largest change."""
        raise NotImplementedError
