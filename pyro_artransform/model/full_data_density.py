# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log joint density of all data from mini-batches: their mean, or an estimate by one of them."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._base.comparison import agree, round_off
from .._base.differentiation import KnownGradients, sum_with_gradient
from .._base.processes import Processes
from .._base.time_limit import check_time
from .density import Args, Kwargs, LogJoint
from .graphs.dependencies import value_and_gradient
from .graphs.element_precision import ElementPrecision
from .handlers import FirstIndices
from .vectorization import LargestTensor, draws_at_a_time

_ALONE = Processes()
_STEP = 0.1  # of differences of gradients, relative to the distance of a draw


class Anchor(NamedTuple):
    """A log density ``()`` and its gradient ``(latent_dim,)`` at a point ``(latent_dim,)``.

    :param reach: the largest distance of each coordinate at which it is used, shape ``(latent_dim,)``.
    :param precision: minus its second derivative there, if known.
    """

    point: Tensor
    value: Tensor
    gradient: Tensor
    reach: Tensor
    precision: ElementPrecision | None = None

    @classmethod
    def of(cls, log_density: Callable[[Tensor], Tensor], point: Tensor, reach: Tensor) -> "Anchor":
        value, gradient = value_and_gradient(log_density, point[None])
        return cls(point.detach(), value[0], gradient[0], reach)

    def to(self, device: torch.device) -> "Anchor":
        """The same on another device."""
        point, value, gradient, reach = (part.to(device) for part in self[:4])
        precision = None if self.precision is None else self.precision.to(point)
        return Anchor(point, value, gradient, reach, precision)


