# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Symmetries of a posterior, found by its density.

The components of a mixture have no names of their own: the posterior is the same if they are permuted in all
sites that have them. Factors and hidden units may change their signs as well, and with isotropic priors they
may be rotated. Each such group consists of orthogonal matrices that act along a dimension of some sites. A
candidate is a symmetry if the log density on the constrained space is the same at spread-out draws, up to
round-off, for matrices that generate the group. Nothing is read from the code of the model.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .sites import Latents

# points anywhere at which candidates are compared with the identity, and draws: at least one of each start,
# since near one mode a posterior may be symmetric although it has others
_NUM_POINTS, _NUM_DRAWS = 4, 8
# nats by which the density of draws may change, and that of the median draw, unless round-off is larger
_LEAST_NATS, _MOST_NATS = 1e-3, 0.1

Values = Mapping[str, Tensor]
#: a site and its dimensions of components, counted from the right; none if the whole site is one component
Slot = tuple[str, tuple[int, ...]]
PERMUTATION, SIGN, SIGNED, ROTATION = "permutation", "sign", "signed permutation", "rotation"
_WORDS = {
    PERMUTATION: "permutations of",
    SIGN: "changes of sign of",
    SIGNED: "permutations and changes of sign of",
    ROTATION: "rotations of",
}


