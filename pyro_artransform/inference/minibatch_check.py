# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks that the log density of a mini-batch is a sum over its rows, as mini-batch training assumes.

Two batches of equal length exchange every other row. At fixed latents, the total of a density that is a
sum over rows, whatever its scale, is the same before and after.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._base.arguments import warn_user
from .._base.comparison import round_off
from ..diagnostics.checks import Check, FailedCheck
from ..model.run_once import run_once
from ..model.traces import latent_nodes, moved_latent
from .loader import Batch

Model = Callable[..., object]
FailedChecks = tuple[FailedCheck, ...]
_DISTANCE = 0.5  # of latents from the start, on the unconstrained space


@torch.no_grad()
def warn_of_no_sum(model: Model, batches: Sequence[Batch]) -> FailedChecks | None:
    """Warns if a log density is not a sum over rows, and returns the failed check; ``None`` if not known.

    The first pair that can be compared decides.

    :param batches: some batches of an epoch, in order; those of a pair are half of them apart.
    """
    half, failed = len(batches) // 2, None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for pair in zip(batches[:half], batches[half:]):
            with suppress(Exception):  # any error means that the model does not accept mixed rows
                failed = _why_no_sum(model, *pair)
            if failed is not None:
                break
    for each in failed or ():
        warn_user(f"{each.sentence}. {each.remedy}", UserWarning)
    return failed


def _why_no_sum(model: Model, first: Batch, second: Batch) -> FailedChecks | None:
    pairs = [_exchanged(*parts) for parts in zip(first, second)]
    mixed = [Batch(*parts) for parts in zip(*pairs)]
    values = _latents(run_once(model, *first, init_loc_fn=init_to_median))
    batches, state = (first, second, *mixed), torch.get_rng_state()
    runs = [_log_density(model, *pair, state) for pair in zip(batches, values)]
    new_state = torch.Generator().manual_seed(0).get_state()
    again, *_ = _log_density(model, first, values[0], new_state)
    (one, other, *new), shares, slacks = zip(*runs)
    if again != one:  # the model is random
        return None
    are_shares_sums = torch.allclose(shares[0] + shares[1], shares[2] + shares[3])
    if are_shares_sums and not abs(one + other - sum(new)) > sum(slacks):
        return ()
    return (Check.NO_SUM.failed(before=one + other, after=sum(new)),)


def _exchanged(one: Any, other: Any) -> tuple[Any, Any]:
    """The arguments of two batches after they exchange every other row.

    :raises ValueError: if an argument's rows are not known.
    """
    if isinstance(one, Mapping):
        pairs = {name: _exchanged(value, other[name]) for name, value in one.items()}
        return {k: a for k, (a, _) in pairs.items()}, {k: b for k, (_, b) in pairs.items()}
    if isinstance(one, (tuple, list)):
        lists = [_exchanged(*pair) for pair in zip(one, other, strict=True)]
        return tuple(a for a, _ in lists), tuple(b for _, b in lists)
    if isinstance(one, Tensor) and one.dim() and one.shape == other.shape:
        is_kept = torch.arange(len(one), device=one.device) % 2 == 0
        is_kept = is_kept.reshape(-1, *(1,) * (one.dim() - 1))
        return torch.where(is_kept, one, other), torch.where(is_kept, other, one)
    if one is other or (type(one) is type(other) and bool(one == other)):
        return one, other
    raise ValueError(f"expected batches of tensors of one shape, got {type(one).__name__}")


def _latents(trace: poutine.Trace) -> list[dict[str, Tensor]]:
    """Values of all latents for two batches before and after they exchange every other row.

    All four are equal except for latents of the elements of a subsampled plate.
    """
    by_batch: list[dict[str, Tensor]] = [{}, {}, {}, {}]
    for node in latent_nodes(trace):
        values = [_moved(node)] * 4
        for frame in node["cond_indep_stack"]:
            if frame.dim is not None and frame.full_size not in (None, frame.size):
                dim = frame.dim - node["fn"].event_dim
                one, other = (_moved(node).movedim(dim, 0) for _ in range(2))
                values = [v.movedim(0, dim) for v in (one, other, *_exchanged(one, other))]
        for of_batch, value in zip(by_batch, values):
            of_batch[node["name"]] = value
    return by_batch


def _moved(node: Any) -> Tensor:
    """A random value near a site's value in the trace."""
    return moved_latent(node, lambda u: u + _DISTANCE * torch.randn_like(u))


def _log_density(
    model: Model, batch: Batch, values: Mapping[str, Tensor], state: Tensor
) -> tuple[float, Tensor, float]:
    """The log density of all sites divided by their scales, the inverse scales, and the round-off error.

    Only scales that are one number count; inverse scales of padded batches must add up, too.
    """
    torch.set_rng_state(state)
    trace = run_once(model, *batch, at=values, init_loc_fn=init_to_median)
    trace.compute_log_prob(site_filter=lambda _, site: not site_is_subsample(site))
    total, shares, slack = 0.0, list[float](), 0.0
    for site in (each for each in trace.nodes.values() if "log_prob" in each):
        term, scale = site["log_prob"].double(), torch.as_tensor(site["scale"])
        is_number = scale.numel() == 1 and float(scale) > 0
        shares.append(1 / float(scale) if is_number else 1.0)
        total += shares[-1] * float(term.sum())
        slack += round_off(site["log_prob"]) * shares[-1] * float(term.abs().sum())
    return total, torch.tensor(shares, dtype=torch.float64, device="cpu"), slack
