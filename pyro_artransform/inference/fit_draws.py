# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits a density to given draws by maximum likelihood, until held-out draws become no more probable."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.conditional import ConstantConditionalTransform
from torch import Tensor
from torch.distributions import TransformedDistribution
from torch.utils.data import TensorDataset

from ..arguments import check_integer, warn_user
from ..joint.protocols import ScaledSteps, StructuredGuide, UnconstrainingGuide
from ..time_limit import TimeLimit
from ..transforms.chain import ComposedTransform, ConditionalComposedTransform
from ..transforms.scales_and_tails import check_rows, location_and_scale
from .config import OptimizationConfig
from .optimization.optimizers import Adam
from .optimization.training import Steps, copies, copy_to
from .progress import ProgressBar, progress_bar, seeded
from .result import DrawsResult

# found by hand, on the skewed density of the tests and on two moons
_BATCH_SIZE = 512
_STEP_SIZE = 1e-2
_STEP_FACTORS = 1.0, 0.3, 0.1, 0.03  # of the step size, one after the other
_CHECK_EVERY = 50  # steps between two checks of held-out draws
_PATIENCE = 6  # checks that gain less than the following, after which the step size goes down
_MIN_GAIN = 0.001  # nats a coordinate
# with 0 a fit to 100 draws is at times worse than a Gaussian, with 2 a fit to 500 is often no better
_MIN_GAIN_IN_SE = 1.0
_CHUNK = 4096  # rows evaluated at once