@dataclass(frozen=True)
class Symmetry:
    """A group of orthogonal matrices ``(K, K)`` that may act on a posterior without changing it.

    :param kind: "permutation", "sign", "signed permutation" or "rotation", which includes reflections.
    :param slots: the sites, each with the dimensions of its components, counted from the right as in Pyro;
        a site without such dimensions is a single component.
    :param size: the number K of components.
    """

    kind: str
    slots: tuple[Slot, ...]
    size: int

    @property
    def num_images(self) -> float:
        """The number of images of a draw, infinite for rotations."""
        permutations = math.factorial(self.size) if self.kind in (PERMUTATION, SIGNED) else 1
        signs = 2**self.size if self.kind in (SIGN, SIGNED) else 1
        return math.inf if self.kind == ROTATION else permutations * signs

    def __str__(self) -> str:
        count = "" if self.kind == ROTATION else f"{_count(self.num_images)} "
        *others, last = map(_named, self.slots)
        slots = f"{', '.join(others)} and {last}" if others else last
        return f"the {count}{_WORDS[self.kind]} {slots}"

    def generators(self, like: Tensor) -> Iterator[Tensor]:
        """Matrices ``(K, K)`` that generate the group; one rotation, as others would be no other test."""
        if self.kind == ROTATION:
            yield from self.spread(1, like)
            return
        identity = self._identity(like)
        if self.kind != SIGN:
            yield torch.cat([identity[:2].flip(0), identity[2:]])
            yield identity.roll(1, 0)
        if self.kind != PERMUTATION:
            for row in identity:
                yield identity - 2 * row.diag()

    def spread(self, count: int, like: Tensor) -> Tensor:
        """Elements ``(count, K, K)`` among which each component has many places, or both signs.

        They are the same in each call.
        """
        identity, own = self._identity(like), _own_numbers()
        if self.kind == ROTATION:
            normal = torch.randn(
                (count, *identity.shape), generator=own, dtype=like.dtype, device="cpu"
            )
            return torch.linalg.qr(normal.to(like.device)).Q
        found = identity.expand(count, -1, -1)
        if self.kind != SIGN:
            places = torch.randperm(self.size, generator=own, dtype=torch.long, device="cpu")
            found = torch.stack([identity[places.roll(k).to(like.device)] for k in range(count)])
        if self.kind != PERMUTATION:
            half = 1 + count // 2, self.size
            uniform = torch.rand(half, generator=own, dtype=like.dtype, device="cpu")
            signs = torch.where(uniform < 0.5, -1.0, 1.0).to(like)
            found = found * torch.stack([signs, -signs], 1).flatten(0, 1)[:count, :, None]
        return found

    def random(self, count: int, like: Tensor) -> Tensor:
        """Independent elements ``(count, K, K)``, uniform in the group."""
        found = self._identity(like).expand(count, -1, -1)
        if self.kind == ROTATION:
            factor, upper = torch.linalg.qr(torch.randn_like(found))
            return factor * upper.diagonal(dim1=1, dim2=2).sign()[:, None]
        if self.kind != SIGN:
            found = found[0][torch.rand_like(found[..., 0]).argsort(1)]
        if self.kind != PERMUTATION:
            found = found * torch.rand_like(found[..., :1]).sub(0.5).sign()
        return found

    def _identity(self, like: Tensor) -> Tensor:
        return torch.eye(self.size, dtype=like.dtype, device=like.device)

    def applied(self, values: Values, elements: Tensor) -> dict[str, Tensor]:
        """The images of values ``(n,) + site shape`` by elements ``(n, K, K)``."""
        found = dict(values)
        for name, dims in self.slots:
            for dim in dims or (None,):
                value = found[name]
                moved = value if dim is None else value.movedim(dim, 1)
                image = elements.to(value) @ moved.reshape(len(moved), self.size, -1)
                image = image.view_as(moved)
                found[name] = image if dim is None else image.movedim(1, dim)
        return found

    def components(self, values: Values) -> Tensor:
        """Values of each component, ``(n, K, F)``, on which elements act from the left."""
        parts = []
        for name, dims in self.slots:
            value = values[name]
            moved = value.movedim(dims, tuple(range(1, 1 + len(dims))))
            if len(dims) < 2:
                parts.append(moved.reshape(len(value), self.size, -1))
            else:  # a matrix of components: what it has for one of them
                matrix = moved.reshape(len(value), self.size, self.size, -1)
                diagonal = matrix.diagonal(dim1=1, dim2=2).mT
                parts += [diagonal, matrix.mean(1), matrix.mean(2)]
        return torch.cat(parts, -1)

    def invariants(self, values: Values) -> Tensor:
        """Functionals that are the same for all images, such as sorted components, ``(n, F)``."""
        parts = [self._invariant(values[name], dims) for name, dims in self.slots]
        return torch.cat([part.reshape(len(part), -1) for part in parts], 1)

    def _invariant(self, value: Tensor, dims: tuple[int, ...]) -> Tensor:
        if self.kind == ROTATION:
            moved = value.movedim(dims, (-1,)).reshape(len(value), -1, self.size)
            return torch.cat([moved.square().sum(-1), (moved * moved.roll(1, 1)).sum(-1)], 1)
        value = value if self.kind == PERMUTATION else value.square()
        if self.kind == SIGN:
            return value
        moved = value.movedim(dims, tuple(range(-len(dims), 0)))
        return moved.flatten(-len(dims)).sort(-1).values

    def nearest(self, products: Tensor) -> Tensor:
        """The elements M with the largest trace of M P, for matrices P ``(n, K, K)``."""
        if self.kind == ROTATION:  # orthogonal Procrustes
            left, _, right = torch.linalg.svd(products)
            return (left @ right).mT
        found = self._identity(products).expand_as(products)
        if self.kind != SIGN:
            found = found[0][_assigned(products if self.kind == PERMUTATION else products.abs())]
        if self.kind != PERMUTATION:
            traces = (found @ products).diagonal(dim1=1, dim2=2)
            found = found * torch.where(traces < 0, -1.0, 1.0)[..., None]
        return found


def _own_numbers() -> torch.Generator:
    """Random numbers that leave those of the user as they are."""
    return torch.Generator(device="cpu").manual_seed(0)


def _count(number: float) -> str:
    return f"{number:,}" if number < 1e6 else f"{number:.1e}"


def _named(slot: Slot) -> str:
    name, dims = slot
    if not dims:
        return name
    return f"dimension{'s' * (len(dims) > 1)} {' and '.join(map(str, dims))} of {name}"


