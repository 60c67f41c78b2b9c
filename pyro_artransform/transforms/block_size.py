# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How many levels of the graph an inverse solves for at once.

Within a block of levels the inverse takes fixed-point passes, of which a few usually do, each over the
square of the block; across blocks each weight is used once. One block is the plain fixed point, blocks of
one level need no passes. What is best depends on what a call and what a number costs: large blocks
where calls dominate (small batches, accelerators), small ones where arithmetic does.
"""

import functools
from typing import NamedTuple

#: Passes that a block of many levels takes until nothing moves, as a rule: 5 to 7 were seen for networks at
#: PyTorch's default scale, in 8 to 512 dimensions.
USUAL_PASSES = 5


class Costs(NamedTuple):
    """What things cost, in nanoseconds.

    :param block: opening and closing a block.
    :param row: the same for each row of the batch: its known numbers are read again.
    :param call: one pass apart from its arithmetic, for each parameter of a coordinate.
    :param multiply: one multiplication and addition of a matrix product.
    :param element: the univariate law of one coordinate, for each of its parameters.
    """

    block: float
    row: float
    call: float
    multiply: float
    element: float


#: Measured with affine laws (2 parameters) and splines of 8 bins (23) on one core of a server, in float32.
CPU = Costs(block=70e3, row=120.0, call=15e3, multiply=0.032, element=4.0)
#: Launching a kernel costs about the same, arithmetic hardly anything.
ACCELERATOR = Costs(block=200e3, row=1.0, call=30e3, multiply=0.0005, element=0.05)


class Problem(NamedTuple):
    """What is to be inverted.

    :param depth: the number of levels.
    :param batch: the number of rows.
    :param input_dim: the number of coordinates.
    :param num_params: the number of parameters of each.
    :param work: the multiplications that one evaluation of one row takes.
    """

    depth: int
    batch: int
    input_dim: int
    num_params: int
    work: int


@functools.lru_cache(maxsize=1024)
def block_size(problem: Problem, device_type: str) -> int:
    """The number of levels in a block that is expected to be the fastest.

    :param problem: what is to be inverted.
    :param device_type: the type of the device.
    """
    costs = CPU if device_type == "cpu" else ACCELERATOR
    depth = problem.depth
    sizes = {-(-depth // min(2**k, depth)) for k in range(depth.bit_length() + 1)}
    return min(sizes, key=lambda size: expected_cost(problem, costs, size))


def expected_cost(problem: Problem, costs: Costs, size: int) -> float:
    """The expected time of an inverse by blocks, in nanoseconds.

    :param problem: what is to be inverted.
    :param costs: what things cost.
    :param size: the number of levels in a block.
    """
    blocks = -(-problem.depth // size)
    passes = min(size, USUAL_PASSES)
    calls = costs.block + problem.batch * costs.row + passes * costs.call * problem.num_params
    products = problem.work * ((1 - 1 / blocks) / 2 + passes / blocks)
    elements = problem.input_dim * problem.num_params * passes
    return blocks * calls + problem.batch * (costs.multiply * products + costs.element * elements)
