# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The negative ELBO on mini-batches and over a pass."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..._base.time_limit import until_deadline
from ...model import FullDataDensity, LogJoint
from ...model.elements import ElementTerms
from ...model.expectations import expectation
from ...model.full_data_density import Anchor
from ...model.replay.capture import CapturedLoss
from ..all_batches import density_of_all_rows
from ..loader import Batch, BatchStream
from .objective import BatchObjective, Objective, PathObjective

NUM_VALIDATION = 32  #: batches on which guides are compared
#: draws of a pass if all batches use the same ones, and of a verdict on all data
NUM_COMMON_DRAWS = 400
_REACH = 5.0  # sds of the first draws within which the control variate changes
_STEP = 0.1  # of differences for the second derivatives of all data, in sds
_NUM_FOR_START = 8  # batches whose mean log density determines the initial guide
# batches of the final pass, limited for time, their draws in all, and the fewest draws per batch
_MAX_BATCHES, _NUM_DRAWS, _MIN_DRAWS = 500, 4000, 8
_PLAIN = (bool, int, float, str, type(None))  # arguments of a model that are no tensors, and stay

Shapes = tuple[torch.Size, ...]


class PassEstimate(NamedTuple):
    """The ELBO as the mean over the batches of a pass.

    :param elbo_se: its standard error, from draws, and from batches if some were left out.
    :param share: the share of all data that the pass saw; 0 if unknown.
    :param loader_share: the data of the whole loader, as a share of the data that batches are scaled up to;
        1 if unknown.
    """

    elbo: float
    elbo_se: float
    num_draws: int
    num_batches: int
    share: float
    loader_share: float = 1.0

    @property
    def obstacle(self) -> str:
        """Why the pass is not known to have each row of all data once; empty if it is."""
        if not self.share:
            hint = "(drop_last=True may leave rows out)"
            return f"an epoch of the loader may not contain each row exactly once {hint}"
        if not math.isclose(self.loader_share, 1.0):
            return (
                f"a pass over the loader covers {100 * self.loader_share:.3g} % of the data size to which "
                "the model scales its batches: check the size of the plate"
            )
        if self.share < 1.0 and not math.isclose(self.share, 1.0):
            return f"a pass saw {100 * self.share:.3g} % of the data, in {self.num_batches} batches"
        return ""