@torch.no_grad()
def find_symmetries(
    log_density: Callable[[Tensor], Tensor], latents: Latents, u: Tensor
) -> tuple[Symmetry, ...]:
    """The symmetries of a density.

    :param log_density: on the unconstrained space, its Jacobian included.
    :param u: spread-out draws there, shape ``(n, latent_dim)``, to which points uniform in (-2, 2) are added.
    :return: symmetries none of which contains another one of its kind.
    """
    # near modes, components may be so far apart that their weights do not matter
    shape = _NUM_POINTS, latents.latent_dim
    uniform = torch.rand(shape, generator=_own_numbers(), dtype=u.dtype, device="cpu")
    anywhere = 4 * uniform.to(u.device) - 2
    compared = _Comparison(log_density, latents, _some(u, _NUM_DRAWS), anywhere)
    found, left = list[Symmetry](), 300
    for count in range(1, 7):  # sites of a candidate
        candidates = [*itertools.islice(_candidates(latents, found, count), left)]
        left -= len(candidates)
        # one draw excludes most of them
        found += filter(compared.holds, compared.hold_at_first(candidates))
    # all signs of a site change where those of its components do
    found = [s for s in found if not any(_contains(s.slots, s.kind, o) for o in found if o != s)]
    permuted = [s for s in found if s.kind == PERMUTATION]
    for other in permuted:
        if (sign := replace(other, kind=SIGN)) in found:
            kind = ROTATION if compared.holds(replace(other, kind=ROTATION)) else SIGNED
            found = [s for s in found if s not in (other, sign)]
            found.append(replace(other, kind=kind))
    return tuple(found)


@torch.no_grad()
def confirmed(
    symmetries: Iterable[Symmetry],
    log_density: Callable[[Tensor], Tensor],
    latents: Latents,
    u: Tensor,
) -> tuple[Symmetry, ...]:
    """Those symmetries that hold at draws of the posterior ``(n, latent_dim)``, too.

    A density of millions of nats, as where draws are spread out, has a round-off of nats.
    """
    compared = _Comparison(log_density, latents, _some(u, _NUM_DRAWS), u[:0])
    return tuple(s for s in symmetries if compared.holds(s, _MOST_NATS))


