# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log joint density of a Pyro model, vectorized over draws."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._base.arguments import values_can_be_read
from .._base.differentiation import evaluate_with_gradient
from .coordinates.centering import find_mapped, scales_of
from .coordinates.coordinates import Coordinates, nan_terms
from .coordinates.latent_mapper import LatentMapper
from .draw_plate import DRAWS, DrawPlate
from .enumeration import marginal_log_prob
from .handlers import FirstIndices, FoundScale, SiteLogProbs, UnmaskedLatents, hidden_sites
from .initial_point import InitialPoint, usable_point
from .run_once import aside, run_once
from .sites import Latents
from .traces import (
    ModelStructure,
    argument_signature,
    check_data,
    count_values,
    is_deterministic,
    is_enumerated,
    latent_nodes,
    observed_nodes,
    plate_nesting,
    subsampled_plates,
)
from .vectorization import (
    NUM_COMPARED,
    Choice,
    Draws,
    ModelFailures,
    Terms,
    choose_strategy,
    draws_at_a_time,
    evaluate_many,
    vectorized,
)

Args = tuple[object, ...]
Kwargs = Mapping[str, object]


#: the divisor of ``chunk_size`` that keeps a chunk in a processor's cache: a regression of 100,000 rows takes
#: half the time per draw of four times larger chunks, and two thirds of that of smaller ones
CACHED = 16
#: maximum number of cached structures, as batches bring arguments of ever new shapes
MOST_SIGNATURES = 64