@dataclass
class MinibatchObjective(Objective):
    """The negative ELBO on the next batch of a stream.

    A short last batch is weighted by its number of rows, so that the steps of an epoch sum to the gradient
    of all data. If all rows share their latents and the guide has a path gradient, a control variate
    corrects a batch's density by that of all data at the guide's median at the first step.
    """

    objective: BatchObjective
    stream: BatchStream
    log_joint: LogJoint
    validation: list[Batch]
    terms: ElementTerms | None = None
    #: the log joint density of all data, if a pass over the stream has them and they share all latents
    whole: FullDataDensity | None = None

    def __post_init__(self) -> None:
        self._last = self.objective
        # by the structure of arguments: those that are no tensors, by the shapes of the others, and a capture
        self._captured: dict[object, tuple[dict[Shapes, list[Any]], CapturedLoss]] = {}
        self._least_scale = min(self.log_joint.structure(*b).scale for b in self.validation)
        if self.whole is None:
            self.whole = density_of_all_rows(self.log_joint, self.stream, self.validation[0])
        #: the objective on all data, which corrects that of each batch
        self.on_all: PathObjective | None = None
        objective = self.objective
        if self.whole and isinstance(objective, PathObjective) and objective.is_guide_alone():
            self.on_all = replace(objective, log_joint=self.whole)
        self.has_weights = self.is_noisy = self.on_all is not None
        # passes over all data join so many batches, and evaluate fewer draws at once
        shares = [share for share, _ in self.whole.parts()] if self.whole else []
        self._num_joined = max(self._least_scale * max(shares, default=1.0), 1.0)

    def _weight(self, batch: Batch) -> float:
        """The rows of a batch relative to those of the largest validation batch; one without scales."""
        return self._least_scale / self.log_joint.structure(*batch).scale

    @property
    def num_compared(self) -> int:
        return sum(captured.num_compared for _, captured in self._captured.values())

    def loss(self, num_particles: int) -> Tensor:
        batch = self.stream.next()
        if self.on_all is not None:
            corrected = partial(self._corrected, self._anchor, num_particles)
            loss = self._replayed(corrected, batch, num_particles)
        else:
            self._last = self.objective.with_arguments(batch)
            loss = self._last.loss(num_particles)
        weight = self._weight(batch)
        # only the gradient is weighted; the value stays that of the ELBO
        return loss if weight == 1 else loss.detach() + weight * (loss - loss.detach())

    def _replayed(
        self, loss: Callable[[Batch], Tensor], batch: Batch, num_particles: int
    ) -> Tensor:
        """Evaluates a loss, replaying operations captured with another batch of the same shapes.

        Arguments that are no tensors are constants of a capture, which is given up if they change.
        """
        values, count = [*batch.args, *batch.kwargs.values()], len(batch.args)
        names = [*batch.kwargs]
        constants = [None if isinstance(value, Tensor) else value for value in values]
        if self.log_joint.strategy == "loop" or not all(isinstance(c, _PLAIN) for c in constants):
            return loss(batch)
        is_tensor = [isinstance(value, Tensor) for value in values]
        key = count, (*names,), (*is_tensor,), num_particles
        if key not in self._captured:
            by_shapes: dict[Shapes, list[Any]] = {}

            def of_tensors(*tensors: Tensor) -> Tensor:
                pairs, left = zip(is_tensor, by_shapes[_shapes(tensors)]), iter(tensors)
                given = [next(left) if is_given else value for is_given, value in pairs]
                return loss(Batch((*given[:count],), dict(zip(names, given[count:]))))

            self._captured[key] = by_shapes, CapturedLoss(of_tensors)
        known, captured = self._captured[key]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if repr(known.setdefault(_shapes(tensors), constants)) != repr(constants):
            captured.give_up()
        return captured(*tensors) if captured.can_replay else loss(batch)

    def _corrected(self, anchor: Anchor, num_particles: int, batch: Batch) -> Tensor:
        """The loss of a batch with the control variate."""
        on_all, whole = cast(PathObjective, self.on_all), cast(FullDataDensity, self.whole)
        corrected = whole.estimate(*batch, anchor, int(whole.chunk_size * self._num_joined))
        self._last = replace(on_all, log_joint=corrected, is_one=False)
        return self._last.loss(num_particles)

    @cached_property
    def _anchor(self) -> Anchor:
        """The expansion of the density of all data at the guide's median at the first step."""
        with torch.random.fork_rng(devices=[]):  # steps do not depend on its draws
            first = self.stream.processes.first
            found = first("the expansion of the density of all data", self._expansion)
        return found.to(self.log_joint.start.device)

    def _expansion(self) -> Anchor:
        on_all, whole = cast(PathObjective, self.on_all), cast(FullDataDensity, self.whole)
        with torch.no_grad():
            draws, _ = on_all.guide.rsample_and_log_prob(NUM_COMMON_DRAWS)
        sd = draws.std(0)
        found = Anchor.of(whole, draws.median(0).values, _REACH * sd)
        if self.terms is not None and whole.coordinates is None:
            point, steps = found.point[None].double(), _STEP * sd.double()
            if (at_point := expectation(whole, self.terms, point, steps)) is not None:
                found = found._replace(precision=at_point.precision.to(draws))
        return found

    def parameters(self) -> dict[str, Tensor]:
        return self.objective.parameters()

    def is_guide_alone(self) -> bool:
        return self.objective.is_guide_alone()

    @torch.no_grad()
    def elbo_draws(self, count: int) -> Tensor:
        """Estimates of the ELBO on all data, or its mean over the validation batches."""
        if self.on_all is not None:
            return self.on_all.elbo_draws(count)
        estimate = self._estimator(max(count // len(self.validation), _MIN_DRAWS))
        weights = [*map(self._weight, self.validation)]
        total = sum(weights)
        draws = [w / total * estimate(batch) for w, batch in zip(weights, self.validation)]
        shortest = min(map(len, draws))  # a time limit may cut some off
        return torch.stack([part[:shortest] for part in draws]).sum(0)

    def _estimator(self, count: int) -> Callable[[Batch], Tensor]:
        """Returns a function for ELBO draws of a batch, with common draws if batches share all latents."""
        objective = self.objective
        if not isinstance(objective, PathObjective):
            return lambda batch: objective.with_arguments(batch).elbo_draws(count)
        z, log_q = objective.guide.rsample_and_log_prob(count)
        return lambda batch: objective.with_arguments(batch).log_joint(z) - log_q

    def nonfinite_sites(self) -> list[str]:
        return self._last.nonfinite_sites()

    def mean_log_joint(self) -> FullDataDensity:
        """The mean log joint density of several batches, which determines the initial guide."""
        few = self.validation[:: math.ceil(len(self.validation) / _NUM_FOR_START)]
        return FullDataDensity(self.log_joint, few)

    @torch.no_grad()
    def over_a_pass(self) -> PassEstimate:
        """Estimates the ELBO in one pass over the loader, or from batches spread over it."""
        whole = self.stream.whole
        are_common = isinstance(self.objective, PathObjective)
        count = max(_NUM_DRAWS // min(whole.num_batches, _MAX_BATCHES), _MIN_DRAWS)
        estimate = self._estimator(NUM_COMMON_DRAWS if are_common else count)
        draws, shares = list[Tensor](), list[float]()
        for batch in until_deadline(whole.one_pass(_MAX_BATCHES), at_least=2):
            draws.append(estimate(batch))
            shares.append(1 / self.log_joint.structure(*batch).scale)
        num_batches, seen = len(draws), sum(shares)  # the share of all data according to the scales
        is_scaled = any(share != 1 for share in shares)
        share = num_batches / whole.num_batches if whole.is_partition else 0.0
        loader_share = seen if is_scaled and share == 1 else 1.0
        share = min(share, seen) if is_scaled else share
        variances = [0.0 if are_common else (part.var() / len(part)).item() for part in draws]
        means = [part.mean().item() for part in draws]
        elbo, elbo_se = _mean_and_error(means, variances, shares, share)
        num_draws = count * num_batches
        if are_common:
            weighted = [part * weight / seen for part, weight in zip(draws, shares)]
            total = torch.stack(weighted).sum(0)
            num_draws = len(total)
            elbo_se = math.hypot(total.double().std().item() / num_draws**0.5, elbo_se)
        return PassEstimate(elbo, elbo_se, num_draws, num_batches, share, loader_share)


def _shapes(tensors: Iterable[Tensor]) -> Shapes:
    return tuple(tensor.shape for tensor in tensors)


def _mean_and_error(
    means: Sequence[float], variances: Sequence[float], weights: Sequence[float], share: float
) -> tuple[float, float]:
    """The weighted mean of independent means, and its standard error; they are a ``share`` of all means."""
    numbers = [means, variances, weights]
    mean, variance, weight = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    shares = weight / weight.sum()
    center = shares @ mean
    by_batches = shares.square() @ (mean - center).square() * len(means) / max(len(means) - 1, 1)
    by_draws = shares.square() @ variance
    return float(center), float((by_draws + max(1 - share, 0.0) * by_batches).sqrt())
