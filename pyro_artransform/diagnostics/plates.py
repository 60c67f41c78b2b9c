# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How close a guide is to the posterior of each element of a plate."""

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from .._base.arguments import first_of
from .importance_sampling import GOOD_GAP, GOOD_KHAT, GOOD_TAIL


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PlateDiagnostics:
    """How close a guide is to the posterior of each element of a plate, given the shared latents.

    :param khat: the Pareto index of each element's weights, with standard error ``khat_se``.
    :param tail_share: the share of each element's weights above the cutoff of their tail.
    :param gap: the log evidence of each element less its ELBO, in nats: estimated from the guide's draws, or
        from draws of the prior if these give significantly more evidence.
    :param index: the indices of the elements in the plate, ascending, shape ``(size,)``; ``None`` if the
        loader does not know them, and elements are in the order of a pass over it.
    """

    plate: str
    khat: Tensor
    khat_se: Tensor
    tail_share: Tensor
    gap: Tensor
    index: Tensor | None

    @property
    def trusted(self) -> Tensor:
        """Whether each element is trusted, shape ``(size,)``, by the thresholds for a whole posterior.

        The largest of many k-hats is large by chance: its threshold is raised by the median largest error.
        """
        bound = GOOD_KHAT + largest_error(len(self.khat)) * self.khat_se
        return ((self.khat <= bound) | (self.tail_share <= GOOD_TAIL)) & (self.gap <= GOOD_GAP)

    @property
    def objection(self) -> str:
        """A sentence on the untrusted elements, worst first; empty if there are none."""
        worst = self.gap.argsort(descending=True)
        named = [
            f"{self.name_of(k)} (k-hat {self.khat[k]:.2f} ± {self.khat_se[k]:.2f})"
            if self.gap[k] <= GOOD_GAP
            else f"{self.name_of(k)} (ELBO {self.gap[k]:,.2f} nats below the log evidence)"
            for k in worst[~self.trusted[worst]].tolist()
        ]
        words = (
            f"the guide fails for {len(named):,} of the {len(self.gap):,} elements of plate '{self.plate}': "
            f"{first_of(named)}: result.elements lists them all"
        )
        return words if named else ""

    def name_of(self, place: int) -> str:
        """The name of an element in messages."""
        if self.index is None:
            return f"element {place} of a pass over the loader"
        return f"element {int(self.index[place])}"

    def __repr__(self) -> str:
        count = f"{int(self.trusted.sum()):,} of {len(self.khat):,}"
        lines = [f"Elements: {count} of plate '{self.plate}' are trusted"]
        for name, values in (("gaps in nats", self.gap), ("k-hats", self.khat)):
            worst = values.argsort(descending=True)[:5].tolist()
            named = [f"{values[k]:.3g} of {self.name_of(k)}" for k in worst]
            lines.append(f"  largest {name:13}{first_of(named)}")
        return "\n".join(lines)


def largest_error(count: int) -> float:
    """The median of the maximum of ``count`` standard normal errors."""
    return NormalDist().inv_cdf(0.5 ** (1 / count))
