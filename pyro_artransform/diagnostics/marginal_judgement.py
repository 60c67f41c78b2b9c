# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Which errors of means and standard deviations are small, with bounds that hold for all at once."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..joint import Latents
from .marginal_errors import MOST_MEMORY, MarginalErrors, critical_value

#: errors of a mean, in sds of the posterior, that are trusted
GOOD_MEAN_SHIFT = 0.15
#: relative errors of a standard deviation that are trusted
GOOD_SD_ERROR = 0.15
#: the probability that all bounds hold
CONFIDENCE = 0.975


class Bounded(NamedTuple):
    """Errors of all latents with simultaneous bounds.

    :param errors: shape ``(D,)``.
    :param widths: half of the widths of their intervals.
    :param most: the largest error that is trusted.
    """

    errors: Tensor
    widths: Tensor
    most: float

    @property
    def are_off(self) -> Tensor:
        """Which errors are larger than what is trusted, beyond doubt."""
        return self.errors.abs() - self.widths > self.most

    @property
    def bound(self) -> float:
        """No error is larger than this, beyond doubt; infinite where one is not known."""
        return float((self.errors.abs() + self.widths).nan_to_num(torch.inf, torch.inf).max())


class Judgement(NamedTuple):
    """Which errors of means and of sds are too large, and which latents chains hardly moved."""

    errors: MarginalErrors
    shifts: Bounded
    ratios: Bounded
    are_slow: Tensor

    @property
    def is_off(self) -> bool:
        """Whether an error is too large beyond doubt, or chains could not tell."""
        found = self.shifts.are_off | self.ratios.are_off | self.are_slow
        return bool(found.any())

    @property
    def is_open(self) -> bool:
        """Whether none is too large beyond doubt, and one may be twice as large as what is trusted."""
        is_known = all(part.bound <= 2 * part.most for part in (self.shifts, self.ratios))
        return not (self.is_off or is_known)

    @property
    def is_good(self) -> bool:
        """Whether the errors are known to be small."""
        return not (self.is_off or self.is_open)

    def words(self, latents: Latents) -> str:
        """The same in words."""
        bounds = self.shifts.bound, self.ratios.bound
        if self.is_off:
            return "; ".join(self._objections(latents))
        if self.is_open:
            return (
                f"errors are known too little ({bounds_in_words(*bounds)}): diagnostics.marginals with "
                "more num_chains knows more"
            )
        dim = latents.latent_dim
        of = " of the only latent" if dim == 1 else f" of all {dim:,} latents"
        return bounds_in_words(*bounds, of)

    def _objections(self, latents: Latents) -> Iterator[str]:
        shifts, ratios = self.shifts, self.ratios
        if shifts.are_off.any():
            worst = _worst(shifts.errors.abs(), shifts.are_off)
            yield (
                f"{_count(shifts.are_off, 'means')} off by more than {GOOD_MEAN_SHIFT} sd (that of "
                f"{_name(latents, worst)} by {shifts.errors[worst]:.2f} ± {shifts.widths[worst]:.2f})"
            )
        if ratios.are_off.any():
            ratio = self.errors.sd_ratio
            worst = _worst(ratio.log().abs(), ratios.are_off)
            yield (
                f"{_count(ratios.are_off, 'sds')} off by more than {100 * GOOD_SD_ERROR:.0f} % (that of "
                f"{_name(latents, worst)} is {ratio[worst]:.2f} ± {ratios.widths[worst]:.2f} of the "
                "posterior's)"
            )
        if self.are_slow.any():
            worst = _worst(self.errors.memory, self.are_slow)
            yield (
                f"{_count(self.are_slow, 'latents')} hardly moved by the chains, as "
                f"{_name(latents, worst)} is, and errors may be larger: take more num_steps, or fit the "
                "guide for longer"
            )


def bounds_in_words(mean: float, sd: float, of: str = "") -> str:
    """Bounds of the errors of means, in sds, and of the relative ones of sds, both rounded up."""
    hundredths = [math.ceil(round(100 * b, 3)) if math.isfinite(b) else b for b in (mean, sd)]
    return f"means{of} within {hundredths[0] / 100:.2f} sd, sds within {hundredths[1]:.0f} %"


def judged(errors: MarginalErrors, num_samples: int) -> Judgement:
    """What errors amount to.

    :param num_samples: how many independent chains or draws are behind their standard errors.
    """
    width = critical_value(2 * len(errors.mean_shift), num_samples, CONFIDENCE)
    shifts = Bounded(errors.mean_shift, width * errors.mean_shift_se, GOOD_MEAN_SHIFT)
    ratios = Bounded(errors.sd_ratio - 1, width * errors.sd_ratio_se, GOOD_SD_ERROR)
    return Judgement(errors, shifts, ratios, ~(errors.sure_memory <= MOST_MEMORY))


def _count(chosen: Tensor, what: str) -> str:
    count = int(chosen.sum())
    return f"{count:,} of {len(chosen):,} {what} {'is' if count == 1 else 'are'}"


def _worst(values: Tensor, chosen: Tensor) -> int:
    return int(torch.where(chosen, values.nan_to_num(torch.inf), -torch.inf).argmax())


def _name(latents: Latents, index: int) -> str:
    """The site and the place of a coordinate, as in ``z[3, 1]``."""
    for site in latents.sites.values():
        if index < site.size:
            place: list[int] = []
            for size in reversed(site.unconstrained_shape):
                index, last = divmod(index, size)
                place.insert(0, last)
            return f"{site.name}{place or ''}"
        index -= site.size
    raise IndexError(f"index: expected less than {latents.latent_dim} coordinates")
