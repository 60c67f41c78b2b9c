# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""All mini-batches of a loader, for passes over all data."""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .._base.comparison import agree, round_off
from ..model import FullDataDensity, LogJoint
from .loader import Batch, BatchStream

# the most bytes of batches kept in memory between passes, and the rows of joined ones (benchmarks/crossed.md)
_MOST_HELD, _ROWS = 2**29, 50_000
# of the points at which the density of joined batches is compared with that of its parts
_SPREAD = 0.1
# errors of a model that is called with another number of rows; that time is over is none of them
_REFUSALS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def full_data_density(log_joint: LogJoint, stream: BatchStream) -> FullDataDensity:
    """The log joint density of all batches of a stream, evaluated for several batches at once if possible.

    If processes share the stream, each evaluates its own batches.
    """
    if stream.all_batches is None:
        is_same = False
        with suppress(*_REFUSALS):  # the model does not accept joined batches
            is_same = _is_same(log_joint, stream)
        stream.all_batches = AllBatches(stream, _ROWS if is_same else 0)
    return FullDataDensity(log_joint, stream.all_batches, stream.processes)


def density_of_all_rows(
    log_joint: LogJoint, stream: BatchStream, batch: Batch
) -> FullDataDensity | None:
    """The same, if a pass over the stream has all data, and they share all latents; otherwise ``None``.

    :param batch: one of the batches.
    """
    structure = log_joint.structure(*batch)
    if not (stream.whole.is_partition and structure.is_scaled) or structure.subsampled_latents:
        return None
    whole = full_data_density(log_joint, stream)
    return whole if whole.is_of_all_data and not whole.is_random else None


@torch.no_grad()
def _is_same(log_joint: LogJoint, stream: BatchStream) -> bool:
    """Whether the density of the first joined batches is that of its parts, at several points."""
    parts = next(_groups(stream, _ROWS))
    if len(parts) == 1:
        return True
    points = torch.stack([log_joint.start + _SPREAD * k for k in range(3)])
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        one, other = (FullDataDensity(log_joint, own)(points) for own in ([_join(parts)], parts))
    return agree(one.to(points), other.to(points), round_off)


class AllBatches:
    """The batches of the first epoch of a stream, the same each time; kept if they take little memory.

    :param num_rows: batches are joined up to so many rows, if all their tensors have a row for each row of
        data; by default they are not.
    """

    def __init__(self, stream: BatchStream, num_rows: int = 0) -> None:
        self._stream, self._num_rows, self._held = stream, num_rows, list[Batch]()

    def __iter__(self) -> Iterator[Batch]:
        if self._held:
            yield from self._held
            return
        held, size = list[Batch](), 0.0
        for batch in map(_join, _groups(self._stream, self._num_rows)):
            size += sum(map(_num_bytes, tree_leaves(batch)))
            held.append(batch)
            if size > _MOST_HELD:
                held.clear()
            yield batch
        self._held = held


def _groups(stream: BatchStream, num_rows: int) -> Iterator[list[Batch]]:
    """The batches of a pass, those together that are joined."""
    group = list[Batch]()
    for batch in stream.one_pass(stream.num_batches):
        rows = sum(map(_num_rows, (*group, batch)))
        if group and (rows > num_rows or not _can_join(group[-1], batch)):
            yield group
            group = []
        group.append(batch)
    yield group


def _join(group: list[Batch]) -> Batch:
    if len(group) == 1:
        return group[0]
    values, specs = zip(*map(tree_flatten, group))
    joined = [torch.cat(v) if isinstance(v[0], Tensor) else v[0] for v in zip(*values)]
    return cast(Batch, tree_unflatten(joined, specs[0]))


def _num_bytes(value: object) -> float:
    if isinstance(value, Tensor):
        return value.nbytes
    return 0 if isinstance(value, (int, float, str, type(None))) else math.inf  # unknown


def _num_rows(batch: Batch) -> float:
    """The common length of all tensors; infinite if they differ, or there are none."""
    rows = {len(value) for value in tree_leaves(batch) if isinstance(value, Tensor) and value.dim()}
    return rows.pop() if len(rows) == 1 else math.inf


def _can_join(one: Batch, other: Batch) -> bool:
    """Whether all tensors are of rows, which differ, and all else is equal."""
    (values, spec), (others, of_other) = tree_flatten(one), tree_flatten(other)
    return spec == of_other and _num_rows(other) < math.inf and all(map(_are_parts, values, others))


def _are_parts(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.dim():
        is_alike = one.shape[1:] == other.shape[1:] and one.dtype == other.dtype
        return is_alike and not (one.shape == other.shape and torch.equal(one, other))
    return one is other or (isinstance(one, (int, float, str)) and one == other)
