# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates with lists of parents of similar lengths, padded to one rectangle of indices."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedGroup:
    """Coordinates with at most k parents each.

    :param coordinates: the m coordinates, sorted by level.
    :param slices: the rows of each level that is in the group, by level.
    :param parents: shape ``(m, k)``, padded with the number of all coordinates.
    :param is_parent: shape ``(m, k)``, false for padding.
    """

    coordinates: tuple[int, ...]
    slices: dict[int, slice]
    parents: Tensor
    is_parent: Tensor


def padded_groups(parents: Sequence[Sequence[int]], level: Sequence[int]) -> list[PaddedGroup]:
    """All coordinates that have parents, in few groups of similar numbers of parents."""
    by_level: dict[int, list[int]] = {}
    for i, own in enumerate(parents):
        if own:
            by_level.setdefault(level[i], []).append(i)
    members: dict[int, list[tuple[int, int]]] = {}
    for k, coordinates in by_level.items():
        counts = [len(parents[i]) for i in coordinates]
        widest = max(counts)
        # one rectangle if half of it is not padding, or it costs less than another rectangle
        as_one = len(counts) * widest <= max(2 * sum(counts), 256)
        for i, count in zip(coordinates, counts):
            members.setdefault(_rounded(widest if as_one else count), []).append((k, i))
    return [_group(width, sorted(own), parents) for width, own in sorted(members.items())]


def _rounded(count: int) -> int:
    """The next number of the sequence 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << (count - 1).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def _group(
    width: int, members: list[tuple[int, int]], parents: Sequence[Sequence[int]]
) -> PaddedGroup:
    """The group of pairs of a level and a coordinate, sorted."""
    padding, slices, rows, start = len(parents), dict[int, slice](), [], 0
    for k, some in groupby(members, lambda member: member[0]):
        count = len(list(some))
        slices[k] = slice(start, start + count)
        start += count
    for _, i in members:
        rows.append([*parents[i], *[padding] * (width - len(parents[i]))])
    index = torch.tensor(rows, dtype=torch.long, device="cpu")
    return PaddedGroup(tuple(i for _, i in members), slices, index, index < padding)
