# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Runs of a model or guide with all draws in one plate, left of its own plates."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import NamedTuple

import pyro
from pyro import poutine
from torch import Tensor

from .._base.comparison import agree
from .handlers import SiteLogProbs
from .run_once import run_once
from .traces import latent_nodes, plate_nesting, runs_model
from .vectorization import NUM_COMPARED, Draws, Terms, evaluate_many, stack

DRAWS = "_draws"  #: name of the plate of draws
_LOG_PROB = "_log_prob"


class DrawPlate(NamedTuple):
    """The plate of draws, left of all plates of a model."""

    size: int | None  #: the number of draws, or ``None`` for a single draw, without this plate
    num_plates: int  #: the number of dimensions that the plates of the model take

    def place(self, values: Draws, event_dims: Mapping[str, int]) -> Terms:
        """Reshapes values ``(n,) + site shape`` so that draws are left of all plates."""
        placed = dict(values)
        if self.size is None:
            return placed
        for name, value in values.items():
            padding = (1,) * (self.num_plates + 1 + event_dims[name] - value.dim())
            placed[name] = value.reshape(value.shape[:1] + padding + value.shape[1:])
        return placed

    def run(self, model: Callable[[], object]) -> None:
        """Runs a model in the plate."""
        plate = self.size and pyro.plate(DRAWS, self.size, dim=-1 - self.num_plates)
        with plate or nullcontext():
            model()

    def total(self, log_probs: Mapping[str, Tensor], initial: Tensor) -> Tensor:
        """Sums log densities of sites over all dimensions but the draws, and adds ``initial``."""
        for log_prob in log_probs.values():
            if self.size is None:
                initial = initial + log_prob.sum()
            elif log_prob.dim() == 1 + self.num_plates:
                initial = initial + log_prob.reshape(log_prob.shape[0], -1).sum(-1)
            else:
                raise ValueError(
                    f"expected {1 + self.num_plates} batch dimensions, got {log_prob.dim()}"
                )
        return initial


class GuideSampler:
    """Draws from a guide, with log densities; vectorized by a plate if that agrees with single runs."""

    def __init__(self, run: Callable[[], object], num_plates: int = 0) -> None:
        trace = run_once(run, validated=True)
        self._run, self._num_plates = run, max(num_plates, plate_nesting(trace))
        #: shapes by latent, auxiliary ones included
        self.shapes = {node["name"]: node["value"].shape for node in latent_nodes(trace)}
        self._runs_model, self._indices = runs_model(trace), Terms()
        self.is_vectorized = False
        with suppress(Exception):  # any error means that the guide does not vectorize
            drawn = self._evaluate({}, NUM_COMPARED)
            self.is_vectorized = agree(drawn, evaluate_many(self._evaluate, drawn, "loop"))

    def __call__(self, n: int) -> tuple[Terms, Tensor]:
        """Draws by site, ``(n,) + site shape``, and their log densities ``(n,)``."""
        if self.is_vectorized:
            drawn = self._evaluate({}, n)
        else:
            drawn = stack([self._evaluate({}, None) for _ in range(n)])
        return drawn, drawn.pop(_LOG_PROB)

    def _evaluate(self, given: Draws, size: int | None) -> Terms:
        """Values of all sites and their log density; draws sites that are not in ``given``."""
        scored = SiteLogProbs({**self._indices, **given} if given else {})
        plate = DrawPlate(size, self._num_plates)
        with poutine.block(), scored:
            plate.run(self._run)
        batch = () if size is None else (size,)
        found = {k: scored.values[k].reshape(batch + shape) for k, shape in self.shapes.items()}
        # single runs at these draws see the same subsamples
        self._indices = {k: v for k, v in scored.values.items() if k not in scored.log_probs}
        zero = next(iter(found.values())).new_zeros(batch)
        names = self.shapes if self._runs_model else scored.log_probs  # without the model's data
        counted = {name: scored.log_probs[name] for name in names}
        return {**found, _LOG_PROB: plate.total(counted, zero)}
