# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

r"""Finds the Markov graph of a log density from differences of its gradient.

Two coordinates are conditionally independent given all others if and only if

.. math::

    \frac{\partial^2}{\partial z_i \, \partial z_j} \log p(z) = 0 \quad \text{for all } z.

If one coordinate is moved, the gradients of its neighbours change, however the density is written. First,
coordinates are moved one at a time. At further points, to find dependencies that were switched off before,
coordinates that share no neighbour are moved together.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..._base.comparison import ROUND_OFF, round_off
from ..._base.time_limit import check_time
from .markov_graph import color_columns

# maximum number of entries in a batch of points: 16 MB in double precision, some ten times that in a model
_MOST_ENTRIES = 2_000_000
MAX_HALVINGS = 12  #: maximum number of halvings of a step or scale
# groupings of coordinates, at draws and at a wider point: one may reveal what another hides
_NUM_GROUPINGS = 4
_NUM_REPEATED = 6  # to confirm a new pair
# a CPU generator works for all devices
_ON_CPU: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def value_and_gradient(
    log_density: Callable[[Tensor], Tensor], points: Tensor
) -> tuple[Tensor, Tensor]:
    """A log density at points ``(n, D)``, and its gradients, NaN where the density is not finite.

    A random density, such as that of a mini-batch, uses the same random numbers for all batches of points.
    """
    values, gradients, state = list[Tensor](), list[Tensor](), torch.get_rng_state()
    for part in points.split(max(_MOST_ENTRIES // points.shape[-1], 1)):
        check_time()
        torch.set_rng_state(state)
        with torch.enable_grad():
            point = part.detach().requires_grad_()
            value = log_density(point)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        values.append(value.detach())
        gradients.append(gradient.masked_fill(~values[-1].isfinite()[:, None], torch.nan))
    return torch.cat(values), torch.cat(gradients)


def find_dependencies(
    log_density: Any, elements: Tensor | None = None
) -> tuple[frozenset[int], ...]:
    """The neighbours of each coordinate in the Markov graph of a ``LogJoint``.

    :param elements: elements that may be independent given the rest, like those of a plate: the element of
        each coordinate, -1 for the rest. If random halves of the elements do not influence the other halves,
        one coordinate of every element is moved at once, which takes only as many gradients as an element
        has coordinates; the graph is the same.
    """
    search, start = _Search(log_density), log_density.start
    generator = search.generator
    point = _finite_point(log_density, start, 0.1, generator)
    _refuse_randomness(log_density, point)
    other = point + 0.1 * _steps(point, generator)
    left = torch.arange(len(point), device=point.device)
    if elements is not None:
        left = search.move_elements(point, other, elements.to(point.device))
    search.move_one_by_one(point, other, left)
    # as wide as priors; and near the origin, since medians of vague priors saturate a logit
    for k, center, spread in ((1, start, 1.0), (2, start, 2.0), (3, torch.zeros_like(start), 1.0)):
        found = _finite_point(log_density, center, spread, generator)
        points = found.expand(_NUM_GROUPINGS, -1)
        search.move_groups(points, points + spread * _steps(points, generator), seed=k)
    return tuple(map(frozenset, search.neighbours))


def missing_dependencies(
    log_density: Any, neighbours: Sequence[set[int] | frozenset[int]], draws: Tensor
) -> list[tuple[int, int]]:
    """Pairs of coordinates that depend on each other at some draws but are not neighbours in a graph.

    Coordinates of a draw are moved to their values in the next draw. Pairs that hardly depend on each other
    are omitted: along a chain, dependence decays until round-off hides it.

    :param draws: draws of a posterior, shape ``(n, D)``, n at least 2.
    """
    search = _Search(log_density, [set(own) for own in neighbours])
    others = draws.roll(-1, 0)
    for k in range(min(_NUM_GROUPINGS, len(draws))):
        part = slice(k, None, _NUM_GROUPINGS)
        search.move_groups(draws[part], others[part], seed=k)
    pairs, sd = [], draws.std(0).tolist()
    for i, own in enumerate(search.neighbours):
        for j in sorted(j for j in own - neighbours[i] if i < j):
            strength = abs(search.second[i, j]) * sd[i] * sd[j]
            # zero if unknown; a graph may lack an interaction of 0.01 nats, half of whose square is lost
            if strength == 0 or strength > 0.01:
                pairs.append((i, j))
    return pairs


class _Search:
    """A search for pairs of coordinates that depend on each other."""

    def __init__(self, log_density: Any, neighbours: list[set[int]] | None = None) -> None:
        self.log_density, self._eps = log_density, log_density.latents.eps
        self.generator = torch.Generator().manual_seed(0)
        #: whether the search extends a given graph, so that new pairs must be confirmed
        self._is_known = neighbours is not None
        self.neighbours = neighbours or [set[int]() for _ in log_density.start]
        self.second: dict[tuple[int, int], float] = {}

    def move_elements(self, point: Tensor, other: Tensor, elements: Tensor) -> Tensor:
        """Moves a coordinate of every element at once, then the rest singly; returns coordinates not done.

        These are all if elements depend on each other, and those that move to a non-finite density.
        """
        device, count = point.device, int(elements.max()) + 1
        step, is_rest = other - point, elements < 0
        base = self._gradients(point[None])[:, None]
        # with probability 1e-6 two dependent elements are never in different halves of 20
        coin = torch.rand(20, count, generator=self.generator, **_ON_CPU)
        is_moved = (coin < 0.5).to(device)[:, elements] & ~is_rest
        changed, change = self._changes(point[None], (is_moved * step)[None], base)
        if (changed[0] & ~is_moved & ~is_rest).any() or not change.isfinite().all():
            return torch.arange(len(point), device=device)
        # the coordinates of each element, padded with -1; none for the rest
        members: list[list[int]] = [[] for _ in range(count + 1)]
        for i, element in enumerate(elements.tolist()):
            if element >= 0:
                members[element].append(i)
        padded = [torch.tensor(own, dtype=torch.long, device=device) for own in members]
        of_rest = is_rest.nonzero().expand(-1, count + 1)
        moving = torch.cat([pad_sequence(padded, padding_value=-1), of_rest])
        return self._move(point, step, moving, elements, base)

    def move_one_by_one(self, point: Tensor, other: Tensor, coordinates: Tensor) -> None:
        """Moves coordinates of a point to another point, one at a time, and notes which gradients change.

        If the density there is not finite, the step is halved.
        """
        left, step, base = coordinates, other - point, self._gradients(point[None])[:, None]
        all_of_one = torch.zeros(len(point), dtype=torch.long, device=point.device)
        for _ in range(MAX_HALVINGS):
            if len(left):
                left, step = self._move(point, step, left[:, None], all_of_one, base), 0.5 * step
        # nothing is known of the rest, which may depend on everything
        everything = torch.ones(len(left), len(point), dtype=torch.bool, device=point.device)
        self._note(left[:, None].expand_as(everything), everything, 0.0 * everything)

    def _move(
        self, point: Tensor, step: Tensor, moving: Tensor, elements: Tensor, base: Tensor
    ) -> Tensor:
        """Notes which gradients change; returns the coordinates that move to a non-finite density.

        :param moving: in each of m moves, the coordinate moved by element, or -1; a last column for the rest.
        :param base: the gradients at the point, shape ``(1, 1, D)``.
        """
        every = torch.arange(len(point), device=point.device)
        failed = list[Tensor]()
        for rows in moving.split(max(_MOST_ENTRIES // len(point), 1)):
            check_time()
            columns = rows[:, elements]
            moved = columns == every
            (changed,), (change,) = self._changes(point[None], (moved * step)[None], base)
            if self._is_known:
                changed = changed & self._confirmed(point, moved, moved * step, changed)
            is_good = change.isfinite().all(-1, keepdim=True)
            self._note(columns, changed & (columns >= 0) & is_good, change / step[columns])
            failed.append((moved & ~is_good).any(0).nonzero()[:, 0])
        return torch.cat(failed)

    def _gradients(self, points: Tensor) -> Tensor:
        """Gradients with the same random numbers in each call, so that the mini-batch is the same."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            return value_and_gradient(self.log_density, points)[1]

    def _note(self, columns: Tensor, changed: Tensor, second: Tensor) -> None:
        """Notes pairs of a moved coordinate and a changed gradient; all tensors have shape ``(m, D)``."""
        row, i = changed.nonzero().T
        values = second[row, i].tolist()
        for j, k, value in zip(columns[row, i].tolist(), i.tolist(), values):
            pair = min(j, k), max(j, k)
            self.second[pair] = max(self.second.get(pair, 0.0), value, key=abs)
            if j != k:
                self.neighbours[j].add(k)
                self.neighbours[k].add(j)

    def _changes(self, points: Tensor, shifts: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Whether gradients change by more than round-off, and by how much; non-finite ones do not count.

        :param points: shape ``(n, D)``; shifts and results have shape ``(n, m, D)``.
        :param base: the gradients at the points, shape ``(n, 1, D)``.
        """
        moved = points[:, None] + shifts
        found = self._gradients(moved.flatten(0, 1)).reshape(moved.shape)
        change = found - base
        size = torch.maximum(found.nan_to_num(0.0).abs().amax(-2, keepdim=True), base.abs())
        return change.abs() > ROUND_OFF * self._eps * size, change

    def _confirmed(self, point: Tensor, moved: Tensor, shifts: Tensor, changed: Tensor) -> Tensor:
        """Which changes belong to known neighbours, or exceed round-off in repeats some ulps away.

        An ill-conditioned gradient, as through a Cholesky factor, has more round-off than its size suggests.
        """
        confirmed = torch.zeros_like(changed)
        for row, j in moved.nonzero().tolist():
            confirmed[row, [*self.neighbours[j], j]] = True
        rows = (changed & ~confirmed).any(-1).nonzero()[:, 0]
        if len(rows):
            ends = torch.cat([point[None], point + shifts[rows]])
            noise = torch.rand(_NUM_REPEATED, len(point), generator=self.generator, **_ON_CPU)
            ulps = 8.0 * torch.finfo(point.dtype).eps * (2 * noise.to(point) - 1)
            found = self._gradients((ends * (1 + ulps[:, None])).flatten(0, 1))
            found = found.unflatten(0, (_NUM_REPEATED, -1))
            change = found[:, 1:] - found[:, :1]
            confirmed[rows] |= change.mean(0).abs() > 6.0 * change.std(0)
        return confirmed

    def move_groups(self, points: Tensor, others: Tensor, seed: int) -> None:
        """Moves coordinates without common neighbours together; if unexpected gradients change, one by one.

        Only a random half of each group is moved, since an unknown neighbour of a coordinate may be in its
        group, or a neighbour of a member. Points are moved to ``others``, both of shape ``(n, D)``.
        """
        coloring = color_columns(self.neighbours, seed)
        dim, count = points.shape[-1], coloring.num_colors
        color = coloring.on(points.device)
        groups = torch.nn.functional.one_hot(color, count).T.bool()
        pairs = [(i, j) for j, own in enumerate(self.neighbours) for i in (*own, j)]
        rows, columns = torch.tensor(pairs, dtype=torch.long, device=points.device).T
        most = max(_MOST_ENTRIES // (dim * count), 1)
        for point, other in zip(points.split(most), others.split(most)):
            coin = torch.rand(len(point), dim, generator=self.generator, **_ON_CPU)
            half = coin.to(point.device) < 0.5
            half |= color >= count - coloring.num_hubs
            moved = groups & half[:, None]
            expected = torch.zeros_like(moved)
            draw, pair = half[:, columns].nonzero().T
            expected[draw, color[columns[pair]], rows[pair]] = True
            base = self._gradients(point)[:, None]
            shifts = torch.where(moved, (other - point)[:, None], 0.0)
            changed, _ = self._changes(point, shifts, base)
            # rows of hubs are known from the columns of hubs
            for i, k in (changed & ~expected).any(-1).nonzero().tolist():
                own = moved[i, k].nonzero()[:, 0]
                known = set(own.tolist()).union(*(self.neighbours[j] for j in own.tolist()))
                if not known.issuperset(changed[i, k].nonzero()[:, 0].tolist()):
                    self.move_one_by_one(point[i], other[i], own)


def _steps(like: Tensor, generator: torch.Generator) -> Tensor:
    """Steps of random sign and size from 0.5 to 1.5, in the shape of a tensor."""
    size = torch.rand(like.shape, generator=generator, **_ON_CPU)
    sign = torch.randint(2, size.shape, generator=generator, device="cpu") * 2 - 1
    return (sign * (0.5 + size)).to(like)


def _finite_point(
    log_density: Any, center: Tensor, spread: float, generator: torch.Generator
) -> Tensor:
    """A point around a center, or between that and the start, with a finite gradient."""
    start = log_density.start
    noise = torch.randn(len(start), generator=generator, **_ON_CPU).to(start)
    for k in range(MAX_HALVINGS):
        point = start + 0.5**k * (center + spread * noise - start)
        if bool(value_and_gradient(log_density, point[None])[1].isfinite().all()):
            return point
    names = log_density.nonfinite_sites(start[None]) or ["the gradient of a site"]
    raise ValueError(
        "expected a finite log density and gradient near the initial values, got one that is not: "
        f"{', '.join(names)}. Give the guide an init_loc_fn with values at which the log density is finite"
    )


def _refuse_randomness(log_density: Any, point: Tensor) -> None:
    """Raises an error if a second evaluation of the density differs from the first."""
    one, other = (value_and_gradient(log_density, point[None])[1][0] for _ in range(2))
    slack = round_off(one) * one.abs().amax()
    differ = ((one - other).abs() > slack).nonzero()[:, 0]
    if len(differ):
        raise ValueError(
            f"expected a model with a deterministic density, got a random one: {len(differ)} of {len(point)} "
            "gradients differ between two runs at the same latents, as with hidden or resampled sites, and "
            "subsampled plates"
        )
