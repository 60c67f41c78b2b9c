# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log joint density of a Pyro model as a function of many draws at once."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..arguments import values_can_be_read
from ..differentiation import evaluate_with_gradient
from ..graphs.dependencies import ROUND_OFF
from .coordinates import find_mapped, prior_scales
from .enumeration import marginal_log_prob
from .handlers import SiteLogProbs, UnmaskedLatents, hidden_sites, improper_sites
from .prior_map import Coordinates, PriorMap, SiteCoordinates, map_draws
from .protocols import LogDensity
from .sites import Latents, LatentSpace, initial_value
from .traces import (
    ModelStructure,
    argument_signature,
    check_data,
    count_values,
    is_enumerated,
    latent_nodes,
    plate_nesting,
    subsampled_plates,
)
from .vectorization import (
    DRAWS,
    MIXED,
    STRATEGIES,
    DrawPlate,
    Draws,
    LargestTensor,
    Terms,
    agree,
    choose_strategy,
    describe,
    draws_at_a_time,
    evaluate_many,
    nonfinite_sites,
)

Args = tuple[object, ...]
Kwargs = Mapping[str, object]

#: What part of them fits into a processor's cache, and is worth a run of the model: a regression of 100,000
#: rows takes half the time a draw of four times larger parts, and two thirds of that of smaller ones
CACHED = 16
# strategies are compared near the start, at draws of the prior, and as many far away
_NUM_NEAR, _NEAR_SCALE = 5, 0.1
_NUM_FAR, _FAR_SCALE = 8, 3.0
# of draws with weights: the largest, the smallest, twice as many others, the extremes of some coordinates
_NUM_EXTREME, _NUM_COORDINATES = 2, 8
# In float32 that is 0.01 nats of a log density of 1e4, the round-off of its sum. Where single runs differ by
# more, the worst draws are evaluated many times over.
_TIGHT, _NUM_REPEATED = 0.01, 2
# the most structures that are remembered, as arguments of other shapes come and go by batches
_MOST_SIGNATURES = 64


