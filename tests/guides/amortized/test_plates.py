# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_artransform.guides.amortized.plates import new_plate, signature_of


def indices(size, full_size):
    frame = CondIndepStackFrame("items", -1, size, 0, full_size)
    plate = new_plate("items", frame, torch.device("cpu"))
    assert (plate.size, plate.subsample_size, plate.dim) == (full_size, size, -1)
    return plate.indices


def test_indices_are_distinct_and_equally_likely():
    for size, full_size in ((3, 48), (20, 48), (1, 16)):
        drawn = torch.stack([indices(size, full_size) for _ in range(2_000)])
        assert all(len(row.unique()) == size for row in drawn[:50])
        for place in (0, size - 1):
            share = drawn[:, place].bincount(minlength=full_size) / 2_000
            # six standard errors of a share
            assert (share - 1 / full_size).abs().max() < 6 * (1 / full_size / 2_000) ** 0.5
    assert torch.equal(indices(5, 5), torch.arange(5))


def test_signatures():
    """Shapes, integers and names count; values of tensors and of floats do not."""
    x = torch.zeros(3, 2)
    same = [(x, 3, "a", 1.0), (x + 1, 3, "a", 2.0)]
    assert signature_of(same[0]) == signature_of(same[1])
    assert hash(signature_of({"x": [x, None]})) == hash(signature_of({"x": [x + 1, None]}))
    for other in ((x[:2], 3, "a", 1.0), (x, 4, "a", 1.0), (x, 3, "b", 1.0), (x, 3, "a")):
        assert signature_of(other) != signature_of(same[0])
    assert signature_of(list(range(1000))) != signature_of(list(range(999)))
