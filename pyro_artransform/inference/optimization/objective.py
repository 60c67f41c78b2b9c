# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The objective of a fit: the negative ELBO, on all data or on a mini-batch."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from ..._base.comparison import agree
from ..._base.time_limit import until_deadline
from ...model import LogJoint
from ...model.draw_plate import DrawPlate, GuideSampler
from ...model.handlers import SiteLogProbs, UnmaskedLatents, traced_parameters
from ...model.protocols import FlowGuide, MinibatchGuide
from ...model.replay.capture import CapturedLoss
from ...model.run_once import quietly, run_once
from ...model.traces import plate_nesting
from ...model.vectorization import (
    CholeskyOrNan,
    Draws,
    ModelFailures,
    Terms,
    draws_at_a_time,
)
from ..loader import Batch

#: relative and absolute tolerance for the log densities of elements at the same draws
OF_LOG_DENSITIES = 1e-4, 1e-2
#: divides numbers of draws if the model runs for one draw at a time, or each draw is a pass over a loader
FEWER = 8
# the deviation of log weights, in units of its median, and the least in nats, beyond which the robust loss
# bounds their gradients: near the optimum only tails deviate, and are to be learned (benchmarks/price.md)
_BOUND, _LEAST_BOUND = 3.0, 0.5
# the additional weight of deviating log weights in the tail loss, and the squared deviation at its cap, as
# benchmarks/price.md compares them
_TAIL_WEIGHT, _MAX_DEVIATION = 2.0, 50.0
# draws times latents in a step with the tail loss, limited for memory and time
_MOST_TRAINED = 2**14


class Objective(Protocol):
    """The negative ELBO of a guide as a function of all parameters, including the model's."""

    #: whether :meth:`elbo_draws` returns log weights of single draws
    has_weights: bool = False
    #: whether steps have the noise of mini-batches, and may end in a worse guide than they started from
    is_noisy: bool = False

    @property
    def num_compared(self) -> int:
        """How often a replayed loss was compared with a fresh evaluation, and agreed."""
        return 0

    def loss(self, num_particles: int) -> Tensor:
        """A differentiable estimate of the negative ELBO in nats, a scalar.

        :raises ReplayError: if losses since the last comparison were wrong; the next call is correct.
        """

    def robust_loss(self, num_particles: int) -> Tensor:
        """A loss like :meth:`loss` whose gradient is less noisy, for a guide alone."""
        return self.loss(num_particles)

    def tail_loss(self, num_particles: int) -> tuple[Tensor, int]:
        """A loss like :meth:`loss` whose gradient covers the tails better, and its number of draws."""
        return self.loss(num_particles), num_particles

    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters that require gradients, by name."""

    def is_guide_alone(self) -> bool:
        """Whether all parameters are known to be the guide's."""

    def elbo_draws(self, count: int) -> Tensor:
        """Independent unbiased estimates of the ELBO in nats, shape ``(n,)``, from ``count`` draws.

        If single draws have no log weights, n is smaller than ``count``.
        """

    def nonfinite_sites(self) -> list[str]:
        """The sites that made the last loss non-finite, if they can be found."""


