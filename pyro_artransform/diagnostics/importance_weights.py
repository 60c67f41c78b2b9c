# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a guide with their importance weights, the ratio of the model's density to the guide's."""

import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.util import get_rng_state
from torch import Tensor

from .._base.arguments import first_of
from .._base.progress import generators_at
from .._base.time_limit import has_limit
from ..model import LogJoint
from ..model.density import Args, Kwargs
from ..model.draw_plate import GuideSampler
from ..model.handlers import hidden_sites
from ..model.protocols import FlowGuide, MinibatchGuide
from ..model.run_once import run_once
from ..model.traces import check_data, latent_nodes, runs_model, subsampled_plates
from ..model.vectorization import NUM_COMPARED, draws_at_a_time, stack

Model = Callable[..., object]
Run = Callable[[], object]
Values = dict[str, Tensor]

NUM_DRAWS = 10_000  #: draws by which a guide is judged
_SMALL_CHUNK, _FEW = 100, 4  # draws at once if they are slow or time is limited, and if both


class Weighted(NamedTuple):
    """Draws in a guide's coordinates, ``(n, D)`` or ``None`` if replayed, their values, weights ``(n,)``.

    ``log_joint`` is the density with the strategy that suits these draws, ``None`` if they are replayed.
    """

    latent: Tensor | None
    values: Values
    log_weights: Tensor
    log_joint: LogJoint | None = None


Drawer = Callable[[Any, int], Weighted]


