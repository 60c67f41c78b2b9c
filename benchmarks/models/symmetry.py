# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A model with the symmetries of its posterior, and data that are the same in either precision."""

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: a site, and its dimensions of components from the right; none if the site as a whole is one component
Slot = tuple[str, tuple[int, ...]]


class Symmetry(NamedTuple):
    """A group that leaves a posterior as it is.

    :param kind: "permutation", "sign", "signed permutation" or "rotation".
    :param slots: what it moves at once. Rows and columns of a matrix may be permuted together.
    :param size: the number of components.
    """

    kind: str
    slots: frozenset[Slot]
    size: int

    def images(self, values: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The images of values by site, ``batch + site shape``, under each permutation or all signs."""
        elements = permutations(range(self.size))
        if self.kind == "sign":
            elements = product((1, -1), repeat=self.size)
        for element in map(torch.tensor, elements):
            found = dict(values)
            for name, dims in self.slots:
                for dim in dims or (None,):
                    found[name] = self._moved(found[name], dim, element)
            yield found

    def _moved(self, value: Tensor, dim: int | None, element: Tensor) -> Tensor:
        if self.kind == "permutation":
            return value.index_select(-1 if dim is None else dim, element)
        return value * (element if dim is None else element.reshape(-1, *(1,) * (-1 - dim)))


class Center(NamedTuple):
    """Means and sds of each site, in its shape, which tell the images of a draw apart."""

    mean: Mapping[str, Tensor]
    sd: Mapping[str, Tensor]

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> "Center":
        """Of draws by site, ``(n,) + site shape``."""
        return cls(*({k: fn(z, 0) for k, z in values.items()} for fn in (torch.mean, torch.std)))

    def away(self, values: Mapping[str, Tensor]) -> Tensor:
        """The squared distance of each draw in sds, ``(n,)``."""
        found = [(values[k] - self.mean[k]) / self.sd[k] for k in self.mean]
        return torch.stack([z.square().reshape(len(z), -1).sum(1) for z in found]).sum(0)

    def nearest(
        self, values: Mapping[str, Tensor], symmetry: Symmetry
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The image of each draw that is nearest, and its number."""
        number = torch.stack([self.away(image) for image in symmetry.images(values)]).argmin(0)
        found = {name: z.clone() for name, z in values.items()}
        for k, image in enumerate(symmetry.images(values)):
            for name, _ in symmetry.slots:
                found[name][number == k] = image[name][number == k]
        return found, number


class Symmetric(NamedTuple):
    """A model with its arguments, and the symmetries of its posterior.

    Permutations and signs that a rotation contains are not listed.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    symmetries: frozenset[Symmetry]


def slot(name: str, *dims: int) -> Slot:
    return name, tuple(sorted(dims))


def permutation(size: int, *slots: Slot) -> Symmetry:
    return Symmetry("permutation", frozenset(slots), size)


def sign(size: int, *slots: Slot) -> Symmetry:
    return Symmetry("sign", frozenset(slots), size)


def signed_permutation(size: int, *slots: Slot) -> Symmetry:
    return Symmetry("signed permutation", frozenset(slots), size)


def rotation(size: int, *slots: Slot) -> Symmetry:
    return Symmetry("rotation", frozenset(slots), size)


class Numbers:
    """Random numbers of a seed in order, drawn in double precision."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def poisson(self, rate: Tensor) -> Tensor:
        return torch.poisson(rate.double(), generator=self.generator)

    def categorical(self, probs: Tensor, count: int) -> Tensor:
        """Numbers of categories, ``batch + (count,)``, of probabilities ``batch + (K,)``."""
        flat = probs.double().reshape(-1, probs.shape[-1])
        found = torch.multinomial(flat, count, True, generator=self.generator)
        return found.reshape(*probs.shape[:-1], count)

    def dirichlet(self, concentration: Tensor) -> Tensor:
        return torch._sample_dirichlet(concentration.double(), self.generator)


def data(*values: Tensor) -> tuple[Tensor, ...]:
    """Real values in the default precision, and integers as they are."""
    dtype = torch.get_default_dtype()
    return tuple(v.to(dtype) if v.is_floating_point() else v for v in values)
