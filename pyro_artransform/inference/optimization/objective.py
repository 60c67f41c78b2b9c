# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit minimizes: the negative ELBO, of all data or of mini-batches."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

from ...joint import LogJoint, MeanLogJoint
from ...joint.handlers import UnmaskedLatents, hidden_sites, traced_parameters
from ...joint.mean_density import Anchor, AnchoredLogJoint
from ...joint.posteriors import Posteriors
from ...joint.protocols import MinibatchGuide, ReparametrizedGuide
from ...joint.traces import plate_nesting
from ...joint.vectorization import GuideSampler
from ..config import MinibatchConfig
from ..loader import AllBatches, Batch, BatchStream

_CHUNK = 1024
# numbers of draws that are held at once, 64 MB in double precision
_MOST_VALUES = 2**23
# runs of the model in which a site that is not finite is searched for
_NUM_TRACED = 16

# how much more deviating log weights count for tails, the squared deviation where that ends, and how many
# times as many draws a step has then: k-hat of gp_regr, hmm_example and garch11 is 0.46 to 0.82 with as many
_TAIL_WEIGHT, _MAX_DEVIATION, _TAIL_DRAWS = 2.0, 50.0, 4
_NUM_FOR_MEDIAN = 100  # draws of a guide
# numbers of the draws of a step for the tails: memory, and time where latents are many
_MOST_TRAINED = 2**14


class Objective(Protocol):
    """The negative ELBO of a guide as a function of all parameters, the model's included."""

    #: whether :meth:`elbo_draws` are log weights of single draws
    has_weights: bool = False

    def loss(self, num_particles: int) -> Tensor:
        """A differentiable estimate of the negative ELBO in nats, a scalar."""

    def tail_loss(self, num_particles: int) -> tuple[Tensor, int]:
        """As :meth:`loss`, with a gradient that covers the tails better, and its number of draws."""
        return self.loss(num_particles), num_particles

    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters by name."""

    def is_guide_alone(self) -> bool:
        """Whether all parameters are the guide's, as far as that is known."""
        return False

    def elbo_draws(self, count: int) -> Tensor:
        """Independent unbiased estimates of the ELBO in nats, shape ``(n,)``, from ``count`` draws.

        Where single draws have no log weights, n is smaller than ``count``.
        """

    def log_weights(self, count: int) -> Tensor:
        """As :meth:`elbo_draws`, of each of E posteriors that are fitted at once, shape ``(n, E)``."""
        return self.elbo_draws(count)[:, None]

    def nonfinite_sites(self) -> list[str]:
        """The sites that made the last loss other than finite, as far as that can be found."""