class FullDataDensity(LogJoint):
    """The log joint density of a model, as the mean over mini-batches weighted by their rows.

    The density of one mini-batch is scaled up to all data, and its mode is many posterior sds away from that
    of all data. The mean approaches the density of all data as mini-batches are added, and equals it over all
    of them. It is summed in double precision: the round-off of a million rows matters. It holds the density
    of the largest mini-batch, and has its model, latents and strategy; a view of it holds a view of that.

    :param log_joint: the log joint density for any arguments.
    :param batches: positional and keyword arguments of each mini-batch; each iteration must yield the same
        ones.
    :param processes: those that share the density, each with other mini-batches; all create it, and the
        first one evaluates it.
    :raises ValueError: if coordinates from the prior depend on the arguments.

    **References**

    1. Control Variates for Stochastic Gradient MCMC (Baker, Fearnhead, Fox, Nemeth, 2019),
       https://arxiv.org/abs/1706.05439
    2. Accelerating Stochastic Gradient Descent using Predictive Variance Reduction (Johnson, Zhang,
       2013), https://papers.nips.cc/paper/4937
    """

    def __init__(
        self,
        log_joint: LogJoint,
        batches: Iterable[tuple[Args, Kwargs]],
        processes: Processes = _ALONE,
    ) -> None:
        shares, ends, largest, is_even = list[float](), list[Tensor](), log_joint, True
        for args, kwargs in batches:
            part = log_joint.with_arguments(args, kwargs)
            if not shares or part.chunk_size < largest.chunk_size:
                largest = part
            structure = log_joint.structure(args, kwargs)
            is_even = is_even and structure.is_evenly_scaled
            shares.append(1 / structure.scale)
            ends.append(part.from_unconstrained(log_joint.start[None])[0])
        if not all(torch.allclose(end, ends[0]) for end in ends):
            raise ValueError(
                "expected priors that are the same for each mini-batch, got some whose location or scale "
                "depends on its data: make the guide with coordinates='model'"
            )
        self.inner = largest
        #: expansions of the densities of all data and of one mini-batch, if this is an estimate by that
        self._expansions: tuple[Anchor, Anchor] | None = None
        self._weights, is_random = shares, False
        self._batches, self._processes, self._own = batches, processes, self
        processes.hold(self)
        # a plate whose indices are not used draws them nevertheless, and looks random
        self._is_random = largest.is_random
        if self.is_random:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                one = sum_with_gradient(self._parts, self.start[None])
                torch.manual_seed(int(torch.randint(2**31, (), device="cpu")))
                other = sum_with_gradient(self._parts, self.start[None])
            is_random = not agree(other, one, round_off)
        own = math.fsum(shares), is_even, is_random
        totals, are_even, are_random = zip(*processes.gather("sizes of mini-batches", own))
        #: the share of all data in the mini-batches, by their scales
        self.share = math.fsum(totals)
        self._is_even = all(are_even)
        self._weights = [share / self.share for share in shares]
        if self._is_random and not any(are_random):
            self._is_random = False
            # apart from the indices that a plate draws, of the size of all data
            run = self.bound_to(*largest._arguments)
            with torch.no_grad(), LargestTensor() as tensor:
                run(self.start[None])
            self.inner = self.inner.view(_chunk_size=draws_at_a_time(tensor.num_values))

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # a copy has no attributes at first
            raise AttributeError(name)
        return getattr(self.inner, name)

    def view(self, **changes: Any) -> Any:
        other = copy.copy(self)
        other.inner = self.inner.view(**changes)
        return other

    def estimate(
        self, args: Args, kwargs: Kwargs, of_all: Anchor, chunk_size: int
    ) -> "FullDataDensity":
        r"""The density by one mini-batch b, with the expansion of that of all data at a as a control variate.

        .. math::

            f_b(z) - f_b(a) - f_b'(a) (z - a) + f(a) + f'(a) (z - a)

        Its mean over mini-batches is the density of all data, as for :math:`f_b`, also if the difference
        :math:`z - a` is limited in these terms: far from a, an expansion may exceed any density. A
        mini-batch differs from that only from second order on, which is little in the bulk of the posterior
        if a mini-batch has data for each latent. With thousands of latents it has not: then the second
        derivative of all data is known, too, and second-order terms are exchanged as well.
        """
        other = copy.copy(self)
        other.inner = self.bound_to(args, kwargs).view(_chunk_size=chunk_size)
        other._batches, other._weights = [(args, kwargs)], [1.0]
        other._expansions = of_all, Anchor.of(other.inner, of_all.point, of_all.reach)
        return other

    @property
    def is_random(self) -> bool:
        """Whether the mean is random, even if the indices that plates draw are known."""
        return self._is_random

    def with_arguments(self, args: Args, kwargs: Kwargs | None = None) -> LogJoint:
        return self.inner.with_arguments(args, kwargs)

    def bound_to(self, args: Args, kwargs: Kwargs) -> LogJoint:
        part = self.inner.bound_to(args, kwargs)
        if self.is_random:
            return part
        return part.evaluated(is_random=False).view(run=FirstIndices()(part.run))

    @property
    def is_of_all_data(self) -> bool:
        """Whether the mini-batches cover as many rows as the model declares."""
        return self._is_even and math.isclose(self.share, 1.0)

    def __call__(self, z: Tensor) -> Tensor:
        if self._expansions is not None:
            return self._corrected(z, *self._expansions)
        if self._processes.size == 1:
            return sum_with_gradient(self._parts, z)
        u, log_det = self.to_unconstrained(z)  # other processes do not know the coordinates of now
        has_gradient = torch.is_grad_enabled() and u.requires_grad
        found = self.total(_with_gradient, self.strategy, u.detach(), has_gradient).to(u.device)
        values, gradient = found[:, 0], found[:, 1:].to(u)
        if has_gradient:
            values = KnownGradients.apply(values, [gradient], _twice, torch.get_rng_state(), u)
        return values + log_det

    def _corrected(self, z: Tensor, of_all: Anchor, own: Anchor) -> Tensor:
        """The density of the mini-batch, with the difference of the expansions."""
        change = (z - of_all.point).clamp(-of_all.reach, of_all.reach)
        offset = (of_all.value - own.value) + change @ (of_all.gradient - own.gradient)
        linear = self.inner(z) + offset
        if of_all.precision is None:
            return linear
        # the quadratic term of all data less that of the mini-batch, by differences of its gradient
        step = _STEP * change.detach()
        ends = torch.cat([of_all.point + step, of_all.point - step])
        forward, backward = value_and_gradient(self.inner, ends)[1].chunk(2)
        slope = (backward - forward) / (2 * _STEP) - of_all.precision.times(change.detach().T).T
        through = (slope * change).sum(-1)
        return linear + through - 0.5 * through.detach()

    def total(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """The weighted sum over all mini-batches of a function of a module, in double precision.

        :param function: called with the density of a mini-batch, its number in its process, and ``args``,
            see ``Processes.sum``.
        """
        return self._processes.sum(_over_batches, self._own, function, *args)

    def parts(self) -> Iterator[tuple[float, LogJoint]]:
        """The weights and densities of this process's mini-batches; this density sums those of all."""
        for weight, batch in zip(self._weights, self._batches):
            yield weight, self.bound_to(*batch)

    def _parts(self) -> Iterator[Callable[[Tensor], Tensor]]:
        for weight, part in self.parts():
            yield partial(_weighted, weight, part)

    @torch.no_grad()
    def checked(self, z: Tensor, log_q: Tensor) -> tuple[Tensor, LogJoint]:
        """Evaluates draws by a strategy that agrees with single runs on one mini-batch."""
        _, part = self.bound_to(*next(iter(self._batches))).checked(z, log_q)
        density = self.evaluated(strategy=part.strategy, obstacle=part.obstacle)
        return density(z), density

    def nonfinite_sites(self, z: Tensor) -> list[str]:
        found = (self.bound_to(*batch).nonfinite_sites(z) for batch in self._batches)
        return next(filter(None, found), [])


def _over_batches(
    density: FullDataDensity, function: Callable[..., Tensor], *args: object
) -> Tensor:
    """The share of a process in a total."""
    total: Tensor | None = None
    for number, (weight, part) in enumerate(density.parts()):
        check_time()
        found = weight * function(part, number, *args).double()
        total = found if total is None else total + found
    return cast(Tensor, total)


@torch.no_grad()
def _with_gradient(part: LogJoint, _: int, strategy: str, u: Tensor, has_gradient: bool) -> Tensor:
    """The density of a mini-batch at points ``(n, D)``; with its gradient, ``(n, 1 + D)``."""
    part, u = part.with_coordinates(None).evaluated(strategy=strategy), u.to(part.start)
    if not has_gradient:
        return part(u)[:, None]
    values, gradient = value_and_gradient(part, u)
    return torch.cat([values[:, None], gradient], 1)


def _twice(u: Tensor) -> Tensor:
    raise RuntimeError("the density of several processes cannot be differentiated twice")


def _weighted(weight: float, part: LogJoint, z: Tensor) -> Tensor:
    return weight * part(z)
