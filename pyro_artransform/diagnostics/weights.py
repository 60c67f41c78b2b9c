# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a guide together with their importance weights, the model's density over the guide's."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..joint import LogJoint
from ..joint.plates import agree, is_subsampled, plate_nesting
from ..joint.scoring import ScoredRun

Model = Callable[..., Any]
Values = dict[str, Tensor]

_CHUNK = 1000
_NUM_CHECKS = 3


class Weighted(NamedTuple):
    """Draws with their log weights, of shape ``(n,)``.

    ``latent`` is on the unconstrained space, of shape ``(n, latent_dim)``, or ``None`` where the
    guide has discrete sites; each of ``values`` has shape ``(n,) + site shape``.
    """

    latent: Tensor | None
    values: Values
    log_weights: Tensor


@torch.no_grad()
def log_weights(
    model: Model,
    guide: Model,
    num_samples: int,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    log_joint: LogJoint | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws of a guide on the unconstrained space, and their log weights, by chunks.

    :param model: a Pyro model.
    :param guide: a guide of it, without discrete sites.
    :param num_samples: how many draws, n.
    :param args: the arguments of both.
    :param kwargs: their keyword arguments.
    :param log_joint: the model's log joint density, if it is there already.
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
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    log_joint: LogJoint | None = None,
) -> Iterator[Weighted]:
    """Draws of a guide with their weights, a chunk at a time.

    A guide that offers ``rsample_and_log_prob`` is asked for draws on the unconstrained space with
    their density there. Of any other one the trace is taken, its discrete sites and auxiliary sites
    included, and its density on the constrained space. One that is a point at some site, as
    ``AutoDelta`` is, has an infinite density there, whatever its trace says: its log weights are
    ``-inf``.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param num_samples: how many draws.
    :param args: the arguments of both.
    :param kwargs: their keyword arguments.
    :param log_joint: the model's log joint density, if it is there already.
    :raises ValueError: if the guide lacks a latent of the model.
    """
    draw = _way_to_draw(model, guide, args, dict(kwargs or {}), log_joint)
    for start in range(0, num_samples, _CHUNK):
        yield draw(min(_CHUNK, num_samples - start))


class _Draws(Protocol):
    def __call__(self, n: int) -> Weighted: ...


def _way_to_draw(
    model: Model,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    log_joint: LogJoint | None,
) -> _Draws:
    if hasattr(guide, "rsample_and_log_prob"):
        _set_up(guide, args, kwargs)
        return _Asked(guide, log_joint or LogJoint(model, args, kwargs))
    traced = _trace(guide, args, kwargs)
    if _needs_replay(traced):
        return _Replayed(model, guide, args, kwargs)
    return _Traced(guide, args, kwargs, log_joint or LogJoint(model, args, kwargs))


