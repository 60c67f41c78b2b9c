# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Steps whose loss or gradient is not finite: they are skipped, counted, and end a fit if they go on."""

from collections import Counter
from dataclasses import dataclass, field

from ..config import OptimizationConfig
from ..objectives.objective import Objective


class FitError(RuntimeError):
    """A fit that cannot go on."""


@dataclass
class SkippedSteps:
    """How many steps were skipped, how many of them in a row, and the sites that made them so."""

    count: int = 0
    in_a_row: int = 0
    sites: Counter[str] = field(default_factory=Counter)

    def note(self, objective: Objective, config: OptimizationConfig) -> None:
        """Counts one more, and names its sites.

        :raises FitError: if there are too many in a row.
        """
        self.count += 1
        self.in_a_row += 1
        if self.count <= config.max_named:  # naming a site runs the model again
            self.sites.update(objective.nonfinite_sites() or ["the gradient"])
        if self.in_a_row >= config.max_skips:
            raise FitError(
                f"the fit stopped: the loss or its gradient was not finite in {self.in_a_row} steps "
                f"in a row, because of {', '.join(self.sites)}. The parameters are finite, as the "
                "last good step left them. Check the data, and that the model and its gradient are finite "
                "for all its latents: what a mask or torch.where leaves out of a value, NaN for example, "
                "stays in its gradient"
            )