@torch.no_grad()
def log_weights(
    model: Model,
    guide: Model,
    num_samples: int,
    args: Args = (),
    kwargs: Kwargs | None = None,
    log_joint: LogJoint | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws ``(n, latent_dim)`` of a guide in its coordinates, and their log weights ``(n,)``."""
    chunks = list(weighted_draws(model, guide, num_samples, args, kwargs or {}, log_joint))
    latents = [chunk.latent for chunk in chunks if chunk.latent is not None]
    if len(latents) < len(chunks):
        raise ValueError("guide: expected no latents of a mini-batch, got some")
    return torch.cat(latents), torch.cat([chunk.log_weights for chunk in chunks])


@torch.no_grad()
def weighted_draws(
    model: Model, guide: Model, n: int, args: Args, kwargs: Kwargs, log_joint: LogJoint | None
) -> Iterator[Weighted]:
    """Yields draws of a guide with their weights, in chunks.

    A guide with ``rsample_and_log_prob`` computes its density in its coordinates; any other guide is
    traced. A guide that is a point at some site, such as ``AutoDelta``, has an infinite density there,
    despite its trace, so that its log weights are ``-inf``.
    """
    offered: object = guide
    run_model, run_guide = partial(model, *args, **kwargs), partial(guide, *args, **kwargs)
    if isinstance(offered, FlowGuide):
        offered.set_up(*args, **kwargs)
        log_joint = log_joint or LogJoint(run_model)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            check_same_latents(log_joint, run_guide)
        draw: Drawer = partial(_draw_unconstrained, offered)
        is_point = False
    else:
        draw, is_point, log_joint = _drawer(run_model, run_guide, log_joint)
    is_slow = log_joint is not None and log_joint.strategy == "loop"
    chunk = most = _FEW if is_slow and has_limit() else _SMALL_CHUNK
    if log_joint is not None and log_joint.strategy != "loop":
        most = draws_at_a_time(log_joint.latents.latent_dim)
        chunk = _SMALL_CHUNK if has_limit() else most
    start = 0
    while start < n:
        drawn = draw(log_joint, min(chunk, n - start))
        log_joint = drawn.log_joint or log_joint
        yield drawn._replace(log_weights=drawn.log_weights - torch.inf) if is_point else drawn
        # at a time limit, a chunk takes about as long as all before
        start, chunk = start + chunk, min(2 * chunk, most)


class ModelAndGuide(NamedTuple):
    """A model, a guide for its latents, the arguments of both, and the log joint density."""

    model: Model
    guide: Any  #: a callable, which may be a guide of ``model.protocols``
    args: Args
    kwargs: Kwargs
    log_joint: LogJoint

    @classmethod
    def of(cls, model: Model, guide: Model, args: Args, kwargs: Kwargs) -> "ModelAndGuide":
        """Runs the guide, and builds the density in the coordinates of the guide's draws.

        The run sets up the guide for the latents of its model, and registers its parameters in Pyro's store.
        """
        generators = get_rng_state()
        with torch.no_grad(), hidden_sites():
            guide(*args, **kwargs)
        offered, log_joint = cast(object, guide), None
        if isinstance(offered, FlowGuide):
            log_joint = offered.log_joint_of(model, args, kwargs)
        if log_joint is None:
            with generators_at(generators):  # its start does not depend on the guide
                log_joint = LogJoint(model, args, kwargs)
        if isinstance(offered, (FlowGuide, MinibatchGuide)):
            log_joint = log_joint.view(maps_priors=offered.maps_priors)
        if isinstance(offered, FlowGuide) and offered.coordinates is not None:
            log_joint = log_joint.with_coordinates(offered.coordinates)
        return cls(model, guide, args, kwargs, log_joint)

    def weighted_draws(self, count: int) -> Iterator[Weighted]:
        return weighted_draws(self.model, self.guide, count, self.args, self.kwargs, self.log_joint)

    def draws(self, count: int) -> Tensor:
        """Draws ``(count, latent_dim)`` of the guide, in the coordinates of the density."""
        return log_weights(self.model, self.guide, count, self.args, self.kwargs, self.log_joint)[0]


def has_point(values: Values) -> bool:
    """Whether any of these continuous latents has the same value in all draws."""
    return any(value.numel() and bool((value == value[:1]).all()) for value in values.values())


def _draw_unconstrained(guide: FlowGuide, log_joint: Any, n: int) -> Weighted:
    """Draws with the density computed by the guide, in the coordinates of the log joint density."""
    density = log_joint
    if guide.coordinates is not None and log_joint.coordinates is None:
        density = log_joint.with_coordinates(guide.coordinates)
    latent, log_q = guide.rsample_and_log_prob(n)
    expected = (n, log_joint.latents.latent_dim)
    if latent.shape != expected or log_q.shape != (n,):
        raise ValueError(
            f"guide: expected latents of shape {expected} and densities of shape {(n,)}, got "
            f"{tuple(latent.shape)} and {tuple(log_q.shape)}"
        )
    log_weights, density = _log_ratio(density, latent, log_q)
    unconstrained, _ = density.to_unconstrained(latent)
    latent = unconstrained if log_joint.coordinates is None else latent
    values = log_joint.latents.constrain(unconstrained)
    return Weighted(latent, values, log_weights, density.with_coordinates(log_joint.coordinates))


def _drawer(
    model: Run, guide: Run, log_joint: LogJoint | None
) -> tuple[Drawer, bool, LogJoint | None]:
    """A function that makes n draws of a guide that is traced, whether the guide is a point, the density."""
    trace = run_once(guide, validated=True)
    check_data(trace)
    if discrete := [n["name"] for n in latent_nodes(trace) if n["fn"].support.is_discrete]:
        raise ValueError(
            f"guide: expected continuous latents, got draws of the discrete {first_of(discrete)}: enumerate "
            "discrete latents of the model by pyro.infer.config_enumerate, and leave them out of the guide"
        )
    if subsampled_plates(trace):
        draw = partial(_draw_replayed, model, guide)
        values = draw(None, NUM_COMPARED).values
        _check_auxiliary(trace, values)
    else:
        log_joint = log_joint or LogJoint(model)
        guide_draws, sites = GuideSampler(guide, log_joint.num_plates), log_joint.latents.sites
        _check_latents(sites, guide_draws.shapes)
        _check_auxiliary(trace, sites)
        draw = partial(_draw_constrained, guide_draws)
        values = guide_draws(NUM_COMPARED)[0]
        # a simplex with a single entry is constant without being a point
        values = {name: values[name] for name in sites if sites[name].unconstrained_shape.numel()}
    return draw, has_point(values), log_joint


def _draw_constrained(draw: GuideSampler, log_joint: Any, n: int) -> Weighted:
    drawn, log_q = draw(n)
    values = {name: drawn[name] for name in log_joint.latents.sites}
    latent = log_joint.latents.unconstrain(values)
    _, ladj = log_joint.latents.constrain_with_ladj(latent)
    return Weighted(latent, values, *_log_ratio(log_joint, latent, ladj + log_q))


def _log_ratio(log_joint: LogJoint, latent: Tensor, log_q: Tensor) -> tuple[Tensor, LogJoint]:
    """The log weights of draws, and the density by a strategy that does not mix them, with a warning."""
    if log_joint.is_random:  # each draw sees its own mini-batch
        return torch.cat([*map(log_joint, latent.split(1))]) - log_q, log_joint
    values, density = log_joint.checked(latent, log_q)
    if density.strategy != log_joint.strategy:
        warnings.warn(
            "the model has a different log density for many draws at once than for one at a time: from now "
            f"on, draws are evaluated by {density.strategy}. Write it without branches (torch.where)",
            stacklevel=2,
        )
    return values - log_q, density


def _draw_replayed(model: Run, guide: Run, log_joint: None, n: int) -> Weighted:
    """Draws with latents of a mini-batch: the model is replayed at each draw of the guide."""
    rows, log_weights = [], []
    for _ in range(n):
        drawn = run_once(guide, validated=True)
        replayed = run_once(model, replayed=drawn, validated=True)
        rows.append({node["name"]: node["value"] for node in latent_nodes(replayed)})
        _check_latents(rows[-1], drawn.nodes)
        # if a guide runs the model, the data are not part of its density
        hides_data: dict[str, Any] = {"site_filter": lambda _, node: not node["is_observed"]}
        log_q = drawn.log_prob_sum(**(hides_data if runs_model(drawn) else {}))
        log_weights.append(torch.as_tensor(replayed.log_prob_sum() - log_q))
    return Weighted(None, stack(rows), torch.stack(log_weights))


def check_same_latents(log_joint: LogJoint, guide: Run) -> None:
    """Raises a ``ValueError`` if a guide's latents or their order differ from the model's."""
    expected = {name: tuple(site.shape) for name, site in log_joint.latents.sites.items()}
    nodes = [
        n
        for n in latent_nodes(run_once(guide, validated=True))
        if not n["infer"].get("is_auxiliary")
    ]
    got = {node["name"]: tuple(node["value"].shape) for node in nodes}
    # a guide with only a latent vector does not name its latents; their order is that of the vector
    if got and list(got.items()) != list(expected.items()):
        raise ValueError(
            f"guide: expected a guide for this model, with the latents {expected} in this order, got {got}. "
            "Make it from the model that it is used with, as in AutoIAF(model)"
        )


def _check_auxiliary(trace: poutine.Trace, wanted: Container[str]) -> None:
    """Raises a ``ValueError`` if sites that only the guide has have more elements than its Deltas."""
    nodes = {node["name"]: node for node in latent_nodes(trace)}
    others = sorted(name for name in nodes if name not in wanted)
    num_others = sum(nodes.pop(name)["value"].numel() for name in others)
    points = [node for node in nodes.values() if _is_point(node["fn"])]
    num_determined = sum(node["value"].numel() for node in points)
    if num_others > num_determined:
        raise ValueError(
            "guide: expected only sites of the model, or auxiliary ones that determine them through a Delta, "
            f"got {others}, so the density of the model's latents alone is unknown: marginalize these sites, "
            "or remove them"
        )


def _is_point(distribution: Any) -> bool:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    kind = type(distribution)  # a subclass of Delta may be random
    return issubclass(kind, Delta) and (kind.sample, kind.rsample) == (Delta.sample, Delta.rsample)


def _check_latents(wanted: Iterable[str], drawn: Container[str]) -> None:
    missing = sorted(name for name in wanted if name not in drawn)
    if missing:
        raise ValueError(f"guide: expected all latents of the model, got none for {missing}")