@dataclass
class _PathTerms:
    """log q - log p at draws of a guide, with the path gradient; apart, so that captures form no cycle.

    Components of a guide of modes have as many draws each, and their own densities: each learns its mode.
    """

    log_joint: LogJoint
    guide: FlowGuide

    def __post_init__(self) -> None:
        self.last = self.log_joint.start[None]  #: the last draws

    def __call__(self, num_particles: int) -> Tensor:
        parts = self.guide.components
        count = -(-num_particles // len(parts))
        drawn = [part.rsample_and_log_prob(count, path=True) for part in parts]
        z, log_q = drawn[0] if len(drawn) == 1 else map(torch.cat, zip(*drawn))
        self.last = z.detach()
        return log_q - self.log_joint(z)

    def mean(
        self, num_particles: int, weights_of: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The mean; its gradient has weights by the distances of log weights from their median."""
        terms = self(num_particles)
        if weights_of is None:
            return terms.mean()
        value = terms.detach()
        weighted = (weights_of((value - value.median()).abs()) * terms).mean()
        return value.mean() + (weighted - weighted.detach())


def _robust_weights(deviation: Tensor) -> Tensor:
    """See :meth:`PathObjective.robust_loss`."""
    bound = (_BOUND * deviation.median()).clamp(min=_LEAST_BOUND)
    return (bound / deviation).clamp(max=1.0)


def _tail_weights(deviation: Tensor) -> Tensor:
    """See :meth:`PathObjective.tail_loss`."""
    spread = deviation.square().mean().sqrt() + torch.finfo(deviation.dtype).tiny
    return 1 + _TAIL_WEIGHT * (deviation / spread).square().clamp(max=_MAX_DEVIATION)


@dataclass
class PathObjective(Objective):
    """The ELBO with the path gradient, which vanishes if the guide is the posterior.

    See Sticking the Landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194.

    :param is_one: whether all steps use this objective, so that capturing its operations is worthwhile.
    """

    log_joint: LogJoint
    guide: FlowGuide
    is_one: bool = True
    has_weights = True

    def __post_init__(self) -> None:
        self._terms = _PathTerms(self.log_joint, self.guide)
        self._captured: dict[object, CapturedLoss] = {}

    @property
    def num_compared(self) -> int:
        return sum(captured.num_compared for captured in self._captured.values())

    def with_arguments(self, batch: Batch) -> "PathObjective":
        """A copy of the objective, with shared parameters, for other arguments of model and guide."""
        return replace(self, log_joint=self.log_joint.with_arguments(*batch), is_one=False)

    def loss(self, num_particles: int) -> Tensor:
        return self._replayed(num_particles)

    def _replayed(
        self, num_particles: int, weights_of: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Evaluates a loss with this number of draws, replaying captured operations."""
        loss = partial(self._terms.mean, num_particles, weights_of)
        if not self.is_one or self.log_joint.strategy == "loop":
            return loss()
        key = weights_of, num_particles
        if key not in self._captured:
            self._captured[key] = CapturedLoss(loss)
        return self._captured[key]()

    def robust_loss(self, num_particles: int) -> Tensor:
        r"""The ELBO with the gradient of another divergence, to which extreme draws contribute less noise.

        With :math:`w = p / q`, every f-divergence :math:`E_q[f(w)]` has the path gradient of the ELBO
        with weights :math:`w^2 f''(w)`, which are one for the ELBO. Here they are :math:`\min(1, c / d)`,
        where d is the deviation of :math:`\log w` from its median, as in robust regression, and c three
        times the median of all d, but at least half a nat. The minimum is still at the posterior.

        See Robust Estimation of a Location Parameter (Huber, 1964).
        """
        return self._replayed(num_particles, _robust_weights)

    def tail_loss(self, num_particles: int) -> tuple[Tensor, int]:
        r"""The ELBO with the gradient of another divergence, which covers the tails better.

        The weights of :meth:`robust_loss` here are :math:`1 + \lambda \min(d^2, c)`, with d in units of
        its root mean square.

        See Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019),
        https://arxiv.org/abs/1810.04152, and Variational Inference via chi Upper Bound Minimization
        (Dieng et al., 2017), https://arxiv.org/abs/1611.00328.
        """
        most = max(_MOST_TRAINED // self.log_joint.latents.latent_dim, num_particles)
        count = min(2 * num_particles, most)
        return self._replayed(count, _tail_weights), count

    def parameters(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        if isinstance(self.guide, nn.Module):
            named = self.guide.named_parameters(prefix="guide")
            own = {name: parameter for name, parameter in named if parameter.requires_grad}
        known = set(own.values())
        with torch.no_grad():
            traced = traced_parameters(partial(self._terms.mean, 1))
        return own | {name: p for name, p in traced.items() if p not in known}

    def is_guide_alone(self) -> bool:
        return all(name.startswith("guide.") for name in self.parameters())

    @torch.no_grad()
    def elbo_draws(self, count: int) -> Tensor:
        most, draws = draws_at_a_time(self.log_joint.latents.latent_dim), list[Tensor]()
        for k in range(0, count, most):
            z, log_q = self.guide.rsample_and_log_prob(min(most, count - k))
            draws.append(self.log_joint(z) - log_q)
        return torch.cat(draws)

    def nonfinite_sites(self) -> list[str]:
        if not bool(self._terms.last.isfinite().all()):
            return ["the guide's own draws"]
        return self.log_joint.nonfinite_sites(self._terms.last)


#: hides sites from outer handlers, and Pyro's warnings of NaN, which a fit counts itself
_quietly = partial(quietly, "Encountered ")


@dataclass
class PyroObjective(Objective):
    """The ELBO with Pyro's estimators, for any guide; with the path gradient if the guide has one."""

    model: Callable[..., object]
    guide: Callable[..., object]
    arguments: Batch
    log_joint: LogJoint

    def __post_init__(self) -> None:
        self.model = UnmaskedLatents()(self.model)
        self._kind = TraceEnum_ELBO if self.log_joint.is_enumerated else Trace_ELBO
        self._num_plates = plate_nesting(*self.traces())
        run = partial(self.guide, *self.arguments.args, **self.arguments.kwargs)
        in_plate = self.log_joint.strategy == "plate"
        with torch.no_grad(), _quietly(), torch.random.fork_rng(devices=[]):
            #: whether many particles are evaluated at once, in a plate
            self.is_vectorized = in_plate and GuideSampler(run, self._num_plates).is_vectorized

    def with_arguments(self, batch: Batch) -> "PyroObjective":
        """See :meth:`PathObjective.with_arguments`."""
        other = copy.copy(self)
        other.arguments = batch
        return other

    def draws(self, function: Callable[..., object], given: Draws, n: int) -> SiteLogProbs:
        """The sites of the model or the guide in a plate of n draws, some of them conditioned on."""
        scored, (args, kwargs) = SiteLogProbs(given), self.arguments
        with poutine.block(), CholeskyOrNan(), scored:
            DrawPlate(n, self._num_plates).run(partial(function, *args, **kwargs))
        return scored

    def log_ratios(self, plate: str, given: Draws, n: int | None) -> Terms:
        """Log weights of n draws of the guide: by element of a plate, ``(n, size)``, and of other sites.

        ``"by_prior"`` has the log densities of the data, by element, at prior draws of the elements' latents,
        ``-inf`` if the prior cannot be sampled. All are in float64.
        """
        n = n or 1
        drawn = self.draws(self.guide, given, n)
        scored = self.draws(self.model, drawn.values, n)
        pairs = zip(scored.by_element(plate), drawn.by_element(plate))
        elements, others = (p.double() - q.double() for p, q in pairs)
        local = {name for name in drawn.frames if drawn.frame(name, plate)}
        given = {name: value for name, value in drawn.values.items() if name not in local}
        try:
            from_prior = self.draws(self.model, given, n)
            by_prior = from_prior.by_element(plate, left_out=local)[0].double()
        except (NotImplementedError, *ModelFailures):  # an improper prior, or an invalid draw
            by_prior = torch.full_like(elements, -torch.inf)
        terms = {"elements": elements, "others": others, "by_prior": by_prior}
        finite = -torch.inf, torch.inf, -torch.inf
        return {name: term.nan_to_num(*finite).to("cpu") for name, term in terms.items()}

    def check_elements(self, plate: str, given: Draws) -> None:
        """Checks with two draws of the guide that the elements of a plate are independent.

        :raises ValueError: if the density of an element changes when others come from another draw.
        """
        drawn = self.draws(self.guide, given, 2)
        mixed = dict(drawn.values)
        for name, event_dim in self.log_joint.latents.event_dims.items():
            if (frame := drawn.frame(name, plate)) is not None:
                mixed[name] = _exchanged(mixed[name], (frame.dim or -1) - event_dim)
        runs = [self.draws(self.model, values, 2) for values in (drawn.values, mixed)]
        one, other = (run.by_element(plate)[0] for run in runs)
        if not agree(other, _exchanged(one, -1), *OF_LOG_DENSITIES):
            raise ValueError(f"elements of plate '{plate}' depend on each other")

    def loss(self, num_particles: int) -> Tensor:
        guide: object = self.guide
        gradient = guide.path_gradient if isinstance(guide, MinibatchGuide) else nullcontext
        args, kwargs = self.arguments
        elbo = self._elbo(num_particles)
        with _quietly(), gradient():
            loss: Tensor = elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
        return loss

    def parameters(self) -> dict[str, Tensor]:
        return traced_parameters(partial(self._value, 1))

    def is_guide_alone(self) -> bool:
        return not self.traces()[1].param_nodes

    def elbo_draws(self, count: int) -> Tensor:
        # a loop takes one draw at a time, to stop at the time limit
        batch = max(count // 4, 1) if self.is_vectorized else 1
        losses = [
            self._value(batch) for _ in until_deadline(range(max(count // batch, 1)), at_least=2)
        ]
        like = next(iter(self.parameters().values()))
        return -like.new_tensor(losses, dtype=torch.float64)

    @torch.no_grad()
    @_quietly()
    def nonfinite_sites(self) -> list[str]:
        names: list[str] = []
        for _ in range(16):  # not each draw shows it
            for trace in self.traces():
                trace.compute_log_prob()
                for name, node in trace.nodes.items():
                    if "log_prob" in node and not bool(node["log_prob"].isfinite().all()):
                        names.append(name)
            if names:
                break
        return names

    @torch.no_grad()
    @_quietly()
    def _value(self, num_particles: int) -> float:
        args, kwargs = self.arguments
        return float(self._elbo(num_particles).loss(self.model, self.guide, *args, **kwargs))

    def _elbo(self, num_particles: int) -> Trace_ELBO | TraceEnum_ELBO:
        return self._kind(
            num_particles=num_particles,
            vectorize_particles=self.is_vectorized and num_particles > 1,
            max_plate_nesting=self._num_plates,
        )

    @_quietly()
    def traces(self) -> tuple[poutine.Trace, poutine.Trace]:
        """One run of the guide, and of the model at its draws."""
        args, kwargs = self.arguments
        guide_trace = run_once(self.guide, args, kwargs)
        return guide_trace, run_once(self.model, args, kwargs, replayed=guide_trace)


def _exchanged(draws: Tensor, dim: int) -> Tensor:
    """Two draws after they exchange every other entry of a dimension, a negative index."""
    is_other = torch.arange(draws.shape[dim], device=draws.device) % 2 == 1
    return torch.where(is_other[(..., *(None,) * (-1 - dim))], draws.flip(0), draws)


BatchObjective = PathObjective | PyroObjective