class LogJoint:
    r"""The log joint density of a Pyro model on the unconstrained space, with the Jacobian term.

    .. math::

        \log p(x, c(z)) + \log |\det c'(z)|

    where c is Pyro's bijection onto the supports of the latents. Evaluation is vectorized over draws if that
    agrees with single runs (see ``model.vectorization``) at points as far from the start as the prior is
    wide, and farther; :meth:`checked` compares at given draws. Discrete latents marked for enumeration are
    summed out. Masked continuous latents have their prior density, unless by ``mask=False``. Pyro's
    validation is off while the model runs, so that an impossible draw gives NaN in place of an error; the
    first run is validated if the user has validation on.

    :param model: a Pyro model, with its arguments ``args`` and ``kwargs``.
    :param init_loc_fn: Pyro's initialization for the first run; where the density is of no use there,
        other points are tried, see :meth:`or_usable`.
    :raises ValueError: if a latent is discrete and not enumerated, there is no latent, or Pyro's validation
        is on and rejects the data or shapes.

    Example::

        >>> import pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(0.3))
        >>> log_joint = LogJoint(model)
        >>> log_joint(torch.zeros(5, 1)).shape, log_joint.strategy
        (torch.Size([5]), 'plate')
    """

    def __init__(
        self,
        model: Callable[..., object],
        args: Args = (),
        kwargs: Kwargs | None = None,
        *,
        init_loc_fn: Callable[[Any], Tensor] = init_to_median,
    ) -> None:
        self.model, self._init_loc_fn, kwargs = model, init_loc_fn, kwargs or {}
        run = partial(model, *args, **kwargs)
        trace = run_once(run, init_loc_fn=init_loc_fn)
        check_data(trace)
        #: the model bound to its arguments, with the masks of its latents removed
        self.run = UnmaskedLatents()(run)
        #: whether the model has an observed site or a factor
        self.has_data = not all(map(is_deterministic, observed_nodes(trace)))
        self.num_plates, self._is_part = plate_nesting(trace), bool(subsampled_plates(trace))
        self.is_enumerated = any(map(is_enumerated, latent_nodes(trace)))
        self.latents, self._num_values = Latents.from_trace(trace), count_values(trace)
        self._num_compared = self._num_values
        self._chunk_size: int | None = None
        self._arguments, self._structures = (args, kwargs), dict[Any, ModelStructure]()
        self._checked = {argument_signature((args, kwargs))}
        self.coordinates: Coordinates | None = None
        self.maps_priors = True  #: False if the user asks for the model's coordinates
        self._values = {name: trace.nodes[name]["value"].detach() for name in self.latents.sites}
        # computed once and shared by all views
        self._choice: Callable[[], Choice] = lru_cache(maxsize=1)(self._choose)
        start = partial(self.or_usable, self.latents.unconstrain(self._values))
        self._find_start: Callable[[], InitialPoint] = lru_cache(maxsize=1)(start)
        self._find_mapped: Callable[[], Any] = lru_cache(maxsize=1)(self._compare_priors)

    def _choose(self) -> Choice:
        start, generator = self._find_start().u, torch.Generator().manual_seed(0)
        with aside():
            on_cpu: Any = {"dtype": torch.float64, "device": "cpu"}
            noise = torch.randn(NUM_COMPARED, len(start), generator=generator, **on_cpu).to(start)
            wide = self.prior_scales(start)
            # near the start and far away on either side, on one side scaled by the prior; at more points near
            # the start if the density is not finite there
            near, far = wide.clamp_max(1.0) * noise, 2.5 + noise[:1].sigmoid()
            points = start + torch.cat([near[:1], wide.clamp_min(1.0) * far, -far, near[1:]])
            choice = choose_strategy(self._evaluate, {"z": points})
        return choice._replace(is_random=self._is_part or choice.is_random)

    @property
    def strategy(self) -> str:
        """How draws are vectorized, "plate", "vmap" or "loop": see ``model.vectorization``."""
        return self._choice().strategy

    @property
    def obstacle(self) -> str:
        """Why the next faster strategy does not suit the model."""
        return self._choice().obstacle

    @property
    def is_random(self) -> bool:
        """Whether the density is random, by subsampling or by other random numbers of the model."""
        return self._choice().is_random

    @property
    def chunk_size(self) -> int:
        """The number of draws evaluated at once without gradients, which bounds memory."""
        # the largest intermediate tensor may exceed all sites together
        factor = self._choice().num_values / self._num_compared
        return self._chunk_size or draws_at_a_time(self._num_values * max(factor, 1.0))

    def view(self, **changes: Any) -> "LogJoint":
        """The same density with other attributes: all that is made from another density is a view of it."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def evaluated(self, **changes: Any) -> "LogJoint":
        """The same density with another ``strategy``, ``obstacle`` or ``is_random``."""
        choice = self._choice()._replace(**changes)
        return self.view(_choice=lambda: choice)

    def by_strategy(self, strategy: str) -> "LogJoint":
        """The same density by a strategy that is not compared with single runs."""
        return self.view(_choice=lambda: Choice(strategy, "", False, 0.0), _chunk_size=None)

    @property
    def reason(self) -> str:
        """Why draws are evaluated one at a time; empty if they are not."""
        return self.obstacle if self.strategy == "loop" else ""

    def or_usable(self, u: Tensor) -> InitialPoint:
        """A start, or another point where it is of no use, see ``model.initial_point``."""
        with aside():
            return usable_point(self, u, self._init_loc_fn is init_to_median)

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient of the density reaches the latents at the start."""
        return self._find_start().has_gradient

    def with_arguments(self, args: Args, kwargs: Kwargs | None = None) -> "LogJoint":
        """The log joint density of the same model for other arguments, such as another mini-batch.

        :raises ValueError: if the model has other latents with these arguments, or latents of other shapes.
        """
        kwargs = kwargs or {}
        if _identities(args, kwargs) == _identities(*self._arguments):
            return self
        structure = self.structure(args, kwargs)
        expected = {name: tuple(site.shape) for name, site in self.latents.sites.items()}
        if structure.shapes != expected:
            raise ValueError(
                "the model has other latents with these arguments: expected the sites and shapes "
                f"{expected}, got {structure.shapes}. Latents of the elements of a mini-batch need a guide "
                "such as AutoAmortized"
            )
        return self.bound_to(args, kwargs).view(_num_values=structure.num_values)

    def bound_to(self, args: Args, kwargs: Kwargs) -> "LogJoint":
        """Binds other arguments without comparing latents: some may have been data."""
        if _identities(args, kwargs) == _identities(*self._arguments):
            return self
        run = UnmaskedLatents()(partial(self.model, *args, **kwargs))
        other = self.view(_arguments=(args, kwargs), run=run)
        return other.view(_find_mapped=lru_cache(maxsize=1)(other._compare_priors))

    def structure(self, args: Args, kwargs: Kwargs | None = None) -> ModelStructure:
        """The structure of a run with other arguments, cached by their signature.

        Only plates and shapes follow from that: a model with ``poutine.scale`` is run each time.
        """
        arguments = args, kwargs = args, kwargs or {}
        key = argument_signature(arguments, with_values=True)
        if key not in self._structures:
            # a cache miss must not change the random numbers that follow
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                run = FirstIndices()((scale := FoundScale())(self.model))
                trace = run_once(run, args, kwargs, init_loc_fn=self._known_or_initial)
            if (shapes := argument_signature(arguments)) not in self._checked:
                check_data(trace)
                self._checked.add(shapes)
            if scale.is_found:
                return ModelStructure.from_trace(trace)
            if len(self._structures) >= MOST_SIGNATURES:
                self._structures.clear()
            self._structures[key] = ModelStructure.from_trace(trace)
        return self._structures[key]

    def _known_or_initial(self, site: Any) -> Tensor:
        """The value of a latent in the first run, cheaper than a median, if its shape is the same."""
        known = self._values.get(site["name"])
        if known is not None and known.shape == site["fn"].shape():
            return known
        return self._init_loc_fn(site)

    def __call__(self, z: Tensor) -> Tensor:
        """The log density of draws ``(n, latent_dim)``, shape ``(n,)``; NaN where the model fails."""
        if len(z) == 1:
            return self._at(z)
        size = self._at_once(z)
        if not torch.is_grad_enabled():
            return self._at(z, size)
        # if the model subsamples, all draws see one mini-batch and stay together
        if len(z) <= size or self.is_random or not values_can_be_read(z):
            return self._at(z)
        found, state = [], torch.get_rng_state()
        for part in z.split(math.ceil(len(z) / math.ceil(len(z) / size))):
            torch.set_rng_state(state)  # a model draws the same random numbers for all draws
            values, is_found = evaluate_with_gradient(self._at, part)
            if not is_found and len(z) > self.chunk_size:
                # the graph for the model's parameters may not fit into memory: recompute it
                torch.set_rng_state(state)
                values = checkpoint(self._at, part, use_reentrant=False)
            found.append(values)
        return torch.cat(found)

    def _at(self, z: Tensor, chunk_size: int | None = None) -> Tensor:
        # a single draw takes a single run with any strategy
        strategy = self.strategy if len(z) > 1 else "plate"
        with pyro.validation_enabled(False):
            return evaluate_many(self._evaluate, {"z": z}, strategy, nan_terms, chunk_size)["total"]

    def _at_once(self, z: Tensor) -> int:
        is_cached = z.device.type == "cpu" and not self.is_random
        return max(self.chunk_size // CACHED, 1) if is_cached else self.chunk_size

    @torch.no_grad()
    def checked(self, z: Tensor, log_q: Tensor) -> "tuple[Tensor, LogJoint]":
        """The log density ``(n,)`` of draws, and the density by a strategy that agrees with single runs.

        :param z: draws, shape ``(n, latent_dim)``.
        :param log_q: the log density of the proposal at the draws, shape ``(n,)``; draws of extreme weights
            are among those compared.
        """

        def log_weights(terms: Terms) -> Tensor:
            return (terms["total"] - log_q)[:, None]

        with pyro.validation_enabled(False):
            strategy, terms, obstacle = vectorized(
                self._evaluate, {"z": z}, log_weights, self.strategy, nan_terms, self._at_once(z)
            )
        given = self.evaluated(strategy=strategy, obstacle=obstacle or self.obstacle)
        return terms["total"], given

    @torch.no_grad()
    def nonfinite_sites(self, z: Tensor) -> list[str]:
        """The sites whose log density is not finite at some draw of ``(n, latent_dim)``."""
        values, found = self.latents.constrain(self.to_unconstrained(z)[0]), list[str]()
        for row in zip(*values.values()):
            scored = SiteLogProbs(dict(zip(values, row)))
            try:
                with pyro.validation_enabled(False), hidden_sites(), scored:
                    self.run()
            except ModelFailures as error:
                found.append(f"the model itself ({error})")
            else:
                found += [k for k, v in scored.log_probs.items() if not v.sum().isfinite()]
        return list(dict.fromkeys(found))

    def _evaluate(self, draws: Draws, size: int | None) -> Terms:
        z = draws["z"]
        plate = DrawPlate(size, self.num_plates)
        mapped = {} if self.coordinates is None else self.coordinates.sites
        values, total = self.latents.constrain_with_ladj(z, mapped)
        placed = plate.place(values, self.latents.event_dims)
        prior = LatentMapper(mapped, {name: placed.pop(name) for name in mapped})
        run = prior(self.run) if mapped else self.run
        if self.is_enumerated:
            run = partial(plate.run, poutine.condition(run, placed))
            first_dim = -1 - self.num_plates - (size is not None)
            total = total + marginal_log_prob(run, first_dim, () if size is None else (DRAWS,))
        else:
            with hidden_sites(), SiteLogProbs(placed) as scored:
                plate.run(run)
            total = plate.total(scored.log_probs, total)
        for terms in (prior.ladjs, prior.bijection_ladjs, prior.log_probs):
            total = plate.total(terms, total)
        return {"total": total}

    def with_coordinates(self, coordinates: Coordinates | None) -> "LogJoint":
        """The log density in other coordinates, with their log-determinant."""
        has_sites = coordinates is not None and coordinates.with_location
        return self.view(coordinates=coordinates if has_sites else None)

    @property
    def start(self) -> Tensor:
        """An initial point, shape ``(latent_dim,)``, in the coordinates of draws."""
        return self.from_unconstrained(self._find_start().u[None])[0][0]

    def to_unconstrained(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Maps draws ``(n, latent_dim)`` to the unconstrained space; returns log-determinants, too."""
        if self.coordinates is None:
            return z, z.new_zeros(len(z))
        found = self.coordinates.mapped(z, self)
        return found["z"], found["total"]

    def from_unconstrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Maps unconstrained points ``(n, latent_dim)`` to coordinates; returns log-determinants, too."""
        if self.coordinates is None:
            return u, u.new_zeros(len(u))
        found = self.coordinates.mapped(u, self, is_inverse=True)
        return found["z"], -found["total"]

    def prior_scales(self, u: Tensor) -> Tensor:
        """The scale of each latent's prior at a point ``(latent_dim,)`` of the unconstrained space."""
        nodes = run_once(self.enumerated(self.run), at=self.latents.constrain(u)).nodes
        return scales_of(nodes, self.latents, u)

    def mapped_sites(self, with_shapes: bool = False) -> dict[str, bool]:
        """The latents that may have coordinates from the prior, and whether it depends on other latents.

        Empty if no prior depends on other latents; otherwise root scales with a shape are included.

        :param with_shapes: whether to include priors with a shape in any case.
        """
        found = self._find_mapped()
        return found if with_shapes or any(found.values()) else {}

    def _compare_priors(self) -> dict[str, bool]:
        start = self._find_start().u
        points = torch.stack([start, start + 0.1 * (1 + start.abs())])
        return find_mapped(self.enumerated(self.run), self.latents, points)

    def enumerated(self, run: Callable[[], object]) -> Any:
        """Enumerates the discrete latents of a model, if any, to the left of the draws."""
        return EnumMessenger(-2 - self.num_plates)(run) if self.is_enumerated else run


def _identities(args: Args, kwargs: Kwargs) -> list[Any]:
    return [*map(id, args), *((name, id(value)) for name, value in kwargs.items())]
