# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What diagnostics and fits ask of a log density, and of a guide beyond Pyro's own interface.

Any Pyro guide will do; one that has the methods of a protocol is used through them. They are found by
``isinstance``, so a guide of a third party needs no base class. ``args`` and ``kwargs`` are the model's
arguments; ``loc``, ``scale_tril`` and draws without names are in the guide's coordinates: those from the
prior, where it has them, else the unconstrained space. Their shapes are ``(latent_dim,)``,
``(latent_dim, latent_dim)`` and ``(n, latent_dim)``; values by site have the shape ``batch + site shape``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributions import Transform

from ..graphs.markov_graph import MarkovGraph
from ..graphs.sparse_gaussian import SparseGaussian
from .coordinates import ModelPrior
from .sites import Latents


class LogDensity(Protocol):
    """A log density of the latents of a model, on the unconstrained space or in other coordinates."""

    latents: Latents

    @property
    def strategy(self) -> str:
        """How many draws are evaluated: by "plate", "vmap", "copies" or "loop"."""

    @property
    def start(self) -> Tensor:
        """A starting point, shape ``(latent_dim,)``, in the coordinates of draws."""

    def from_unconstrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of points ``(n, latent_dim)`` of the unconstrained space, and the log-determinant."""

    def __call__(self, z: Tensor) -> Tensor:
        """The log density of draws ``(n, latent_dim)``, shape ``(n,)``; NaN where the model fails."""

    def nonfinite_sites(self, z: Tensor) -> list[str]:
        """The sites whose log-density is not finite at one of the draws ``(n, latent_dim)``."""


@runtime_checkable
class ReparametrizedGuide(Protocol):
    """A guide with draws in its coordinates, and their density there."""

    def rsample_and_log_prob(self, n: int, path: bool = False) -> tuple[Tensor, Tensor]:
        """Reparametrized draws and their log-densities ``(n,)``, with gradients.

        :param path: whether the gradient of the log-density flows through the draws only.
        """


@runtime_checkable
class TransformedGuide(Protocol):
    """A guide that is a transformed standard normal, as Pyro's Gaussian and flow autoguides are."""

    def get_transform(self, *args: object, **kwargs: object) -> Transform:
        """That from a standard normal; a ``NotImplementedError`` where there is none, as in Pyro."""


@runtime_checkable
class FlowGuide(ReparametrizedGuide, Protocol):
    """A guide that a fit initializes and trains by the path gradient: those of this package."""

    def start_at(self, loc: Tensor, scale_tril: Tensor | None = None) -> None:
        """Becomes a Gaussian, by default of a new guide's scale; a ``ValueError`` if it cannot have it."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, as those of a module, with those of its coordinates."""


@runtime_checkable
class PriorGuide(Protocol):
    """A guide that holds its model's prior; the draws of a flow guide are in the coordinates of it."""

    prior: ModelPrior
    transform: Any  #: from a standard normal to these draws, a torch transform


@runtime_checkable
class StructuredGuide(FlowGuide, Protocol):
    """A guide with the Markov graph of the posterior, of so many latents that no matrix is dense."""

    def markov_graph(self) -> MarkovGraph:
        """Which coordinates depend on each other given all others, and the order they are drawn in."""

    def start_at_gaussian(self, gaussian: SparseGaussian) -> None:
        """Becomes a Gaussian along the elimination of :meth:`markov_graph`, or the nearest it can be."""

    def missing_over_batches(
        self, batches: Sequence[tuple[tuple[object, ...], Mapping[str, object]]]
    ) -> list[str]:
        """Dependencies of the posterior, in words, that draws of the guide show and the graph lacks.

        :param batches: the ``args`` and ``kwargs`` of some mini-batches, or those of all data alone.
        """


@runtime_checkable
class MinibatchGuide(Protocol):
    """A guide of the elements of a mini-batch, such as ``AutoAmortized``."""

    @property
    def needs_indices(self) -> bool:
        """Whether elements are looked up by indices that nobody gives, so that batches need them."""

    def path_gradient(self) -> AbstractContextManager[None]:
        """A context in which the density of the guide's draws has a gradient by the draws only."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def start_near(self, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Starts near draws ``(n,) + site shape`` of one mini-batch, which is a share of all elements.

        Draws in coordinates of the prior are taken to the supports by the sites' bijections alone.
        """

    #: a ``ModelPrior`` with ``coordinates_of(latents)``: those of a mini-batch's latents
    prior: Any

    def center_at(self, u: Tensor | None, log_joint: Any, share: float) -> float:
        """Sets lambda by the curvature at draws, or to 1: returns the largest change."""


@runtime_checkable
class ScaledSteps(Protocol):
    """A guide with a factor for each parameter whose steps are not in its units, which broadcasts to it."""

    def step_scales(self) -> Mapping[nn.Parameter, Tensor]: ...


@runtime_checkable
class SetUpGuide(Protocol):
    """A guide that runs its model, unless that is done already, to learn its latents without drawing."""

    def set_up(self, *args: object, **kwargs: object) -> None: ...


@runtime_checkable
class StoredGuide(Protocol):
    """A guide that, while new, deletes what another of its name, now gone, left in Pyro's param store."""

    def drop_orphans(self) -> None: ...


@runtime_checkable
class PosteriorGuide(Protocol):
    """A guide with draws of all sites, each ``(n,) + site shape``; arguments where it is amortized."""

    def sample_posterior(self, n: int, *args: object, **kwargs: object) -> dict[str, Tensor]: ...
