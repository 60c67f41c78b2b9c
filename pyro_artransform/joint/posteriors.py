# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Many posteriors in one: data sets in a plate, each with latents of its own."""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graphs.markov_graph import MarkovGraph
from .density import LogJoint
from .element_terms import log_density_by_element
from .protocols import GuideByCoordinate

_NUM_COMPARED = 4  # draws at which what is outside of a plate is compared


@dataclass(frozen=True, eq=False)
class Posteriors:
    """A guide of latents all of which are in a plate, and independent of those of its other elements.

    :param plate: its name.
    :param elements: the element of each coordinate, shape ``(latent_dim,)``.
    """

    log_joint: LogJoint
    guide: GuideByCoordinate
    plate: str
    elements: Tensor

    @classmethod
    def of(cls, log_joint: LogJoint, guide: object) -> "Posteriors | None":
        """Those of the plate with the most elements; None where no graph says that there are some."""
        found = None
        if not isinstance(guide, GuideByCoordinate) or log_joint.is_random:
            return None
        for name, frame in log_joint.plates.items():
            elements = log_joint.latents.elements_of(frame).to(log_joint.start.device)
            is_more = found is None or frame.size > found.size
            if frame.size > 1 and is_more and _are_apart(guide.markov_graph(), elements.tolist()):
                candidate = cls(log_joint, guide, name, elements)
                with suppress(ValueError):  # discrete latents outside of the plate
                    rest = candidate.log_weights(_NUM_COMPARED)[2]
                    found = candidate if bool((rest == rest[0]).all()) else found
        return found

    @property
    def size(self) -> int:
        """How many there are."""
        return self.log_joint.plates[self.plate].size

    @torch.no_grad()
    def log_weights(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws ``(n, latent_dim)``, log weights of each posterior ``(n, size)``, and of the rest ``(n,)``.

        A log weight is of the density of an element's latents and data over the guide's density of these
        latents. With what is outside of the plate, a constant, they add up to the log weights of the draws.
        """
        z, log_q = self.guide.sample_and_log_prob_by_coordinate(n)
        log_p, rest = log_density_by_element(self.log_joint, z, self.plate)
        return z, log_p - torch.zeros_like(log_p).index_add_(1, self.elements, log_q), rest


def _are_apart(graph: MarkovGraph, elements: list[int]) -> bool:
    """Whether all coordinates are in elements, and none depends on one of another element."""
    root = graph.elimination.root
    pairs = [*graph.edges, *((root[0], j) for j in root[1:])]
    return min(elements) >= 0 and all(elements[i] == elements[j] for i, j in pairs)
