# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the log density of a mini-batch is a sum over its rows, as training on mini-batches assumes."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from ..arguments import warn_user
from ..joint.handlers import hidden_sites
from ..joint.sites import initial_value
from ..joint.traces import is_deterministic, latent_nodes
from .loader import Batch

Model = Callable[..., object]
# pairs of batches that are compared, how far latents are from the start on the unconstrained space, and
# units in the last place by which sums of rows may differ
_NUM_PAIRS, _DISTANCE, _ROUND_OFF = 2, 0.5, 100.0


class _Run(NamedTuple):
    """One run of a model on a batch."""

    totals: dict[str, float]  #: the log-density of each site, without its scale
    scales: dict[str, float]
    sizes: dict[str, int]  #: of the plates
    slack: float  #: by which sums may differ for round-off


@torch.no_grad()
def warn_of_no_sum(model: Model, batches: Sequence[Batch]) -> str | None:
    """Warns where a log density is no sum over rows, and says why; ``None`` where that is not known.

    At random values of the latents that of two batches is compared with that of their union.
    """
    found: list[str | None] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for pair in [*zip(batches[::2], batches[1::2])][:_NUM_PAIRS]:
            try:
                found.append(_why_no_sum(model, *pair))
            except (
                Exception
            ):  # any error means that the model does not take the union of two batches
                found.append(None)
    if objection := next(filter(None, found), ""):
        warn_user(objection, UserWarning)
        return objection
    return "" if "" in found else None


def _why_no_sum(model: Model, first: Batch, second: Batch) -> str | None:
    batches = first, second, Batch(*(_joined(*parts) for parts in zip(first, second)))
    traces = [_trace(model, batch) for batch in batches]
    sizes = [_plate_sizes(trace) for trace in traces]
    nodes = latent_nodes(traces[-1])
    values = {node["name"]: _moved(node) for node in nodes}
    parts = {node["name"]: _parts(node, values[node["name"]], sizes) for node in nodes}
    given = [{name: part[k] for name, part in parts.items()} for k in range(2)]
    state = torch.get_rng_state()
    one, other, both = (_run(model, *each) for each in zip(batches, (*given, values), (state,) * 3))
    again = _run(model, batches[-1], values, torch.Generator().manual_seed(0).get_state())
    if both.totals != again.totals or not _is_union(one, other, both):
        return None
    total = _sum_over_rows(both, one, other, both)
    apart = sum(_sum_over_rows(part, one, other, both) for part in (one, other))
    if not abs(total - apart) > both.slack:
        return ""
    return (
        f"the log density of a mini-batch is no sum over its rows: that of two batches is {apart:.6g}, and "
        f"{total:.6g} where both are one, as of a model that centers (y - y.mean()), standardizes or "
        "normalizes by the batch. Compute such numbers from all data before the fit, as arguments of it"
    )


def _joined(one: Any, other: Any) -> Any:
    """The arguments of two batches as those of one; a ``ValueError`` if that is not known."""
    if one is other:
        return one
    if isinstance(one, Mapping):
        return {name: _joined(value, other[name]) for name, value in one.items()}
    if isinstance(one, (tuple, list)):
        return tuple(_joined(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, Tensor) and one.dim():
        return torch.cat([one, other])
    if type(one) is type(other) and bool(one == other):
        return one
    raise ValueError(f"expected batches of tensors, got {type(one).__name__}")


def _plate_sizes(trace: poutine.Trace) -> dict[str, int]:
    stacks = (node.get("cond_indep_stack", ()) for node in trace.nodes.values())
    return {frame.name: frame.size for frames in stacks for frame in frames}


def _trace(model: Model, batch: Batch) -> poutine.Trace:
    init = InitMessenger(partial(initial_value, init_to_median))
    with pyro.validation_enabled(False), hidden_sites(), init:
        trace: poutine.Trace = poutine.trace(model).get_trace(*batch.args, **batch.kwargs)
    return trace


def _moved(node: Any) -> Tensor:
    """A random value of a continuous latent near that of a run; that of a discrete one as it is."""
    if node["fn"].support.is_discrete:
        return node["value"]
    bijection = biject_to(node["fn"].support)
    u = bijection.inv(node["value"])
    return bijection(u + _DISTANCE * torch.randn_like(u))


def _parts(node: Any, value: Tensor, sizes: Sequence[Mapping[str, int]]) -> Sequence[Tensor]:
    """The values of a latent in each of two batches, from that in both."""
    one, other, both = sizes
    for frame in node["cond_indep_stack"]:
        if one[frame.name] != both[frame.name] and frame.dim is not None:
            dim = frame.dim - node["fn"].event_dim
            return value.split([one[frame.name], other[frame.name]], dim)
    return value, value


def _run(model: Model, batch: Batch, values: Mapping[str, Tensor], state: Tensor) -> _Run:
    torch.set_rng_state(state)
    trace = _trace(poutine.condition(model, dict(values)), batch)
    totals, scales, slack = {}, {}, 0.0
    site: Any
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if name not in values and is_deterministic(site):
            continue
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        log_prob = scale_and_mask(log_prob, mask=site["mask"])
        totals[name] = float(log_prob.double().sum())
        scales[name] = float(torch.as_tensor(site["scale"]).double().max())
        slack += _ROUND_OFF * torch.finfo(log_prob.dtype).eps * float(log_prob.double().abs().sum())
    return _Run(totals, scales, _plate_sizes(trace), slack)


def _is_union(one: _Run, other: _Run, both: _Run) -> bool:
    """Whether one run has the rows of two others, by the sizes of its plates or by its scales."""
    sizes = [(one.sizes[k], other.sizes[k], size) for k, size in both.sizes.items()]
    if any(a + b == size for a, b, size in sizes):
        return all(size in (a + b, a, b) for a, b, size in sizes)
    a, b, whole = (1 / max(run.scales.values()) for run in (one, other, both))
    return math.isclose(a + b, whole, rel_tol=1e-6)


def _sum_over_rows(run: _Run, one: _Run, other: _Run, both: _Run) -> float:
    """The log-density of sites but for those that are the same in all batches, such as global latents."""
    return math.fsum(
        total
        for name, total in run.totals.items()
        if not one.totals.get(name) == other.totals.get(name) == both.totals.get(name)
    )