class LogJoint(LogDensity):
    r"""The log joint density of a Pyro model, with the Jacobian, on the unconstrained space.

    .. math::

        \log p(x, c(z)) + \log |\det c'(z)|

    where c is Pyro's bijection onto the supports of the latents. Many draws are evaluated at once
    where that agrees with single runs (see ``joint.vectorization``), near the start, at draws of the
    prior and far away; :meth:`checked` compares at any draws. Discrete latents that are marked for
    enumeration are summed out, and masked elements of latents have their prior density where nothing
    else depends on them. Pyro's validation is off while the model runs, so that an impossible draw
    gives NaN and no error; where the user has it on, the first run is validated.

    :param model: a Pyro model, with its arguments ``args`` and ``kwargs``.
    :param init_loc_fn: of Pyro, for the first run; medians of vague priors are left for the origin.
    :raises ValueError: if a latent is discrete and not enumerated, there is no latent, or
        Pyro's validation is on and finds fault with the data or with shapes.

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
        trace = self._trace(args, kwargs)
        check_data(trace)
        run = partial(model, *args, **kwargs)
        self.improper = improper_sites(run, trace)  #: the sites whose masks are left alone
        #: the model with its arguments, where masks of proper latents do not count
        self.run = UnmaskedLatents(self.improper)(run)
        self._turn = 0
        self.num_plates = plate_nesting(trace)
        #: whether draws are weighed by mini-batches of their own, or by other random numbers of the model
        self.is_random = bool(subsampled_plates(trace))
        self.is_enumerated = any(map(is_enumerated, latent_nodes(trace)))
        self.latents = Latents.from_trace(trace)
        self._structures: dict[Any, ModelStructure] = {}
        self._checked = {argument_signature((args, kwargs))}
        self.coordinates: Coordinates | None = None
        self.maps_priors = True  #: not where the user wants the coordinates of the model
        # the draws at which strategies are compared take no random numbers of the caller
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            self._start = self.or_origin(self._latent_vector(trace))
            noise = torch.randn_like(self._start.expand(_NUM_NEAR, -1))
            near = self._start + _NEAR_SCALE * noise
            with pyro.validation_enabled(False), torch.no_grad():
                #: the obstacle is why the next faster strategy does not suit the model
                self.strategy, self.obstacle = choose_strategy(self._evaluate, {"z": near}, _nan)
                with LargestTensor() as largest:
                    self.is_random |= self._changes_by_itself(near)
            count, at_once = count_values(trace), 1 if self.strategy == "loop" else len(near)
            # how many times as large as all sites together, which are held, the largest tensor is
            self._spread = max(largest.num_values / at_once / count, 1.0)
            #: how many draws are evaluated at once without gradients, which bounds the memory
            self.chunk_size = draws_at_a_time(self._spread * count)
            if self.strategy != "loop":
                noise = torch.randn_like(self._start.expand(_NUM_FAR, -1))
                # what a model says or raises far away is of no interest yet
                with warnings.catch_warnings(), suppress(Exception):
                    warnings.simplefilter("ignore")
                    far = self._start + _FAR_SCALE * noise
                    self.checked(torch.cat([near, far, *self.prior_draws()]))

    @property
    def reason(self) -> str:
        """Why the model is run for one draw after the other, if it is."""
        return self.obstacle if self.strategy == "loop" else ""

    def or_origin(self, u: Tensor) -> Tensor:
        """A start, or the origin where that is a median whose density has no digits left, or no slope."""
        if self._init_loc_fn is init_to_median:
            with pyro.validation_enabled(False), torch.enable_grad(), suppress(Exception):
                both = torch.stack([u, torch.zeros_like(u)]).detach().requires_grad_()
                here, there = (self._evaluate({"z": z}, None)["total"] for z in both)
                slope = torch.autograd.grad(here + there, both)[0][0]
                is_sound = (here.abs() * torch.finfo(u.dtype).eps <= 1) & slope.isfinite().all()
                if bool(~is_sound & (here < there) & there.isfinite()):
                    return both[1].detach()
        return u

    def _latent_vector(self, trace: Any) -> Tensor:
        sites = self.latents.sites
        return self.latents.unconstrain({k: trace.nodes[k]["value"].detach() for k in sites})

    def _changes_by_itself(self, z: Tensor) -> bool:
        """Whether a second evaluation at the same draws gives other values, as with ``torch.randint``."""
        one = self._at(z)
        torch.manual_seed(int(torch.randint(2**31, (), device="cpu")))
        slack = ROUND_OFF * torch.finfo(one.dtype).eps
        return not torch.allclose(one, self._at(z), rtol=slack, atol=slack, equal_nan=True)

    def with_arguments(self, args: Args, kwargs: Kwargs | None = None) -> "LogJoint":
        """The log joint density of the same model for other arguments, such as another mini-batch.

        :raises ValueError: if with these the model has other latents, or some of other shapes.
        """
        structure = self.structure(args, kwargs)
        expected = {name: tuple(site.shape) for name, site in self.latents.sites.items()}
        if structure.shapes != expected:
            raise ValueError(
                "the model has other latents with these arguments: expected the sites and shapes "
                f"{expected}, got {structure.shapes}. Latents of the elements of a mini-batch need a "
                "guide that is told of the mini-batch, such as AutoAmortized"
            )
        other = self.bound_to(args, kwargs or {})
        other.chunk_size = draws_at_a_time(self._spread * structure.num_values)
        return other

    def bound_to(self, args: Args, kwargs: Kwargs) -> "LogJoint":
        """The same for other arguments, whose latents are not compared: some may have been data."""
        other = copy.copy(self)
        other.run = UnmaskedLatents(self.improper)(partial(self.model, *args, **kwargs))
        return other

    def structure(self, args: Args, kwargs: Kwargs | None = None) -> ModelStructure:
        """The sites of a run with other arguments; those with a known signature need no run."""
        arguments = args, kwargs or {}
        key = argument_signature(arguments, with_values=True)
        if key not in self._structures:
            # whether there was a run before must not show in the draws that follow
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                trace = self._trace(*arguments)
            if (shapes := argument_signature(arguments)) not in self._checked:
                check_data(trace)
                self._checked.add(shapes)
            if len(self._structures) >= _MOST_SIGNATURES:
                self._structures.clear()
            self._structures[key] = ModelStructure.from_trace(trace)
        return self._structures[key]

    def __call__(self, z: Tensor) -> Tensor:
        is_cached = z.device.type == "cpu" and not self.is_random
        size = max(self.chunk_size // CACHED, 1) if is_cached else self.chunk_size
        if not torch.is_grad_enabled():
            return self._at(z, size)
        # draws of one mini-batch that the model takes by itself stay together
        if len(z) <= size or self.is_random or not values_can_be_read(z):
            return self._at(z)
        found, state = [], torch.get_rng_state()
        for part in z.split(math.ceil(len(z) / math.ceil(len(z) / size))):
            torch.set_rng_state(state)  # the same random numbers of a model for all draws
            values, is_found = evaluate_with_gradient(self._at, part)
            if not is_found and len(z) > self.chunk_size:
                # the graph for the model's own parameters may not fit into memory: it is made again
                torch.set_rng_state(state)
                values = checkpoint(self._at, part, use_reentrant=False)
            found.append(values)
        return torch.cat(found)

    def _at(self, z: Tensor, chunk_size: int | None = None) -> Tensor:
        with pyro.validation_enabled(False):
            return evaluate_many(self._evaluate, {"z": z}, self.strategy, _nan, chunk_size)["total"]

    @torch.no_grad()
    def checked(self, z: Tensor, log_q: Tensor | None = None) -> Tensor:
        """The log density of draws, without gradients, by a strategy that agrees with single runs.

        A branch such as ``if (z > 2).any()`` mixes draws only where one of them takes it. So strategies
        are compared wherever much rests on the density, and the first that agrees is used from then on.

        :param z: draws, shape ``(n, latent_dim)``.
        :param log_q: the log density of their distribution, shape ``(n,)``: draws of extreme weights
            or extreme coordinates are compared, and a few others; by default all draws.
        """
        state = torch.get_rng_state()
        for strategy in STRATEGIES[STRATEGIES.index(self.strategy) :]:
            torch.set_rng_state(state)
            self.strategy = strategy
            try:
                values = self(z)
            except Exception as error:  # a branch that does not take many draws
                if strategy == "loop":
                    raise
                self.obstacle = describe(error)
                continue
            if strategy == "loop" or self._agrees(z, values, log_q, state):
                break
            self.obstacle = MIXED
        return values

    def _agrees(self, z: Tensor, values: Tensor, log_q: Tensor | None, state: Tensor) -> bool:
        """Whether the values of draws at once are those of single runs from a random state."""
        rows = list(range(len(z)))
        if log_q is not None:
            order, few, dim = (values - log_q).argsort().tolist(), _NUM_EXTREME, z.shape[-1]
            # few draws may take a branch, or not take it: those that are extreme in some coordinate
            last = self._turn + min(_NUM_COORDINATES, dim)
            part = z[:, torch.arange(self._turn, last, device=z.device) % dim]
            self._turn = last
            extreme = {*part.argmin(0).tolist(), *part.argmax(0).tolist()}
            rows = sorted({*order[:few], *order[-few:], *rows[: 2 * few], *extreme})
        after, excess = torch.get_rng_state(), dict[int, float]()
        for i in rows:
            torch.set_rng_state(state)
            try:
                with pyro.validation_enabled(False):
                    single = self._evaluate({"z": z[i]}, None)
            except Exception:  # a single run fails as well: nothing to compare with
                continue
            if not agree({"total": values[i]}, single, _TIGHT):
                # NaN where the other has a number is the worst of all
                excess[i] = (values[i] - single["total"]).abs().nan_to_num(torch.inf).item()
        agrees = True
        for i in sorted(excess, key=lambda i: -excess[i])[:_NUM_REPEATED]:
            # the same draw many times over tells mixed draws from an ill-conditioned density
            torch.set_rng_state(state)
            alike = self(z[i].expand_as(z))[i]
            agrees = agrees and agree({"total": values[i]}, {"total": alike}, _TIGHT)
        torch.set_rng_state(after)
        return agrees

    @torch.no_grad()
    def prior_draws(self) -> list[Tensor]:
        """Draws of the prior, each of shape ``(1, latent_dim)``; an empty list where it has none."""
        found = []
        for _ in range(_NUM_FAR):
            # an improper one, or a draw that the model itself cannot take
            with suppress(Exception), pyro.validation_enabled(False), hidden_sites():
                z = self._latent_vector(poutine.trace(self.run).get_trace())[None]
                if bool(z.isfinite().all()):
                    found.append(z)
        return found

    @torch.no_grad()
    def nonfinite_sites(self, z: Tensor) -> list[str]:
        return nonfinite_sites(self.run, self.latents.constrain(self.to_unconstrained(z)[0]))

    def _evaluate(self, draws: Draws, size: int | None) -> Terms:
        z = draws["z"]
        if self.is_enumerated and size == 1:
            # Pyro's variable elimination has no dimension for a plate of one
            return {"total": self._evaluate({"z": z[0]}, None)["total"][None]}
        plate, prior = DrawPlate(size, self.num_plates), PriorMap(self.mapped_coordinates)
        values, total = self.latents.constrain_with_ladj(z, prior.sites)
        placed = prior.take(plate.place(values, self.latents.event_dims))
        run = prior(self.run) if prior.sites else self.run
        if self.is_enumerated:
            run = partial(plate.run, poutine.condition(run, placed))
            first_dim = -1 - self.num_plates - (size is not None)
            total = total + marginal_log_prob(run, first_dim, () if size is None else (DRAWS,))
        else:
            with hidden_sites(), SiteLogProbs(placed) as scored:
                plate.run(run)
            total = plate.total(scored.log_probs, total)
        return {"total": plate.total(prior.bijection_ladjs, plate.total(prior.ladjs, total))}

    def with_coordinates(self, coordinates: Coordinates | None) -> "LogJoint":
        """The log density of draws in these coordinates, their log-determinant included."""
        other = copy.copy(self)
        other.coordinates = coordinates
        return other

    @property
    def mapped_coordinates(self) -> dict[str, SiteCoordinates]:
        """The latents that have coordinates from the prior."""
        return LatentSpace(self.latents, self.coordinates).mapped

    @property
    def start(self) -> Tensor:
        return self.from_unconstrained(self._start[None])[0][0]

    def to_unconstrained(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Draws ``(n, latent_dim)`` on the unconstrained space, and the log-determinant of the map to it."""
        return self._map(z, is_inverse=False)

    def from_unconstrained(self, u: Tensor) -> tuple[Tensor, Tensor]:
        z, ladj = self._map(u, is_inverse=True)
        return z, -ladj

    def _map(self, z: Tensor, is_inverse: bool) -> tuple[Tensor, Tensor]:
        if not (sites := self.mapped_coordinates):
            return z, z.new_zeros(len(z))
        run = self.enumerated(self.run)
        evaluate = partial(map_draws, run, self.latents, sites, self.num_plates, is_inverse)
        with pyro.validation_enabled(False):
            found = evaluate_many(evaluate, {"z": z}, self.strategy, _nan_at, self.chunk_size)
        return found["z"], found["total"]

    def prior_scales(self, u: Tensor) -> Tensor:
        """The scale of each latent's prior at a point ``(latent_dim,)`` of the unconstrained space."""
        return prior_scales(self.enumerated(self.run), self.latents, u)

    def mapped_sites(self, with_shapes: bool = False) -> dict[str, bool]:
        """The latents with coordinates from the prior, and whether it depends on other latents."""
        points = torch.stack([self._start, self._start + 0.1 * (1 + self._start.abs())])
        return find_mapped(self.enumerated(self.run), self.latents, points, with_shapes)

    def enumerated(self, run: Callable[[], object]) -> Any:
        """A run of the model with its discrete latents, if it has some, enumerated to the left of draws."""
        return EnumMessenger(-2 - self.num_plates)(run) if self.is_enumerated else run

    def _trace(self, args: Args, kwargs: Kwargs) -> Any:
        init = InitMessenger(partial(initial_value, self._init_loc_fn))
        with pyro.validation_enabled(False), torch.no_grad(), hidden_sites(), init:
            return poutine.trace(self.model).get_trace(*args, **kwargs)


def _nan(draws: Draws) -> Terms:
    """The log joint density of a draw at which the model fails, with a gradient."""
    return {"total": draws["z"].sum() * torch.nan}


def _nan_at(draws: Draws) -> Terms:
    return {"z": draws["z"] * torch.nan, **_nan(draws)}