def _some(u: Tensor, count: int) -> Tensor:
    """At most so many of the draws, from all parts of them."""
    return u[:: max(len(u) // count, 1)][:count]


class _Comparison:
    """Compares the density of draws and other points with that of their images, on the constrained space."""

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        latents: Latents,
        draws: Tensor,
        others: Tensor,
    ) -> None:
        self._log_density, self._latents = log_density, latents
        values = latents.constrain(torch.cat([others, draws]))
        expected, is_exact = self._density(values)
        slack = torch.finfo(expected.dtype).eps ** (2 / 3) * (1 + expected.abs())
        slack[len(others) :].clamp_(min=_LEAST_NATS)
        is_usable = expected.isfinite() & is_exact
        self._values = {name: value[is_usable] for name, value in values.items()}
        self._expected, self._slack = expected[is_usable], slack[is_usable]

    def _density(self, values: Values) -> tuple[Tensor, Tensor]:
        """The log densities ``(n,)``, and whether values survive the map to the unconstrained space."""
        u = self._latents.unconstrain(values)
        again, ladj = self._latents.constrain_with_ladj(u)
        # rounding of values such as entries of a simplex next to zero, of which a draw is not compared
        errors = [(again[k] - v).abs() > 1e-4 * v.abs() for k, v in values.items()]
        is_exact = ~torch.stack([error.reshape(len(u), -1).any(1) for error in errors]).any(0)
        return self._log_density(u) - ladj, is_exact

    def hold_at_first(self, candidates: Sequence[Symmetry]) -> Iterable[Symmetry]:
        """Those candidates whose first generator keeps the density of the first draw."""
        if not (candidates and len(self._expected)):
            return ()
        first = {name: value[:1] for name, value in self._values.items()}
        like = self._expected
        images = [c.applied(first, next(c.generators(like))[None]) for c in candidates]
        density, _ = self._density({k: torch.cat([i[k] for i in images]) for k in first})
        is_same = (density - self._expected[0]).abs() <= self._slack[0]
        return itertools.compress(candidates, is_same.tolist())

    def holds(self, symmetry: Symmetry, most: float = math.inf) -> bool:
        """Whether all generators keep the density of all draws, and that of the median draw by nats."""
        generators = symmetry.generators(self._expected)
        return all(self._keeps_density(symmetry, generator, most) for generator in generators)

    def _keeps_density(self, symmetry: Symmetry, element: Tensor, most: float) -> bool:
        elements = element.expand(len(self._expected), -1, -1)
        density, is_exact = self._density(symmetry.applied(self._values, elements))
        change, slack = (density - self._expected).abs()[is_exact], self._slack[is_exact]
        return bool(len(change) and (change <= slack).all() and change.median() <= most)


def _candidates(latents: Latents, found: Sequence[Symmetry], count: int) -> Iterator[Symmetry]:
    """Sets of ``count`` slots of one size, without those that contain a symmetry that was found."""
    tables: dict[tuple[str, int], list[Slot]] = {}
    for name, site in latents.sites.items():
        if site.is_unconstrained:
            tables.setdefault((SIGN, 1), []).append((name, ()))
        dims_of: dict[int, list[int]] = {}
        for dim, size in enumerate(site.shape, -len(site.shape)):
            if size > 1:
                dims_of.setdefault(size, []).append(dim)
        for size, dims in dims_of.items():
            for chosen in [*zip(dims), *itertools.combinations(dims, 2)]:
                tables.setdefault((PERMUTATION, size), []).append((name, chosen))
                if site.is_unconstrained and len(chosen) == 1:
                    tables.setdefault((SIGN, size), []).append((name, chosen))
    for (kind, size), slots in tables.items():
        for some in itertools.combinations(slots, count):
            has_twice = len({name for name, _ in some}) < count
            if not (has_twice or any(_contains(some, kind, other) for other in found)):
                yield Symmetry(kind, some, size)


def _contains(slots: tuple[Slot, ...], kind: str, other: Symmetry) -> bool:
    """Whether a candidate is composed of a symmetry and another one."""
    if other.kind != kind:
        return False
    if kind == SIGN and not slots[0][1]:  # all components at once
        return {name for name, _ in other.slots} <= {name for name, _ in slots}
    return {*_dimensions(other.slots)} <= {*_dimensions(slots)}


def _dimensions(slots: tuple[Slot, ...]) -> Iterator[tuple[str, int | None]]:
    return ((name, dim) for name, dims in slots for dim in dims or (None,))


def _assigned(gain: Tensor) -> Tensor:
    """The component that takes each place, ``(n, K)``, with the largest total of gains ``(n, K, K)``.

    With many components, no exchange of two makes it larger.
    """
    size = gain.shape[1]
    places = torch.arange(size, device=gain.device)
    if size <= 6:  # beyond, pairs are exchanged while that helps
        every = [*itertools.permutations(range(size))]
        orders = torch.tensor(every, dtype=torch.long, device=gain.device)
        at_once = max(2**22 // orders.numel(), 1)  # numbers in a table of costs
        best = [part[:, orders, places].sum(-1).argmax(1) for part in gain.split(at_once)]
        return orders[torch.cat(best)]
    order, rows = places.expand(len(gain), -1).clone(), torch.arange(len(gain), device=gain.device)
    for _ in range(size):
        before = order.clone()
        for i, j in itertools.combinations(range(size), 2):
            left, right = order[:, i].clone(), order[:, j].clone()
            more = gain[rows, right, i] + gain[rows, left, j]
            is_better = more > gain[rows, left, i] + gain[rows, right, j]
            order[:, i] = torch.where(is_better, right, left)
            order[:, j] = torch.where(is_better, left, right)
        if torch.equal(before, order):
            break
    return order