@dataclass
class PathObjective(Objective):
    """The ELBO with the path gradient, which vanishes where the guide is the posterior.

    See Sticking the Landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194.

    :param posteriors: where many posteriors are fitted at once, each of them.
    """

    log_joint: LogJoint
    guide: ReparametrizedGuide
    posteriors: Posteriors | None = None
    has_weights = True

    def __post_init__(self) -> None:
        self._last = self.log_joint.start[None]

    def with_arguments(self, batch: Batch) -> "PathObjective":
        """The same objective, of the same parameters, for other arguments of model and guide."""
        return replace(self, log_joint=self.log_joint.with_arguments(*batch))

    def loss(self, num_particles: int) -> Tensor:
        return self._terms(num_particles).mean()

    def tail_loss(self, num_particles: int) -> tuple[Tensor, int]:
        r"""As :meth:`loss`, with the gradient of another divergence, which covers the tails better.

        With :math:`w = p / q`, every f-divergence :math:`E_q[f(w)]` has the path gradient of the ELBO
        with weights :math:`w^2 f''(w)`, which are one for the ELBO. Here they are
        :math:`1 + \lambda \min(d^2, c)`, d the deviation of :math:`\log w` from its median in units
        of its spread. The minimum is the posterior all the same.

        See Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019),
        https://arxiv.org/abs/1810.04152, and Variational Inference via chi Upper Bound Minimization
        (Dieng et al., 2017), https://arxiv.org/abs/1611.00328.
        """
        if self.posteriors is not None:  # deviations of all together say nothing of each
            return self.loss(num_particles), num_particles
        most = max(_MOST_TRAINED // self.log_joint.latents.latent_dim, num_particles)
        terms = self._terms(min(_TAIL_DRAWS * num_particles, most))
        value = terms.detach()
        deviation = (value - value.median()).abs()
        spread = deviation.square().mean().sqrt() + torch.finfo(terms.dtype).tiny
        weights = 1 + _TAIL_WEIGHT * (deviation / spread).square().clamp(max=_MAX_DEVIATION)
        weighted = (weights * terms).mean()
        return value.mean() + (weighted - weighted.detach()), len(terms)

    def _terms(self, num_particles: int) -> Tensor:
        z, log_q = self.guide.rsample_and_log_prob(num_particles, path=True)
        self._last = z.detach()
        return log_q - self.log_joint(z)

    def parameters(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if isinstance(self.guide, nn.Module):
            found.update(self.guide.named_parameters(prefix="guide"))
        known = set(found.values())
        with torch.no_grad():
            traced = traced_parameters(partial(self.loss, 1))
        return found | {name: p for name, p in traced.items() if p not in known}

    def is_guide_alone(self) -> bool:
        return all(name.startswith("guide.") for name in self.parameters())

    @torch.no_grad()
    def elbo_draws(self, count: int) -> Tensor:
        found, most = [], max(_MOST_VALUES // self.log_joint.latents.latent_dim, 1)
        for start in range(0, count, most):
            z, log_q = self.guide.rsample_and_log_prob(min(most, count - start))
            found.append(self.log_density(z) - log_q)
        return torch.cat(found)

    def log_weights(self, count: int) -> Tensor:
        if self.posteriors is None:
            return super().log_weights(count)
        most = max(_MOST_VALUES // self.log_joint.latents.latent_dim, 1)
        sizes = [min(most, count - start) for start in range(0, count, most)]
        return torch.cat([self.posteriors.log_weights(size)[1] for size in sizes])

    @torch.no_grad()
    def log_density(self, z: Tensor) -> Tensor:
        """The log joint density of draws ``(n, latent_dim)``, without gradients, shape ``(n,)``."""
        return torch.cat([*map(self.log_joint, z.split(_CHUNK))])

    def nonfinite_sites(self) -> list[str]:
        if not bool(self._last.isfinite().all()):
            return ["the guide's own draws"]
        return self.log_joint.nonfinite_sites(self._last)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hides sites from handlers around a fit, and what Pyro says of NaN, which a fit counts itself."""
    with hidden_sites(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered ")
        yield


@dataclass
class PyroObjective(Objective):
    """The ELBO by Pyro's estimators, for any guide; with the path gradient where the guide has one."""

    model: Callable[..., object]
    guide: Callable[..., object]
    arguments: Batch
    log_joint: LogJoint
    num_estimates: int = 32

    def __post_init__(self) -> None:
        self.model = UnmaskedLatents(self.log_joint.improper)(self.model)
        self._kind = TraceEnum_ELBO if self.log_joint.is_enumerated else Trace_ELBO
        self._num_plates = plate_nesting(*self._traces())
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
        return not self._traces()[1].param_nodes

    def elbo_draws(self, count: int) -> Tensor:
        batch = max(count // self.num_estimates, 1)
        losses = [self._value(batch) for _ in range(max(count // batch, 1))]
        like = next(iter(self.parameters().values()))
        return -like.new_tensor(losses, dtype=torch.float64)

    @torch.no_grad()
    @_quietly()
    def nonfinite_sites(self) -> list[str]:
        found: list[str] = []
        for _ in range(_NUM_TRACED):
            for trace in self._traces():
                trace.compute_log_prob()
                for name, node in trace.nodes.items():
                    if "log_prob" in node and not bool(node["log_prob"].isfinite().all()):
                        found.append(name)
            if found:
                break
        return found

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

    @torch.no_grad()
    @_quietly()
    def _traces(self) -> tuple[poutine.Trace, poutine.Trace]:
        """One run of the guide, and of the model at its draws."""
        args, kwargs = self.arguments
        guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        replayed = poutine.replay(self.model, trace=guide_trace)
        return guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)


BatchObjective = PathObjective | PyroObjective


class PassEstimate(NamedTuple):
    """The ELBO as the mean over the batches of a pass.

    :param elbo_se: its standard error, of draws, and of batches if not all of them were seen.
    :param share: of all data that were seen; 0 where it is not known.
    :param log_weights: of all data; ``None`` where they are not known.
    :param loader_share: how much of the data that batches are scaled up to the whole loader has; 1 where
        it is not known.
    """

    elbo: float
    elbo_se: float
    num_draws: int
    num_batches: int
    share: float
    log_weights: Tensor | None = None
    loader_share: float = 1.0


@dataclass
class MinibatchObjective(Objective):
    """An objective that sees the next batch of a stream at each step, and the same ones otherwise.

    A short last batch, which a model scales up to all data, makes a smaller step: then the steps of an
    epoch add up to the gradient of all data. Where all rows share the latents, and a pass over the
    stream is all data, parameters are compared on these, and a batch's density is corrected by that of
    all data at the guide's median when the steps began; else on the batches for validation.
    """

    objective: BatchObjective
    stream: BatchStream
    log_joint: LogJoint
    validation: list[Batch]
    config: MinibatchConfig

    def __post_init__(self) -> None:
        self._last = self.objective
        self._least_scale = min(self.log_joint.structure(*b).scale for b in self.validation)
        self._anchor: Anchor | None = None
        #: the log joint density of all data, where it is known
        self.whole = self._find_whole()
        self.has_weights = self.whole is not None

    def _find_whole(self) -> MeanLogJoint | None:
        stream = self.stream.whole
        if not (isinstance(self.objective, PathObjective) and stream.is_partition):
            return None
        whole = MeanLogJoint(self.log_joint, AllBatches(stream))
        return whole if whole.is_of_all_data and not whole.is_random else None

    def _weight(self, batch: Batch) -> float:
        """The rows of a batch by those of the largest for validation; one if nothing is scaled."""
        return self._least_scale / self.log_joint.structure(*batch).scale

    def loss(self, num_particles: int) -> Tensor:
        batch = self.stream.next()
        self._last = objective = self.objective.with_arguments(batch)
        if self.whole is not None and isinstance(objective, PathObjective):
            # plates draw indices that nobody asks for
            with torch.random.fork_rng(devices=[]):
                anchor = self._anchor_of(self.whole, objective.guide)
                corrected = AnchoredLogJoint(objective.log_joint, anchor)
            self._last = replace(objective, log_joint=corrected)
        loss, weight = self._last.loss(num_particles), self._weight(batch)
        # the value stays that of the ELBO
        return loss if weight == 1 else loss.detach() + weight * (loss - loss.detach())

    def _anchor_of(self, whole: MeanLogJoint, guide: ReparametrizedGuide) -> Anchor:
        if self._anchor is None:
            with torch.no_grad():
                draws, _ = guide.rsample_and_log_prob(_NUM_FOR_MEDIAN)
            self._anchor = Anchor.of(whole, draws.median(0).values)
        return self._anchor

    def parameters(self) -> dict[str, Tensor]:
        return self.objective.parameters()

    def is_guide_alone(self) -> bool:
        return self.objective.is_guide_alone()

    @torch.no_grad()
    def elbo_draws(self, count: int) -> Tensor:
        """Each of them by all data where that is known, else the mean over the batches for validation."""
        if self.whole is not None and isinstance(self.objective, PathObjective):
            return replace(self.objective, log_joint=self.whole).elbo_draws(count)
        estimate = self._estimator(max(count // len(self.validation), self.config.min_draws))
        weights = [*map(self._weight, self.validation)]
        total = sum(weights)
        draws = [w / total * estimate(batch) for w, batch in zip(weights, self.validation)]
        return torch.stack(draws).sum(0)

    def _estimator(self, count: int) -> Callable[[Batch], Tensor]:
        """Draws of the ELBO of a batch; the same draws for all, where all have the same latents."""
        objective = self.objective
        if not isinstance(objective, PathObjective):
            return lambda batch: objective.with_arguments(batch).elbo_draws(count)
        z, log_q = objective.guide.rsample_and_log_prob(count)
        return lambda batch: objective.with_arguments(batch).log_density(z) - log_q

    def nonfinite_sites(self) -> list[str]:
        return self._last.nonfinite_sites()

    def mean_log_joint(self) -> MeanLogJoint:
        """The mean log joint density of several batches, in which an initial guide is found."""
        few = self.validation[:: math.ceil(len(self.validation) / self.config.num_for_start)]
        return MeanLogJoint(self.log_joint, few)

    @torch.no_grad()
    def over_a_pass(self) -> PassEstimate:
        """The ELBO from one pass over the loader, or from batches that are spread over it."""
        config, whole = self.config, self.stream.whole
        are_common = isinstance(self.objective, PathObjective)
        count = config.num_draws // min(whole.num_batches, config.max_batches)
        count = max(count, config.min_draws)
        estimate = self._estimator(config.num_common_draws if are_common else count)
        means, variances, weights, scales = [], [], [], []
        weighted = list[Tensor]()
        for batch in whole.one_pass(config.max_batches):
            draws = estimate(batch)
            means.append(draws.mean().item())
            variances.append(0.0 if are_common else (draws.var() / len(draws)).item())
            weights.append(self._weight(batch))
            scales.append(self.log_joint.structure(*batch).scale)
            weighted.append(weights[-1] * draws)
        num_batches = len(means)
        seen = sum(1 / scale for scale in scales)  # the part of all data by the scales
        is_scaled = any(scale != 1 for scale in scales)
        share = num_batches / whole.num_batches if whole.is_partition else 0.0
        loader_share = seen if is_scaled and share == 1 else 1.0
        share = min(share, seen) if is_scaled else share
        elbo, elbo_se = _mean_and_error(means, variances, weights, share)
        num_draws, log_weights = count * num_batches, None
        if are_common:
            draws = sum(weighted[1:], weighted[0]) / sum(weights)
            num_draws = len(draws)
            elbo_se = math.hypot((draws.double().var() / num_draws).sqrt().item(), elbo_se)
            log_weights = draws if abs(seen - 1) < 1e-6 and share > 0 else None
        return PassEstimate(elbo, elbo_se, num_draws, num_batches, share, log_weights, loader_share)


def _mean_and_error(
    means: Sequence[float], variances: Sequence[float], weights: Sequence[float], share: float
) -> tuple[float, float]:
    """The weighted mean of independent means, a share of all that there are, and its error."""
    mean, variance, weight = torch.tensor(
        [means, variances, weights], dtype=torch.float64, device="cpu"
    )
    shares = weight / weight.sum()
    found = shares @ mean
    by_batches = shares.square() @ (mean - found).square() * len(means) / max(len(means) - 1, 1)
    by_draws = shares.square() @ variance
    return float(found), float((by_draws + max(1 - share, 0.0) * by_batches).sqrt())
