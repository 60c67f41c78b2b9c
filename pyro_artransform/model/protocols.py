# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Protocols that diagnostics and fits require of guides beyond Pyro's interface.

Any Pyro guide works; one that implements a protocol is used through it. Protocols are checked by
``isinstance``, so third-party guides need no base class. ``args`` and ``kwargs`` are the model's arguments;
``loc``, ``scale_tril`` and unnamed draws are in the guide's coordinates: from the prior if it has such, else
the unconstrained space. Their shapes are ``(latent_dim,)``, ``(latent_dim, latent_dim)`` and ``(n,
latent_dim)``; values by site have the shape ``batch + site shape``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from .density import Args, Kwargs, LogJoint
from .elements import ElementTerms
from .graphs.element_precision import ElementGaussian
from .graphs.markov_graph import MarkovGraph
from .graphs.sparse_gaussian import SparseGaussian


@runtime_checkable
class ReparametrizedGuide(Protocol):
    """A guide with reparametrized draws and their density, in its coordinates."""

    def rsample_and_log_prob(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Reparametrized draws ``(n, latent_dim)`` and their log densities ``(n,)``, with gradients.

        :param path: whether the gradient of the log density flows through the draws only.
        """


@runtime_checkable
class FlowGuide(ReparametrizedGuide, Protocol):
    """A guide that a fit initializes and trains by path gradients, such as this package's guides."""

    def start_at(self, loc: Tensor, scale_tril: Tensor | None = None) -> None:
        """Becomes a Gaussian, by default of a new guide's scale; raises ``ValueError`` if it cannot."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the guide, like a module's."""


@runtime_checkable
class PriorGuide(Protocol):
    """A guide with partially non-centred latents; flow guides draw in these coordinates."""

    coordinates: Any  #: its ``Coordinates``; None before the first call
    chooses_coordinates: bool  #: whether a fit may change lambda, in place
    maps_priors: bool  #: False if the user asks for the model's coordinates

    def log_joint_of(self, model: object, args: Args, kwargs: Kwargs) -> LogJoint | None:
        """The log joint density that the guide knows, at these arguments; None for another model."""


@runtime_checkable
class StructuredGuide(FlowGuide, Protocol):
    """A guide with the Markov graph of the posterior, for too many latents for dense matrices."""

    def markov_graph(self) -> MarkovGraph:
        """The conditional dependencies between coordinates, and their elimination order."""

    def start_at_gaussian(self, gaussian: SparseGaussian) -> None:
        """Becomes a Gaussian along the elimination of :meth:`markov_graph`, or the nearest possible one."""

    def missing_over_batches(
        self, batches: Sequence[tuple[tuple[object, ...], Mapping[str, object]]]
    ) -> list[str]:
        """Describes posterior dependencies that the guide's draws reveal and the graph lacks.

        :param batches: the ``args`` and ``kwargs`` of some mini-batches, or of all data only.
        """


@runtime_checkable
class GuideOfModes(FlowGuide, Protocol):
    """A mixture with a component for each mode of a posterior."""

    @property
    def components(self) -> Sequence[FlowGuide]:
        """The components; their draws do not need the weights."""

    def weigh(self, log_joint: LogJoint, n: int) -> tuple[Tensor, Tensor]:
        """Sets the weights to the posterior mass of components; returns these and standard errors.

        :param log_joint: the log joint density, in the guide's coordinates; ``n`` counts draws.
        """

    def log_density(self, z: Tensor) -> Tensor:
        """The log density ``(n,)`` at points ``(n, latent_dim)``."""


@runtime_checkable
class ElementGuide(StructuredGuide, Protocol):
    """A structured guide of elements of plates that learns its graph from mini-batches."""

    @property
    def is_of_elements(self) -> bool:
        """Whether it did so."""

    def set_up_on(self, terms: ElementTerms, *args: object, **kwargs: object) -> None:
        """Learns the graph from the terms of all mini-batches, and the latents from one."""

    def start_at_elements(self, gaussian: ElementGaussian) -> None:
        """Becomes a Gaussian with this graph."""


@runtime_checkable
class MinibatchGuide(Protocol):
    """A guide for the elements of a mini-batch, such as ``AutoAmortized``."""

    @property
    def needs_indices(self) -> bool:
        """Whether the guide looks up elements by index, so that batches must include indices."""

    def path_gradient(self) -> AbstractContextManager[None]:
        """A context in which the gradient of the guide's density flows through the draws only."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def start_near(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Starts near draws ``(n,) + site shape`` of one mini-batch with ``share`` of all elements.

        Draws in coordinates of the prior are mapped to the supports by the sites' bijections only.
        """

    coordinates: Any  #: of one element of each plate
    chooses_coordinates: bool

    def center_at(self, u: Tensor | None, log_joint: Any, share: float) -> float:
        """Sets lambda by the curvature at draws, or to 1; returns the largest change."""


@runtime_checkable
class ScaledSteps(Protocol):
    """A guide with step-size factors, broadcastable to a parameter, for parameters in other units."""

    def step_scales(self) -> Mapping[nn.Parameter, Tensor]: ...


@runtime_checkable
class SetUpGuide(Protocol):
    """A guide that can run its model once, to learn its latents without drawing."""

    def set_up(self, *args: object, **kwargs: object) -> None: ...


@runtime_checkable
class StoredGuide(Protocol):
    """A guide that, while new, deletes parameters of a dead guide of its name from Pyro's param store."""

    def drop_orphans(self) -> None: ...


@runtime_checkable
class PosteriorGuide(Protocol):
    """A guide with draws of all sites, ``(n,) + site shape``; amortized guides take arguments."""

    def sample_posterior(self, n: int, *args: object, **kwargs: object) -> dict[str, Tensor]: ...
