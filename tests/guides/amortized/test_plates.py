# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_artransform.guides.amortized.plates import PlateSize, complete_plates


def indices(size, full_size):
    sizes = {"items": PlateSize(-1, size, full_size)}
    plate = complete_plates({}, sizes, torch.device("cpu"))["items"]
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
