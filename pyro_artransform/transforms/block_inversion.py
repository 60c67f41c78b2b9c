# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Exact inverses by blocks of levels of the dependency graph, for the price of about one evaluation.

Large blocks are best where calls dominate (small batches, accelerators), small ones where arithmetic does.
"""

import functools

import torch
from torch import Tensor

from ..conditioners import Blocks
from ..univariate import Univariate
from .flow_module import call_and_ladj

_MAX_PASSES = 16  # within a block; more say that smaller blocks are cheaper


@functools.lru_cache(maxsize=1024)
def block_size(depth: int, batch: int, input_dim: int, num_params: int, work: int) -> int:
    """The number of levels in a block that is expected to be the fastest on a CPU.

    :param work: the number of multiplications in an evaluation of one row.
    """

    def cost(size: int) -> float:
        # in nanoseconds on one core
        blocks = -(-depth // size)
        passes = min(
            size, 5
        )  # 5 to 7 for networks at PyTorch's default scale, in 8 to 512 dimensions
        # opening and closing a block, and reading its rows again; calls; products and elements
        calls = 70e3 + batch * 120.0 + passes * 15e3 * num_params
        products = work * ((1 - 1 / blocks) / 2 + passes / blocks)
        elements = input_dim * num_params * passes
        return blocks * calls + batch * (0.032 * products + 4.0 * elements)

    return min({-(-depth // min(2**k, depth)) for k in range(depth.bit_length() + 1)}, key=cost)


def by_blocks(
    family: Univariate, blocks: Blocks, y: Tensor, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The inverse by blocks of levels, by default of the best size.

    With a size of 1 no value is read, and autograd can differentiate.
    """
    large = largest(y)
    clean = y.nan_to_num(0.0, large, -large)
    rows, levels = clean.reshape(-1, y.shape[-1]), blocks.levels
    rows = rows if blocks.order is None else rows[:, blocks.order]
    depth = len(levels) - 1
    if blocks.work is None:
        size = 1
    elif size is None and y.device.type == "cpu":
        size = block_size(depth, len(rows), y.shape[-1], family.num_params, blocks.work)
    elif size is None:
        size = depth  # a call costs far more than arithmetic
    start, done = 0, []
    while start < depth:
        stop = min(start + size, depth)
        blocks.open(start, stop)
        block = rows[:, levels[start] : levels[stop]]
        x, ladj, exact = _settle(family, blocks, block, stop - start)
        if exact < stop - start:
            # the passes converge slowly here: exact levels are kept, and smaller blocks follow
            stop, size = start + exact, max(size // 4, 1)
            count = levels[stop] - levels[start]
            x, ladj = x[:, :count], ladj[:, :count]
        done.append((x, ladj))
        if stop < depth:
            blocks.close(x, stop)
        start = stop
    x, ladj = done[0] if len(done) == 1 else (torch.cat(parts, -1) for parts in zip(*done))
    undefined = y.reshape(x.shape)
    undefined = (undefined if blocks.order is None else undefined[:, blocks.order]).isnan()
    # what may depend on NaN was found with a number in its place
    after = undefined.cumsum(-1) > undefined
    x, ladj = x.masked_fill(after, torch.nan), ladj.masked_fill(after, torch.nan)
    x = x if blocks.order is None else x[:, blocks.order.argsort()]
    return x.reshape(y.shape) + (y - clean), ladj.sum(-1).reshape(y.shape[:-1])


def _settle(
    family: Univariate, blocks: Blocks, y: Tensor, depth: int
) -> tuple[Tensor, Tensor, int]:
    """x and log-determinants by coordinate in the open block, and the number of its levels that are exact."""
    if depth == 1:
        return *call_and_ladj(family.forward(blocks.params(None)).inv, y), 1
    large = largest(y)
    x = y  # a better guess than zeros: a trained layer is not far from the identity
    for k in range(1, min(depth, _MAX_PASSES) + 1):
        new, ladj = call_and_ladj(family.forward(blocks.params(x)).inv, y)
        # early passes may overflow, and infinity times a masked zero would spoil what is exact
        new = new.clamp(-large, large)
        # it takes more than three passes to see that nothing moves
        if 3 < k < depth and _settled(new, x):
            return new, ladj, depth
        x = new
    return x, ladj, k


def largest(y: Tensor) -> float:
    """A bound beyond all sensible numbers, with which sums of products stay finite."""
    return torch.finfo(y.dtype).max ** 0.75


def _settled(new: Tensor, old: Tensor) -> bool:
    """Whether finite numbers changed by no more than round-off."""
    if new.numel() == 0:
        return True
    unit = 2 * torch.finfo(new.dtype).eps
    excess = (new - old).abs_().sub_(new.abs(), alpha=unit)
    return excess.amax().item() <= unit
