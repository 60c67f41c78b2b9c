# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What must hold whatever the measured costs are."""

import pytest

from pyro_artransform.transforms.block_inversion import (
    CPU,
    Costs,
    Problem,
    block_size,
    expected_cost,
)

DEVICES = ["cpu", "cuda"]
SHAPES = [
    (depth, batch, p)
    for depth in (1, 2, 3, 8, 100, 512)
    for batch in (1, 64, 4096)
    for p in (2, 23)
]


def problem(depth, batch, num_params=2, width=256):
    """A full graph and two hidden layers."""
    work = width * (depth + width + depth * num_params)
    return Problem(depth, batch, depth, num_params, work)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("depth", "batch", "num_params"), SHAPES)
def test_a_block_has_a_level_and_no_more_than_there_are(depth, batch, num_params, device):
    assert 1 <= block_size(problem(depth, batch, num_params), device) <= depth


@pytest.mark.parametrize(("depth", "batch", "num_params"), SHAPES)
def test_chosen_size_costs_no_more_than_one_block_nor_than_single_levels(depth, batch, num_params):
    p = problem(depth, batch, num_params)
    chosen = expected_cost(p, CPU, block_size(p, "cpu"))
    assert chosen <= expected_cost(p, CPU, depth)
    assert chosen <= expected_cost(p, CPU, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("depth", [2, 8, 32, 100])
def test_one_row_is_one_block(depth, device):
    assert block_size(problem(depth, 1, width=64), device) == depth


@pytest.mark.parametrize("depth", [8, 32, 128, 512])
def test_blocks_shrink_as_rows_are_added(depth):
    sizes = [block_size(problem(depth, 4**k), "cpu") for k in range(12)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize("batch", [1, 64, 1024])
def test_an_accelerator_takes_no_smaller_blocks(batch):
    p = problem(512, batch)
    assert block_size(p, "cuda") == 512 >= block_size(p, "cpu")


@pytest.mark.parametrize("size", [1, 5, 32, 128])
def test_cost_rises_with_all_that_is_to_be_done_and_with_every_price(size):
    p = problem(128, 64)
    base = expected_cost(p, CPU, size)
    assert base > 0
    for field in ("batch", "input_dim", "num_params", "work"):
        assert expected_cost(p._replace(**{field: 2 * getattr(p, field)}), CPU, size) > base
    for field in Costs._fields:
        more_expensive = CPU._replace(**{field: 2 * getattr(CPU, field)})
        assert expected_cost(p, more_expensive, size) > base


def test_smaller_blocks_save_arithmetic_and_cost_calls():
    p = problem(128, 64)
    calls = Costs(block=1.0, row=1.0, call=1.0, multiply=0.0, element=0.0)
    products = Costs(block=0.0, row=0.0, call=0.0, multiply=1.0, element=0.0)
    sizes = [128, 64, 32, 16, 8]
    for costs, sign in ((calls, 1), (products, -1)):
        found = [sign * expected_cost(p, costs, size) for size in sizes]
        assert found == sorted(found)
        assert found[0] < found[-1]