def fit_draws(
    density: Any,
    draws: Any,
    *args: object,
    context: Any = None,
    max_steps: int = 20_000,
    seed: int | None = None,
    progress: bool = True,
    **kwargs: object,
) -> DrawsResult:
    """Fits a guide or a density to given draws by maximum likelihood, with nothing to tune.

    That minimizes the forward KL divergence, from the law of the draws to the density, which so covers
    all of the draws, where :func:`~pyro_artransform.fit` may leave a mode out. A density is

    - a guide of this package, fitted to draws of its model's posterior, such as those of NUTS. It starts
      at the Gaussian of their moments. Then ``diagnostics.importance`` has the evidence of the model;
    - a ``FlowDistribution`` or ``TransformedDistribution``, fitted to rows of data. It starts where it is:
      end its flow with :func:`~pyro_artransform.transforms.standardize` of the data;
    - a ``ConditionalTransformedDistribution``, fitted to rows of data given rows of a context.

    A tenth of the draws says when to stop, 200 at least or a quarter of all, and another tenth how good the
    result is; both are left out of the steps. Where what the former have gained could be chance, the
    density stays where it began. Draws that are copies or neighbours of each other, as in a slow chain,
    make both too optimistic: thin them. MAFs are fast here; an IAF evaluates its networks several times.

    :param density: the guide or the distribution; it is trained in place.
    :param draws: for a guide, the values of all sites by name, each of shape ``batch + site shape``; for a
        distribution shape ``(n, D)``.
    :param args: the model's arguments, as ``kwargs`` only for a guide that was never called.
    :param context: shape ``(n, C)``, only for a conditional distribution.
    :param max_steps: the most steps; most fits end long before.
    :param seed: makes the fit repeatable, and leaves the generators as they were.
    :raises TypeError: if the density is none of the above, or has no parameters.
    :raises ValueError: if draws or context have another shape, are fewer than 20, not finite, constant
        in a coordinate, or at an edge of their support.
    :raises FitError: if the density of the draws is not finite for many steps in a row.

    Example::

        >>> import pyro.distributions as dist, torch
        >>> from pyro_artransform import FlowDistribution, maf
        >>> from pyro_artransform.inference import fit_draws
        >>> from pyro_artransform.transforms import chain, standardize
        >>> data = torch.randn(500, 2).cumsum(-1).exp()
        >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> q = FlowDistribution(base, chain([maf(2), standardize(data)]))
        >>> result = fit_draws(q, data, max_steps=100, seed=0, progress=False)
        >>> result.num_steps, result.history[-1] > result.history[0]
        (100, True)
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("fit_draws: expected to be called outside of torch.inference_mode")
    is_guide = isinstance(density, UnconstrainingGuide)
    if (args or kwargs) and not is_guide:
        raise ValueError("expected arguments of a model for a guide only, got some for a density")
    is_conditional = isinstance(density, dist.ConditionalTransformedDistribution)
    if is_conditional != (context is not None):
        wanted = "one for each draw" if is_conditional else "none, for a density without one"
        raise ValueError(f"context: expected {wanted}, got {'none' if context is None else 'one'}")
    check_integer("max_steps", max_steps)
    with (
        seeded(seed),
        progress_bar(progress, "log-likelihood") as bar,
        TimeLimit() as limit,
        torch.enable_grad(),
    ):
        if is_guide:
            given = _of_guide(density, draws, args, kwargs)
        else:
            given = _of_distribution(density, draws, context)
        training = _Training(*given, scales=density)
        bar.say("start")
        start = _start(density, training)
        bar.say("fit")
        stopped_because = training.run(max_steps, bar, limit)
        found = training.log_probs(training.unseen).double()
    return DrawsResult(
        log_likelihood=found.mean().item(),
        log_likelihood_se=found.std().item() / len(found) ** 0.5,
        num_held_out=len(found),
        history=training.history,
        num_steps=training.num_steps,
        num_skipped=training.num_skipped,
        seconds=limit.seconds,
        stopped_because=stopped_because,
        start=start,
    )


def _of_guide(
    guide: UnconstrainingGuide, draws: Any, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Any, Any, TensorDataset]:
    """The base and flow of a guide on the unconstrained space, and draws there."""
    if not isinstance(draws, Mapping):
        raise TypeError(
            f"draws: expected a dict of the values of each site, got {type(draws).__name__}"
        )
    with torch.no_grad():
        values, ladj = guide.unconstrain(draws, *args, **kwargs)
    values, ladj = values.reshape(-1, values.shape[-1]), ladj.reshape(-1)
    at_edge = int((~ladj.isfinite()).sum())
    if at_edge:
        raise ValueError(
            f"draws: expected values inside the supports, got {at_edge} of {len(ladj)} at an edge: leave "
            "them out"
        )
    rows = TensorDataset(check_rows("draws", values), values[:, :0], -ladj.to(values))
    base = dist.Normal(torch.zeros_like(values[0]), 1.0, validate_args=False).to_event(1)
    flow = guide.get_transform()  # adopts entries of Pyro's store that count more
    return base, flow, rows


def _of_distribution(density: Any, draws: Any, context: Any) -> tuple[Any, Any, TensorDataset]:
    """The base and flow of a distribution, conditional or not, and rows of its dtype and on its device."""
    kinds: Any = TransformedDistribution, dist.ConditionalTransformedDistribution
    if not isinstance(density, kinds):
        raise TypeError(
            "density: expected a guide that has one vector of all latents, such as AutoMAF, or a "
            "FlowDistribution, TransformedDistribution or ConditionalTransformedDistribution, got "
            f"{type(density).__name__}"
        )
    # Pyro wraps the transforms of a conditional distribution that need no context
    constant = ConstantConditionalTransform
    parts = [t.transform if isinstance(t, constant) else t for t in density.transforms]
    composed = ComposedTransform if context is None else ConditionalComposedTransform
    flow = composed(*parts)
    values = check_rows("draws", draws).to(_trained(flow)[0])
    contexts = values[:, :0] if context is None else check_rows("context", context).to(values)
    if len(contexts) != len(values):
        raise ValueError(
            f"context: expected a row for each of {len(values)} draws, got {len(contexts)}"
        )
    if context is None and (density.batch_shape or density.event_shape != values.shape[1:]):
        raise ValueError(
            f"draws: expected shape (n, *event_shape) without a batch shape, got {tuple(values.shape)} and "
            f"batch shape {tuple(density.batch_shape)}, event shape {tuple(density.event_shape)}"
        )
    rows = TensorDataset(values, contexts, values.new_zeros(len(values)))
    return density.base_dist, flow, rows


def _trained(flow: Any) -> list[Tensor]:
    found = [parameter for parameter in flow.parameters() if parameter.requires_grad]
    if not found:
        raise TypeError(
            "density: expected parameters to train, of a guide or of transforms that are modules, got none"
        )
    return found


@torch.no_grad()
def _start(density: object, training: "_Training") -> str:
    """Puts a guide near the draws; warns where a distribution, which stays as it is, is far from them."""
    is_guide, rows = isinstance(density, UnconstrainingGuide), training.rows
    values, _, offset = rows.tensors
    loc, scale = location_and_scale("draws", values, None if is_guide else False)
    own = (training.log_probs(rows) - offset).mean().item()
    # the same under the Gaussian of their moments
    sds = scale if scale.dim() == 1 else scale.diagonal()
    constant = math.log(2 * math.pi) + 1 - 1 / len(values)
    gaussian = -(sds.log() + 0.5 * constant).sum().item()
    if not isinstance(density, UnconstrainingGuide):
        if not gaussian - own <= 3 * len(loc):  # nats; true for NaN
            warn_user(
                f"the density begins {gaussian - own:.3g} nats a draw below a Gaussian of the draws' "
                "means and standard deviations, and may never get there: end the flow with "
                "transforms.standardize(draws), as in chain([maf(D), standardize(draws)])",
                UserWarning,
            )
        return "the density as it was"
    if own > gaussian:  # false for NaN
        return "the guide as it was"
    if scale.dim() == 1 and not isinstance(density, StructuredGuide):
        scale = scale.diag()  # which is small, unless there are thousands of latents
    try:
        density.start_at(loc, scale)
    except ValueError:  # the guide has no correlations
        density.start_at(loc, values.std(0).diag())
    return "the Gaussian of the draws' moments"


class _Training(Steps):
    """Adam on mini-batches of draws, with smaller steps where held-out draws gain nothing.

    The density is a flow of a base; rows are values, contexts, and what to add to their log-density.
    """

    def __init__(self, base: Any, flow: Any, rows: TensorDataset, scales: object) -> None:
        super().__init__(_trained(flow), OptimizationConfig.clip_factor)
        self._base, self._flow = base, flow
        self._scales = scales.step_scales if isinstance(scales, ScaledSteps) else None
        count = len(rows)
        if count < 20:
            raise ValueError(f"draws: expected 20 or more, got {count}")
        size = min(count // 10, 10_000)
        stopping = max(size, min(200, count // 4))
        order = torch.randperm(count, device=rows.tensors[0].device)
        parts = order.split([count - stopping - size, stopping, size])
        #: for the steps, for their end, and for the result
        self.rows, self.held_out, self.unseen = (TensorDataset(*rows[part]) for part in parts)
        #: the mean log-density of held-out draws at each check
        self.history: list[float] = []

    def log_prob(self, values: Tensor, context: Tensor, offset: Tensor) -> Tensor:
        """The log-density of rows, with a graph, shape ``(n,)``."""
        base, flow = self._base, self._flow
        if context.shape[-1]:
            base, flow = base.condition(context), flow.condition(context)
        x, ladj = flow.inverse_and_ladj(values)
        if not x.isfinite().all():  # where the base would raise an error, the step is skipped
            return x.sum(-1) * math.nan
        log_p: Tensor = base.log_prob(x)
        return log_p + ladj + offset

    @torch.no_grad()
    def log_probs(self, rows: TensorDataset) -> Tensor:
        """The same of many rows, without a graph."""
        chunks = zip(*(part.split(_CHUNK) for part in rows.tensors))
        return torch.cat([self.log_prob(*chunk) for chunk in chunks])

    def run(self, max_steps: int, bar: ProgressBar, limit: TimeLimit) -> str:
        """Takes steps until held-out draws gain nothing, and ends at the best parameters; says why."""
        start, at_start, reason = copies(self.trained), self.log_probs(self.held_out), ""
        best, at_best, batches = start, at_start, _batches(self.rows)
        self.history = [at_start.mean().item()]
        min_gain = _MIN_GAIN * self.rows.tensors[0].shape[-1]
        for factor in _STEP_FACTORS:
            copy_to(self.trained, best)
            self.optimizer = Adam(self.trained, factor * _STEP_SIZE, self._scales)
            first = len(self.history)
            while not reason and (
                len(self.history) < first + _PATIENCE
                or max(self.history[-_PATIENCE:]) > max(self.history[:-_PATIENCE]) + min_gain
            ):
                loss = -self.log_prob(*next(batches)).mean()
                self.take(loss)
                bar.update(self.losses, None)
                if limit.is_over():
                    reason = limit.reason
                elif self.num_steps == max_steps:
                    reason = f"all {max_steps} steps that it may take were taken"
                if reason or self.num_steps % _CHECK_EVERY == 0:
                    found = self.log_probs(self.held_out)
                    self.history.append(found.mean().item())
                    if found.mean() > at_best.mean():
                        best, at_best = copies(self.trained), found
        reason = reason or "held-out draws became no more probable"
        # of few draws some check is good by chance: the gain has to exceed its noise
        gains = at_best - at_start
        is_chance = gains.mean() <= _MIN_GAIN_IN_SE * gains.std() / len(gains) ** 0.5
        copy_to(self.trained, start if is_chance else best)
        if is_chance:
            reason += "; the gain could be chance, so it is where it began: more draws would help"
        return reason

    def nonfinite_sites(self) -> list[str]:
        return ["the log-density of draws (are they in its support?)"]


def _batches(rows: TensorDataset) -> Iterator[tuple[Tensor, ...]]:
    """Mini-batches without an end, of all rows once before one comes again."""
    while True:
        order = torch.randperm(len(rows), device=rows.tensors[0].device)
        yield from (rows[chosen] for chosen in order.split(_BATCH_SIZE))