def _set_up(guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Lets a guide learn the latents of its model: by its ``set_up``, or by a call."""
    if hasattr(guide, "set_up"):
        guide.set_up(*args, **kwargs)
    else:
        _trace(guide, args, kwargs)


def _trace(function: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> poutine.Trace:
    with poutine.block():
        trace: poutine.Trace = poutine.trace(function).get_trace(*args, **kwargs)
    return trace


def _needs_replay(guide_trace: poutine.Trace) -> bool:
    """Whether a guide's draws make sense only together with the run of the model that follows it.

    That is so if it has discrete sites, or latents of a minibatch, whose indices the model has to
    take over.
    """
    sites = _latent_sites(guide_trace).values()
    if is_subsampled(guide_trace):
        return True
    return any(site["fn"].support.is_discrete for site in sites)


def _latent_sites(trace: poutine.Trace) -> dict[str, Any]:
    sites = dict(trace.iter_stochastic_nodes())
    return {name: site for name, site in sites.items() if not site_is_subsample(site)}


class _Asked:
    """Asks a guide for draws with their density on the unconstrained space."""

    def __init__(self, guide: Any, log_joint: LogJoint) -> None:
        self._guide = guide
        self._log_joint = log_joint

    def __call__(self, n: int) -> Weighted:
        latent, log_q = self._guide.rsample_and_log_prob(n)
        expected = (n, self._log_joint.latent_dim)
        if latent.shape != expected or log_q.shape != (n,):
            raise ValueError(
                f"guide: expected latents of shape {expected} and densities of shape {(n,)}, got "
                f"{tuple(latent.shape)} and {tuple(log_q.shape)}"
            )
        weights = self._log_joint(latent) - log_q
        return Weighted(latent, self._log_joint.constrain(latent), weights)


class _Traced:
    """Takes the trace of a guide of continuous sites: in a plate, if that is as one at a time."""

    def __init__(
        self, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any], log_joint: LogJoint
    ) -> None:
        self._run = lambda: guide(*args, **kwargs)
        self._log_joint = log_joint
        trace = _trace(self._run, (), {})
        self._num_plates = max(log_joint.num_plates, plate_nesting(trace))
        self._shapes = {name: site["value"].shape for name, site in _latent_sites(trace).items()}
        missing = sorted(log_joint.latents.sites.keys() - self._shapes.keys())
        if missing:
            raise ValueError(f"guide: expected all latents of the model, got none for {missing}")
        self._draw = self._by_plate if self._plate_is_right() else self._by_loop
        self._is_point = _has_point(self._draw(_NUM_CHECKS)[0])

    def __call__(self, n: int) -> Weighted:
        values, log_q = self._draw(n)
        latents = self._log_joint.latents
        values = {name: values[name] for name in latents.sites}
        latent = latents.unconstrain(values)
        _, ladj = latents.constrain_with_ladj(latent)
        weights = self._log_joint(latent) - ladj - log_q
        return Weighted(latent, values, weights - torch.inf if self._is_point else weights)

    def _by_plate(self, n: int) -> tuple[Values, Tensor]:
        run = ScoredRun({}, keep_dim=-1 - self._num_plates)
        with poutine.block(), run, pyro.plate("_draws", n, dim=-1 - self._num_plates):
            nodes: Any = poutine.trace(self._run).get_trace().nodes
        values = {k: nodes[k]["value"].reshape((n, *shape)) for k, shape in self._shapes.items()}
        return values, sum(run.terms.values(), _like(values).new_zeros(n))

    def _by_loop(self, n: int) -> tuple[Values, Tensor]:
        runs = [self._one({}) for _ in range(n)]
        values = {name: torch.stack([run[0][name] for run in runs]) for name in self._shapes}
        return values, torch.stack([log_q for _, log_q in runs])

    def _one(self, given: Mapping[str, Tensor]) -> tuple[Values, Tensor]:
        run = ScoredRun(given)
        with poutine.block(), run:
            nodes: Any = poutine.trace(self._run).get_trace().nodes
        values = {name: nodes[name]["value"] for name in self._shapes}
        return values, sum(run.terms.values(), _like(values).new_zeros(()))

    def _plate_is_right(self) -> bool:
        """Whether draws in a plate have the density that the guide gives them one at a time."""
        try:
            values, log_q = self._by_plate(_NUM_CHECKS)
            again = [
                self._one({name: v[i] for name, v in values.items()}) for i in range(_NUM_CHECKS)
            ]
        except Exception:  # whatever a guide raises for many draws says the same: not so
            return False
        expected = torch.stack([log_q for _, log_q in again])
        same = {name: torch.stack([run[0][name] for run in again]) for name in values}
        return all(
            agree(found, wanted)
            for found, wanted in [(log_q, expected), *((values[k], same[k]) for k in values)]
        )


class _Replayed:
    """Replays the model at each trace of a guide, one at a time."""

    def __init__(
        self, model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._model, self._guide = model, guide
        self._arguments = args, kwargs
        self._is_point = False
        self._is_point = _has_point(self(_NUM_CHECKS).values)

    def __call__(self, n: int) -> Weighted:
        runs = [self._one() for _ in range(n)]
        values = {name: torch.stack([run[0][name] for run in runs]) for name in runs[0][0]}
        weights = torch.stack([weight for _, weight in runs])
        return Weighted(None, values, weights - torch.inf if self._is_point else weights)

    def _one(self) -> tuple[Values, Tensor]:
        guide_trace = _trace(self._guide, *self._arguments)
        replayed = poutine.replay(self._model, trace=guide_trace)
        model_trace = _trace(replayed, *self._arguments)
        values = {name: site["value"] for name, site in _latent_sites(model_trace).items()}
        missing = sorted(values.keys() - guide_trace.nodes.keys())
        if missing:
            raise ValueError(f"guide: expected all latents of the model, got none for {missing}")
        log_p, log_q = model_trace.log_prob_sum(), guide_trace.log_prob_sum()
        return values, torch.as_tensor(log_p - log_q)


def _has_point(values: Values) -> bool:
    """Whether some continuous site has one value in all draws."""
    continuous = [value for value in values.values() if value.is_floating_point()]
    return any(bool((value == value[:1]).all()) for value in continuous)


def _like(values: Values) -> Tensor:
    """One of the values, for its dtype and device."""
    return next(iter(values.values()))
