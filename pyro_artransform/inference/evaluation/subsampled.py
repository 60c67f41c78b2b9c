# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Models that subsample their data themselves, in passes over the indices of the subsampled plate."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from pyro.distributions import validation_enabled
from torch import Tensor

from ...diagnostics.importance_weights import ModelAndGuide
from ...model import FullDataDensity, LogJoint
from ...model.handlers import GivenSubsample
from ...model.run_once import run_once
from ...model.traces import subsampled_plates
from ...model.vectorization import ModelFailures, describe
from ..loader import Batch
from ..optimization.minibatches import PassEstimate
from ..optimization.objective import PyroObjective
from .elements import NOT_WEIGHED, ElementWeights, weigh_batches
from .evaluate import evaluate, evaluate_minibatches
from .verdict import FitStatus

_MOST_BATCHES = 500  # of a pass that has all elements equally often
# errors of a model whose indices are set
_REFUSALS = (LookupError, RuntimeError, TypeError, *ModelFailures)


class PlatePasses:
    """Passes over all elements of a plate that a model subsamples, in batches of its subsample's size.

    :param plate: the name of the plate.
    """

    def __init__(self, subject: ModelAndGuide, plate: str, size: int, subsample_size: int) -> None:
        self._subject, self._plate, self._size, self._length = subject, plate, size, subsample_size
        start = Batch((torch.arange(subsample_size, device="cpu"),), {})
        #: the density of the model as a function of the indices
        self.log_joint = LogJoint(self.given(subject.model), *start)
        self.log_joint = self.log_joint.with_coordinates(subject.log_joint.coordinates)
        self.num_batches = len(self._starts(size))  #: of one pass

    @classmethod
    def of(cls, subject: ModelAndGuide) -> "PlatePasses | None":
        """Passes over the only subsampled plate of a model; ``None`` if there are none or several."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            frames = subsampled_plates(run_once(subject.model, subject.args, subject.kwargs))
        sizes = {(frame.name, frame.full_size or 0, frame.size) for frame in frames}
        return cls(subject, *sizes.pop()) if len(sizes) == 1 else None

    def given(self, function: Callable[..., Any]) -> Callable[[Tensor], Any]:
        """A model or guide as a function of the indices of the plate."""
        _, _, args, kwargs, _ = self._subject

        def run(index: Tensor) -> Any:
            with GivenSubsample(self._plate, index):
                return function(*args, **kwargs)

        return run

    def _starts(self, end: int) -> range:
        return range(0, end, self._length)

    def batches(self) -> Iterator[tuple[Batch, list[int]]]:
        """The indices of one pass, as arguments and as rows; the last batch overlaps the one before."""
        for first in self._starts(self._size):
            own = torch.arange(self._length, device="cpu") + min(first, self._size - self._length)
            yield Batch((own,), {}), own.tolist()

    def of_all_data(self) -> FullDataDensity | None:
        """The density of all data; ``None`` if latents are in the plate, or the density remains random.

        Passes go round until each element is in equally many batches.
        """
        size, length = self._size, self._length
        latents = self.log_joint.structure(*next(self.batches())[0]).subsampled_latents
        if latents or size // math.gcd(size, length) > _MOST_BATCHES:
            return None
        every = torch.arange(length, device="cpu")
        starts = self._starts(math.lcm(size, length))
        whole = FullDataDensity(
            self.log_joint, [Batch(((every + first) % size,), {}) for first in starts]
        )
        return None if whole.is_random else whole

    @torch.no_grad()
    def weighed(self, num_gradients: int) -> ElementWeights | str:
        """The weights of all elements and of shared latents, or why they are unknown."""
        try:
            with validation_enabled(False):
                first, _ = next(self.batches())
                model, guide = map(self.given, self._subject[:2])
                objective = PyroObjective(model, guide, first, self.log_joint)
                return weigh_batches(objective, self.batches(), num_gradients // self.num_batches)
        except Exception as error:  # as for mini-batches of a loader
            return NOT_WEIGHED.format(describe(error))


@torch.no_grad()
def evaluate_subsampled(
    subject: ModelAndGuide, status: FitStatus, num_gradients: int, *, is_loop: bool
) -> dict[str, Any]:
    """Evaluates a guide of a model that subsamples its data, with passes over all of these if possible.

    :return: fields of a ``FitResult``.
    """
    passes, whole = None, None
    with suppress(*_REFUSALS):
        if (passes := PlatePasses.of(subject)) is not None:
            whole = passes.of_all_data()
    if passes is None:
        return evaluate(subject, status, num_gradients, is_loop=is_loop)
    if whole is not None:
        on_all = subject._replace(log_joint=whole)
        return evaluate(on_all, status, num_gradients, is_loop=is_loop)
    found = passes.weighed(num_gradients)
    if isinstance(found, str):
        return evaluate(subject, status._replace(not_weighed=found), num_gradients, is_loop=is_loop)
    draws = found.elbo_draws
    error = float(draws.std()) / len(draws) ** 0.5
    of_pass = PassEstimate(float(draws.mean()), error, len(draws), passes.num_batches, 1.0)
    return evaluate_minibatches(subject, of_pass, status, found)
