# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Fits a density to given draws."""

import time
from threading import Event
from typing import Any

import torch

from ...arguments import check_integer
from ...joint.protocols import ScaledSteps
from ..config import DrawsConfig
from ..progress import ProgressBar, noted_interrupts, progress_bar, seeded
from .densities import Rows, density_and_rows, log_probs
from .result import DrawsResult
from .training import LikelihoodTraining

_FEWEST = 20

_NO_GAIN = "held-out draws became no more probable"
_LIMIT = "all {} steps that it may take were taken"
_INTERRUPTED = "it was interrupted"
_NOTHING_SURE = (
    "; what they had gained could be chance, so that it is where it began: more draws would help"
)


def fit_draws(
    density: Any,
    draws: Any,
    *args: object,
    context: Any = None,
    max_steps: int | None = None,
    seed: int | None = None,
    progress: bool = True,
    config: DrawsConfig | None = None,
    **kwargs: object,
) -> DrawsResult:
    r"""Fits a guide or a density to given draws, with nothing to tune: maximum likelihood.

    .. math::

        \max_\theta \frac1n \sum_i \log q_\theta(z_i) \qquad z_i \sim p

    which for many draws is the forward KL divergence :math:`\mathrm{KL}(p \| q_\theta)`. A density
    that is fitted so covers all of the draws, where :func:`~pyro_artransform.fit` may leave a mode out.
    What is fitted are

    - a guide of this package, to draws of its model's posterior, such as those of NUTS. It starts at
      the Gaussian of their moments. Then ``diagnostics.importance`` has the evidence of the model;
    - a ``FlowDistribution`` or ``TransformedDistribution``, to rows of data. It starts where it is: end
      its flow with :func:`~pyro_artransform.transforms.standardize` of the data;
    - a ``ConditionalTransformedDistribution``, to rows of data given rows of a context.

    A tenth of the draws says when to stop, 200 at least or a quarter of all, and another tenth how good the
    result is; both are left out of the steps. Where what the former have gained could be chance, the
    density stays where it began. Draws that are copies or neighbours of each other, as in a slow chain,
    make both too optimistic: thin them.

    The density of given points is cheap for :func:`~pyro_artransform.maf` and
    :class:`~pyro_artransform.AutoMAF`, and takes several evaluations of the networks for
    :func:`~pyro_artransform.iaf` and :class:`~pyro_artransform.AutoIAF`.

    :param density: the guide or the distribution; it is trained in place.
    :param draws: for a guide, the values of all sites by name, each of shape ``batch + site shape``; for a
        distribution shape ``(n, D)``.
    :param args: the model's arguments, as ``kwargs`` only for a guide that was never called.
    :param context: shape ``(n, C)``, only for a conditional distribution.
    :param max_steps: the most steps; by default 20,000, which most fits end long before.
    :param seed: makes the fit repeatable, and leaves the generators as they were.
    :param progress: whether to show a progress bar.
    :param config: other numbers.
    :raises TypeError: if the density is none of the above, or has no parameters.
    :raises ValueError: if draws or context have another shape, are fewer than 20, not finite, constant
        in a coordinate, or at an edge of their support.
    :raises RuntimeError: if it is called in ``torch.inference_mode``.
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

    **References**

    1. Masked Autoregressive Flow for Density Estimation (Papamakarios, Pavlakou, Murray, 2017),
       https://arxiv.org/abs/1705.07057
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "fit_draws: expected to be called outside of torch.inference_mode, without gradients"
        )
    began, config = time.perf_counter(), config or DrawsConfig()
    max_steps = check_integer("max_steps", config.max_steps if max_steps is None else max_steps)
    with (
        seeded(seed),
        progress_bar(progress, "log-likelihood") as bar,
        noted_interrupts() as interrupted,
        torch.enable_grad(),
    ):
        fitted, rows = density_and_rows(density, draws, context, args, kwargs)
        trained, stopping, held_out = _split(rows, config)
        bar.say("start")
        start = fitted.start(trained, config.max_distance)
        scales = density if isinstance(density, ScaledSteps) else None
        training = LikelihoodTraining(fitted, trained, stopping, scales, config)
        stopped_because = _train(training, max_steps, bar, interrupted)
        found = log_probs(fitted, held_out).double()
    return DrawsResult(
        log_likelihood=found.mean().item(),
        log_likelihood_se=found.std().item() / len(found) ** 0.5,
        num_held_out=len(found),
        history=training.history,
        num_steps=len(training.losses),
        num_skipped=training.num_skipped,
        seconds=time.perf_counter() - began,
        stopped_because=stopped_because,
        start=start,
    )


def _split(rows: Rows, config: DrawsConfig) -> tuple[Rows, Rows, Rows]:
    """The draws in random order: for the steps, for their end, and for the result."""
    count = len(rows.values)
    if count < _FEWEST:
        raise ValueError(f"draws: expected {_FEWEST} or more, got {count}")
    size = min(max(int(config.held_out_share * count), 2), config.max_held_out)
    stopping = max(size, min(config.stopping_draws, count // 4))
    order = torch.randperm(count, device=rows.values.device)
    parts = order.split([count - stopping - size, stopping, size])
    return rows.take(parts[0]), rows.take(parts[1]), rows.take(parts[2])


def _train(
    training: LikelihoodTraining, max_steps: int, bar: ProgressBar, interrupted: Event
) -> str:
    """Takes steps until held-out draws gain nothing, and ends at the best parameters; says why."""
    bar.say("fit")
    reason = _LIMIT.format(max_steps)
    every = training.config.look_every
    for step in range(1, max_steps + 1):
        training.step()
        bar.update(training.losses, None)
        if (step % every == 0 or step == max_steps) and training.look():
            reason = _NO_GAIN
            break
        if interrupted.is_set():
            training.look()
            reason = _INTERRUPTED
            break
    return reason if training.conclude() else reason + _NOTHING_SURE
