# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How close a guide is to the posterior of each element of a plate."""

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from .._base.arguments import first_of
from .importance_sampling import GOOD_GAP, GOOD_KHAT, GOOD_TAIL


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ElementDiagnostics:
    """How close a guide is to the posterior of each element of a plate, or of nested plates.

    :param plate: its name; names of nested plates are joined by "/".
    :param gap: the divergence of each element's posterior from the guide, in nats, shape ``(size,)``.
    :param index: the indices of the elements in the plate, ascending, shape ``(size,)``, or in nested plates,
        ``(size, plates)``; ``None`` if the loader does not know them, and elements are in the order of a pass
        over it.
    """

    plate: str
    gap: Tensor
    index: Tensor | None

    @property
    def trusted(self) -> Tensor:
        """Whether each element is trusted, shape ``(size,)``."""
        raise NotImplementedError

    @property
    def objection(self) -> str:
        """A sentence on the untrusted elements, worst first; empty if there are none."""
        worst = self.gap.argsort(descending=True)
        places = worst[~self.trusted[worst]].tolist()
        named = [f"{self.name_of(k)} ({self._fault(k)})" for k in places]
        words = (
            f"the guide fails for {len(named):,} of the {len(self.gap):,} elements of plate '{self.plate}': "
            f"{first_of(named)}: result.elements lists them all"
        )
        return words if named else ""

    def name_of(self, place: int) -> str:
        """The name of an element in messages."""
        if self.index is None:
            return f"element {place} of a pass over the loader"
        found = self.index[place].tolist()
        return f"element {tuple(found) if isinstance(found, list) else found}"

    def _fault(self, place: int) -> str:
        """What is wrong with an untrusted element, in words."""
        raise NotImplementedError

    def _shown(self) -> dict[str, Tensor]:
        """Numbers of the elements by their names, of which the largest are shown."""
        return {"gaps in nats": self.gap}

    @property
    def count(self) -> str:
        """How many elements are trusted, in words."""
        return (
            f"{int(self.trusted.sum()):,} of {len(self.gap):,} of plate '{self.plate}' are trusted"
        )

    def __repr__(self) -> str:
        lines = [f"Elements: {self.count}"]
        for name, values in self._shown().items():
            worst = values.argsort(descending=True)[:5].tolist()
            named = [f"{values[k]:.3g} of {self.name_of(k)}" for k in worst]
            lines.append(f"  largest {name:13}{first_of(named)}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PlateDiagnostics(ElementDiagnostics):
    """How close a guide is to the posterior of each element of a plate, given the shared latents.

    :param khat: the Pareto index of each element's weights, with standard error ``khat_se``.
    :param tail_share: the share of each element's weights above the cutoff of their tail.
    :param gap: the log evidence of each element less its ELBO, in nats: estimated from the guide's draws, or
        from draws of the prior if these give significantly more evidence.
    """

    khat: Tensor
    khat_se: Tensor
    tail_share: Tensor

    @property
    def trusted(self) -> Tensor:
        """Whether each element is trusted, shape ``(size,)``, by the thresholds for a whole posterior.

        The largest of many k-hats is large by chance: its threshold is raised by the median largest error.
        """
        bound = GOOD_KHAT + largest_error(len(self.khat)) * self.khat_se
        return ((self.khat <= bound) | (self.tail_share <= GOOD_TAIL)) & (self.gap <= GOOD_GAP)

    def _fault(self, place: int) -> str:
        if self.gap[place] <= GOOD_GAP:
            return f"k-hat {self.khat[place]:.2f} ± {self.khat_se[place]:.2f}"
        return f"ELBO {self.gap[place]:,.2f} nats below the log evidence"

    def _shown(self) -> dict[str, Tensor]:
        return {**super()._shown(), "k-hats": self.khat}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ConditionalDiagnostics(ElementDiagnostics):
    """How close a guide is to the posterior of each element of a plate, given all other latents.

    An error of an element is found if the other latents, at the guide's own draws, contradict it. An error
    that all elements of a plate share, such as a shift of all users against all items, is not.

    :param gap: the divergence in nats of each element's conditional posterior from the guide, as that of
        Gaussians with their first and second moments; at most that of the whole posterior if they are
        Gaussian.
    :param gap_se: its standard error.
    """

    gap_se: Tensor

    @property
    def count(self) -> str:
        return f"{super().count}, given all other latents"

    @property
    def trusted(self) -> Tensor:
        """Whether the gap of each element is small, shape ``(size,)``, up to the median largest error."""
        return self.gap - largest_error(len(self.gap)) * self.gap_se <= GOOD_GAP

    def _fault(self, place: int) -> str:
        return f"{self.gap[place]:,.2f} nats from the posterior given all other latents"

    def __repr__(self) -> str:
        return (
            f"{super().__repr__()}\n  Each is compared given all other latents: an error that all elements "
            "of the plate share does not show here"
        )


def largest_error(count: int) -> float:
    """The median of the maximum of ``count`` standard normal errors."""
    return NormalDist().inv_cdf(0.5 ** (1 / count))
