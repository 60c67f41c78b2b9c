# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The guide with the conditional independences of the posterior."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from ..._base.arguments import check_integer, to_tensor
from ...flows.transforms.scales_and_tails import check_location_and_scale
from ...model import LogJoint
from ...model.coordinates.centering import CoordinatesArgument
from ...model.coordinates.coordinates import Coordinates
from ...model.density import Args, Kwargs
from ...model.elements import ElementGroups, ElementTerms, elements_read
from ...model.graphs.dependencies import find_dependencies, missing_dependencies
from ...model.graphs.element_precision import ElementGaussian
from ...model.graphs.markov_graph import Elimination, MarkovGraph
from ...model.graphs.sparse_gaussian import SparseGaussian, lower_factor
from ...model.protocols import StructuredGuide
from ...model.sites import Latents
from ..autoregressive import AutoAutoregressive
from .latent_graph import LatentGraph, coordinate_names, describe, regressions
from .structured_flow import StructuredFlow

# maximum number of network outputs at once: the system reclaims tensors above 32 MB after each use, which
# took a third of a step for 10,000 latents
_MOST_NUMBERS = 5_000_000
# allowed factor of edges of a graph in coordinates of the prior (benchmarks/coordinates.md)
_MOST_FILL_IN = 3.0


class AutoStructuredFlow(AutoAutoregressive, StructuredGuide):
    r"""A guide for hundreds or thousands of latents: a flow with the posterior's graph.

    At the first call the guide detects which latents depend on each other given all others, by finite
    differences of the gradient of the model's log density. The posterior then is, exactly,

    .. math::

        p(z) = p(z_R) \prod_{i \notin R} p(z_i \mid z_{\mathrm{pa}(i)})

    with few parents pa(i): at most 5 for a volatility path of any length with three unknown parameters. Each
    factor is a location and a scale that depend on the parents by a linear function and a small network, with
    hinges for skewness and tails; many coordinates with the same parents, such as the elements of a plate,
    share its hidden units. The root block R, which is fully dependent, has the flow of
    :class:`~pyro_artransform.AutoIAF`. Coordinates that do not depend on each other are drawn in parallel: a
    chain of 1,000 latents has 10 levels, a plate 2. The number of parameters is proportional to that of
    parents.

    ``print(guide.graph)`` summarizes the dependencies. A dependency that is inactive at the first call,
    such as in a branch of ``torch.where``, is not in the graph; ``fit`` searches again at its end. A
    mini-batch has only a part of the dependencies: ``fit`` with a loader finds those of latents in plates
    in a pass over it; for others the guide must see all data once before, by ``guide.set_up(*all_data)``.

    :param model: a Pyro model.
    :param hidden_dim: the number of hidden units of the network of each latent coordinate, and a quarter of
        those of a network that many coordinates share.
    :param num_transforms: the number of layers with networks of the parents.
    :param init_loc_fn: see :class:`~pyro_artransform.AutoAutoregressive`, also for ``init_scale``.
    :param coordinates: as for :class:`~pyro_artransform.AutoAutoregressive`. With "prior" they include the
        locations of priors, or only the scales if locations would add dependencies: a sequence of states
        remains a chain.
    :raises TypeError: as for :class:`~pyro_artransform.AutoAutoregressive`.
    :raises ValueError: as for that class, and for a size that is not positive; at the first call, if the
        density of the model is random or its gradient is not finite near the initial values.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform import AutoStructuredFlow
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", 4):
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.1, 1.3, 0.7, -0.4]))
        >>> guide = AutoStructuredFlow(model)
        >>> guide.sample_posterior(5)["z"].shape
        torch.Size([5, 4])
        >>> guide.graph.root, guide.graph.parents("z", 3)
        ((('mu',),), (('mu',),))

    **References**

    1. Inference via Low-Dimensional Couplings (Spantini, Bigoni, Marzouk, 2018),
       https://arxiv.org/abs/1703.06131
    2. Faithful Inversion of Generative Models for Effective Amortized Inference (Webb, Golinski,
       Zinkov, Siddharth, Rainforth, Teh, Wood, 2018), https://arxiv.org/abs/1712.00287
    """

    _graph: LatentGraph
    _terms: ElementTerms | None = None  # of a set-up by mini-batches

    def __init__(
        self,
        model: Callable[..., object],
        *,
        hidden_dim: int = 8,
        num_transforms: int = 1,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        coordinates: CoordinatesArgument = "prior",
    ) -> None:
        super().__init__(
            model,
            flow=nn.Module,  # until the graph is known
            full_rank=False,
            init_loc_fn=init_loc_fn,
            init_scale=init_scale,
            coordinates=coordinates,
        )
        self._hidden_dim = check_integer("hidden_dim", hidden_dim)
        self._num_transforms = check_integer("num_transforms", num_transforms)

    @property
    def graph(self) -> LatentGraph:
        """The dependencies between latents and their factorization, after the first call."""
        self._known_coordinates()
        return self._graph

    def markov_graph(self) -> MarkovGraph:
        """The dependencies of the posterior, and the order of an exact factorization."""
        return self.graph.markov

    def set_up_on(self, terms: ElementTerms, *args: object, **kwargs: object) -> None:
        """Like ``set_up`` with all data, by the terms of all mini-batches.

        The guide is in the model's coordinates. Its graph has the shared latents as root block, and elements
        of plates given these and the elements of smaller plates with which some row links them.

        :param args: the model's arguments with one mini-batch, like ``kwargs``.
        """
        self._terms = terms
        self.set_up(*args, **kwargs)
        self._terms = None

    @property
    def is_of_elements(self) -> bool:
        """Whether the graph was found by :meth:`set_up_on`."""
        return self.coordinates is not None and bool(self._graph.elimination.linear)

    def _find_coordinates(self, args: Args, kwargs: Kwargs, depends: bool) -> dict[str, bool]:
        """Also finds the graph, in coordinates of the prior if these add few edges or are requested.

        A chain whose location is the previous state is dense in units of its prior; scaled only, without the
        location, it remains a chain.
        """
        if self._terms is not None:
            log_joint = self._log_joint(*args, **kwargs)
            self._graph = LatentGraph.of_elements(self._terms, [*log_joint.latents.sites.values()])
            return {}
        mapped = self._mapped_sites(args, kwargs, depends)
        log_joint = self._density or self._log_joint(*args, **kwargs)
        graph = self._find_graph(log_joint)
        for with_location in (True, False) if mapped else ():
            sites = {name: with_location or not mapped[name] for name in mapped}
            self._graph = self._graph_in(log_joint, sites)
            if self._requested != "prior" or _size(self._graph) <= _MOST_FILL_IN * _size(graph):
                return sites
        self._graph = graph
        return {}

    def _build(self, latents: Latents, start: Tensor) -> nn.Module:
        given = self._graph.elimination, self._hidden_dim, self._num_transforms
        self._make_flow = lambda _: StructuredFlow(*given)
        return super()._build(latents, start)

    def get_extra_state(self) -> dict[str, Any] | None:
        """The graph, which the parameters are for; with the coordinates in which it was found."""
        if self.coordinates is None:
            return None
        neighbours = tuple(tuple(sorted(own)) for own in self._graph.markov.neighbours)
        found = {"with_location": self.coordinates.with_location, "neighbours": neighbours}
        return {**found, "elimination": asdict(self._graph.elimination)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Builds the guide anew if it found another graph, as from a mini-batch."""
        if state == self.get_extra_state():
            return
        elimination = Elimination(**state["elimination"])
        markov = MarkovGraph(tuple(map(frozenset, state["neighbours"])), elimination)
        latents, store = self.coordinates.latents, pyro.get_param_store()
        sites, count = list(latents.sites), len(markov.neighbours)
        if count != latents.latent_dim or not state["with_location"].keys() <= {*sites}:
            raise RuntimeError(
                f"the state dict is of a guide for another model: expected {latents.latent_dim} latents of "
                f"the sites {sites}, got {count}"
            )
        for key in self._entries.keys() & store.keys():
            del store[key]
        self._graph = LatentGraph(coordinate_names(latents.sites.values()), markov)
        self._set_up_from(latents, state["with_location"], self._zeros())

    def _graph_in(self, log_joint: LogJoint, sites: dict[str, bool]) -> LatentGraph:
        """The graph in coordinates of the prior, with the edges of both lambda 0 and lambda 1.

        Uses random intermediate lambdas, where terms do not cancel and shapes do not count: at h / (1 + h),
        see ``centered_by_curvature``, an element is independent of its location.
        """
        start, generator = log_joint.start, torch.Generator().manual_seed(0)
        random = torch.rand(start.shape, generator=generator, dtype=start.dtype, device="cpu")
        between = 0.9 + 0.05 * random.to(start)  # all different
        mapped = Coordinates(log_joint.latents, sites, between)
        return self._find_graph(log_joint.with_coordinates(mapped))

    def _find_graph(self, log_joint: LogJoint) -> LatentGraph:
        with torch.random.fork_rng(devices=[]), poutine.block():
            neighbours = find_dependencies(log_joint, _smallest_elements(log_joint.latents))
        markov = MarkovGraph.from_neighbours(neighbours)
        return LatentGraph(coordinate_names(log_joint.latents.sites.values()), markov)

    def _colors(self, start: Tensor) -> Tensor:
        return self._graph.markov.coloring.on(start.device)

    @torch.no_grad()
    def missing_over_batches(
        self, batches: Sequence[tuple[tuple[object, ...], Mapping[str, object]]]
    ) -> list[str]:
        """Dependencies that draws of the guide reveal and its graph lacks, such as ``"mu and h[3]"``.

        :param batches: ``args`` and ``kwargs`` of some mini-batches, or of all data only.
        """
        graph, names = self.graph, self.graph.names
        if self.is_of_elements:
            return self._missing_elements(batches)
        # at most 256 draws, and 4096 gradients
        most = 4096 // (graph.markov.coloring.num_colors * len(batches))
        count = max(2, min(256, most))
        args, kwargs = batches[0]
        log_joint, pairs = self._log_joint(*args, **kwargs), set[tuple[int, int]]()
        with torch.random.fork_rng(devices=[]), poutine.block():
            z, _ = self.rsample_and_log_prob(count * len(batches))
            for batch, draws in zip(batches, z.split(count)):
                density = log_joint.with_arguments(*batch).with_coordinates(self.prior_coordinates)
                pairs.update(missing_dependencies(density, graph.markov.neighbours, draws))
        return [f"{describe(names[i])} and {describe(names[j])}" for i, j in sorted(pairs)]

    def _missing_elements(
        self, batches: Sequence[tuple[tuple[object, ...], Mapping[str, object]]]
    ) -> list[str]:
        names, neighbours = self.graph.names, self.graph.markov.neighbours
        log_joint, found = self._log_joint(*batches[0][0], **batches[0][1]), set[str]()
        groups = ElementGroups.of(log_joint.latents).to(log_joint.start.device)
        root = set(self.graph.elimination.root)
        in_root = {
            k for k, own in enumerate(groups.members) if root.issuperset(own.flatten().tolist())
        }
        groups = groups.sharing(in_root)
        with torch.random.fork_rng(devices=[]), poutine.block():
            draws, _ = self.rsample_and_log_prob(len(batches))
            for batch, point in zip(batches, draws):
                reads = elements_read(log_joint.with_arguments(*batch), groups, point)
                known = [index for index in reads or () if index is not None]
                if len(known) < len(groups.members):
                    return ["several elements of a plate"]
                for link in ElementTerms(groups, [known]).links:
                    for i, j in link.coordinates(groups)[:, :, 0, 0].T.tolist():
                        if j not in neighbours[i]:
                            found.add(f"{describe(names[i])} and {describe(names[j])}")
        return sorted(found)

    def _most_draws(self) -> int:
        self._known_coordinates()
        return max(_MOST_NUMBERS // self._parts[0].num_values, 1)

    # Starts of a fit

    def start_at(self, loc: object, scale_tril: object = None) -> None:
        """Becomes a Gaussian in the guide's coordinates, with the networks of a new guide.

        Dependencies that the graph lacks are projected out: the guide becomes the product of the Gaussian's
        conditionals along the graph, the nearest Gaussian with that graph in KL(p|q).

        :param loc: the location, a tensor, array or list of shape ``(latent_dim,)``.
        :param scale_tril: the lower-triangular scale, shape ``(latent_dim, latent_dim)``, or standard
            deviations, shape ``(latent_dim,)``; by default ``init_scale``.
        :raises ValueError: if a shape is wrong, a number is not finite, or the scale is no such matrix.
        """
        elimination, (_, affine) = self.graph.elimination, self._parts
        if scale_tril is None:
            scale_tril = torch.full_like(affine.loc.detach(), self._init_scale)
        scale_tril = to_tensor("scale_tril", scale_tril, affine.loc)
        loc = to_tensor("loc", loc, affine.loc)
        if scale_tril.dim() == 2:
            check_location_and_scale(loc, scale_tril, len(affine.loc))
            covariance = scale_tril @ scale_tril.T
            coefficients, scale = regressions(elimination.parents, covariance)
            root_tril = lower_factor(scale_tril[list(elimination.root)])
            sd = covariance.diagonal().sqrt()
        else:
            sd = scale = scale_tril
            coefficients = [scale.new_zeros(len(own)) for own in elimination.parents]
            root_tril = scale[list(elimination.root)].diag()
        self._become(loc, sd, coefficients, scale, root_tril)

    def start_at_gaussian(self, gaussian: SparseGaussian) -> None:
        """Becomes a Gaussian along the elimination of :meth:`markov_graph`."""
        coefficients, scale = gaussian.given(self.graph.elimination.parents)
        self._become(gaussian.loc, gaussian.sd, coefficients, scale, gaussian.root_tril)

    def start_at_elements(self, gaussian: ElementGaussian) -> None:
        """Becomes a Gaussian of shared latents and elements of plates, after :meth:`set_up_on`."""
        flow, _ = self._parts
        sd, scale, direct, within = gaussian.sd, gaussian.scale, gaussian.direct, gaussian.within
        shared = {i: k for k, i in enumerate(gaussian.precision.groups.shared.tolist())}
        others, within_of = self.graph.elimination.others, dict[int, dict[int, Tensor]]()
        for i, j, value in within:
            within_of.setdefault(i, {})[j] = value
        coefficients = []
        for i, own in enumerate(others):
            of_shared = direct[i]
            parts = [of_shared[shared[j]] if j in shared else within_of[i][j] for j in own]
            coefficients.append(torch.stack(parts) if parts else sd.new_zeros(0))
        self._become(gaussian.loc, sd, coefficients, scale, gaussian.root_tril)
        for update, (basis, factor) in zip(flow.updates, gaussian.leading.values()):
            update.set_(basis, factor)
        flow.set_links(sd, gaussian.coupling)

    def _become(
        self, loc: Tensor, sd: Tensor, coefficients: list[Tensor], scale: Tensor, root_tril: Tensor
    ) -> None:
        flow, affine = self._parts
        self._registered_transform()  # first adopt entries of the param store that take precedence
        affine.set_(loc, sd)
        flow.load_state_dict(self._flow_start)
        flow.start_at(sd, coefficients, scale, root_tril)

    def step_scales(self) -> dict[nn.Parameter, Tensor]:
        """Optimizer step sizes by parameter, in units of conditional sds."""
        flow, affine = self._parts
        relative = flow.conditional_scale()
        sizes = {affine.loc: affine.log_scale.detach().exp() * relative, affine.log_scale: relative}
        return {**sizes, **flow.step_scales()}


def _smallest_elements(latents: Latents) -> Tensor | None:
    """The elements of the plate that minimizes latents per element plus latents outside."""
    frames = {f: None for site in latents.sites.values() for f in site.plates if f.dim is not None}
    guesses = [latents.elements_of(frame) for frame in frames]
    return min(
        guesses, key=lambda own: int((own + 1).bincount()[1:].max() + (own < 0).sum()), default=None
    )


def _size(graph: LatentGraph) -> int:
    """The number of parent pairs along the elimination, the root block included."""
    root = len(graph.elimination.root)
    return graph.elimination.num_edges + root * (root - 1) // 2
