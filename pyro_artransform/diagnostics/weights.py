# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a guide with their importance weights, the model's density over the guide's."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from ..joint import LogJoint
from ..joint.evaluation import GuideDraws, stack
from ..joint.handlers import subsampled_plates
from ..joint.protocols import ReparametrizedGuide, SetUpGuide
from ..joint.sites import latent_nodes

Model = Callable[..., object]
Values = dict[str, Tensor]

_CHUNK = 1000
_NUM_COMPARED = 3
_LOG_WEIGHT = "_log_weight"


class Weighted(NamedTuple):
    """Draws with their log weights, of shape ``(n,)``.

    ``latent`` is on the unconstrained space, of shape ``(n, latent_dim)``, or ``None`` where draws
    are replayed (discrete sites, mini-batches); each of ``values`` has shape ``(n,) + site shape``.
    """

    latent: Tensor | None
    values: Values
    log_weights: Tensor


@torch.no_grad()
def log_weights(
    model: Model,
    guide: Model,
    num_samples: int,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    log_joint: LogJoint | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws of a guide on the unconstrained space, and their log weights.

    :param model: a Pyro model.
    :param guide: a guide of it, without discrete sites.
    :param num_samples: how many draws, n.
    :param args: the arguments of both.
    :param kwargs: their keyword arguments.
    :param log_joint: the model's log joint density, if it is known already.
    :return: shapes ``(n, latent_dim)`` and ``(n,)``.
    :raises ValueError: if the guide lacks a latent of the model, or has discrete sites.
    """
    latents, weights = [], []
    for chunk in weighted_draws(model, guide, num_samples, args, kwargs, log_joint):
        if chunk.latent is None:
            raise ValueError("guide: expected neither discrete sites nor latents of a minibatch")
        latents.append(chunk.latent)
        weights.append(chunk.log_weights)
    return torch.cat(latents), torch.cat(weights)


@torch.no_grad()
def weighted_draws(
    model: Model,
    guide: Model,
    num_samples: int,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    log_joint: LogJoint | None = None,
) -> Iterator[Weighted]:
    """Draws of a guide with their weights, a chunk at a time.

    A guide with ``rsample_and_log_prob`` gives draws with their density on the unconstrained space.
    Any other guide is traced, with its discrete and auxiliary sites, for its density on the
    constrained space. A guide that is a point at some site, such as ``AutoDelta``, has an infinite
    density there, despite its trace: its log weights are ``-inf``.

    The arguments and errors are those of :func:`log_weights`, but discrete sites are allowed.
    """
    draw = _drawer(model, guide, args, dict(kwargs or {}), log_joint)
    for start in range(0, num_samples, _CHUNK):
        yield draw(min(_CHUNK, num_samples - start))


def _drawer(
    model: Model,
    guide: Any,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    log_joint: LogJoint | None,
) -> Callable[[int], Weighted]:
    """A function of n that makes n weighted draws of a guide."""
    is_reparametrized = isinstance(guide, ReparametrizedGuide)
    if is_reparametrized and isinstance(guide, SetUpGuide):
        guide.set_up(*args, **kwargs)
    else:
        trace = _trace(guide, args, kwargs)
    if is_reparametrized:
        return _ReparametrizedDraws(guide, log_joint or LogJoint(model, args, kwargs))
    is_discrete = any(node["fn"].support.is_discrete for node in latent_nodes(trace))
    if is_discrete or subsampled_plates(trace):
        return _ReplayedDraws(model, guide, args, kwargs)
    return _TracedDraws(guide, args, kwargs, log_joint or LogJoint(model, args, kwargs))


def _trace(
    function: Model, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> poutine.Trace:
    with poutine.block():
        trace: poutine.Trace = poutine.trace(function).get_trace(*args, **kwargs)
    return trace


class _ReparametrizedDraws:
    """Draws with their density on the unconstrained space, which the guide gives itself."""

    def __init__(self, guide: ReparametrizedGuide, log_joint: LogJoint) -> None:
        self._guide, self._log_joint = guide, log_joint

    def __call__(self, n: int) -> Weighted:
        latent, log_q = self._guide.rsample_and_log_prob(n)
        expected = (n, self._log_joint.latents.latent_dim)
        if latent.shape != expected or log_q.shape != (n,):
            raise ValueError(
                f"guide: expected latents of shape {expected} and densities of shape {(n,)}, got "
                f"{tuple(latent.shape)} and {tuple(log_q.shape)}"
            )
        weights = self._log_joint(latent) - log_q
        return Weighted(latent, self._log_joint.latents.constrain(latent), weights)


class _TracedDraws:
    """Draws of a guide of continuous sites, and their density on the constrained space."""

    def __init__(
        self, guide: Model, args: tuple[object, ...], kwargs: dict[str, object], log_joint: LogJoint
    ) -> None:
        self._log_joint = log_joint
        self._draw = GuideDraws(lambda: guide(*args, **kwargs), log_joint.num_plates)
        _check_latents(log_joint.latents.sites, self._draw.shapes)
        self._is_point = _has_point(self._draw(_NUM_COMPARED)[0])

    def __call__(self, n: int) -> Weighted:
        values, log_q = self._draw(n)
        latents = self._log_joint.latents
        values = {name: values[name] for name in latents.sites}
        latent = latents.unconstrain(values)
        _, ladj = latents.constrain_with_ladj(latent)
        weights = self._log_joint(latent) - ladj - log_q
        return Weighted(latent, values, weights - torch.inf if self._is_point else weights)


class _ReplayedDraws:
    """Draws whose density needs the run of the model that follows each draw of the guide.

    That is so for discrete sites, and for latents of a mini-batch, whose indices the model takes over.
    """

    def __init__(
        self, model: Model, guide: Model, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        self._model, self._guide = model, guide
        self._arguments = args, kwargs
        self._is_point = False
        self._is_point = _has_point(self(_NUM_COMPARED).values)

    def __call__(self, n: int) -> Weighted:
        drawn = stack([self._draw_one() for _ in range(n)])
        weights = drawn.pop(_LOG_WEIGHT)
        return Weighted(None, drawn, weights - torch.inf if self._is_point else weights)

    def _draw_one(self) -> Values:
        guide_trace = _trace(self._guide, *self._arguments)
        replayed = poutine.replay(self._model, trace=guide_trace)
        model_trace = _trace(replayed, *self._arguments)
        values = {node["name"]: node["value"] for node in latent_nodes(model_trace)}
        _check_latents(values, guide_trace.nodes)
        log_p, log_q = model_trace.log_prob_sum(), guide_trace.log_prob_sum()
        return {**values, _LOG_WEIGHT: torch.as_tensor(log_p - log_q)}


def _check_latents(wanted: Iterable[str], drawn: Container[str]) -> None:
    missing = sorted(name for name in wanted if name not in drawn)
    if missing:
        raise ValueError(f"guide: expected all latents of the model, got none for {missing}")


def _has_point(values: Values) -> bool:
    """Whether some continuous site has one value in all draws."""
    continuous = [value for value in values.values() if value.is_floating_point()]
    return any(bool((value == value[:1]).all()) for value in continuous)
