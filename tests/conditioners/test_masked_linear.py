# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from pyro_artransform.conditioners import MaskedLinear

MASK = torch.tensor([[True, False, False], [True, True, False]])


def test_masked_connections_stay_cut_whatever_the_weight():
    layer = MaskedLinear(3, 2, MASK)
    layer.weight.data.fill_(7.0)
    layer.bias.data.zero_()
    assert torch.equal(layer(torch.ones(3)), torch.tensor([7.0, 14.0]))
    layer(torch.ones(3)).sum().backward()
    assert torch.equal(layer.weight.grad, MASK.double())


def test_mask_is_saved_and_follows_the_dtype():
    layer = MaskedLinear(3, 2, MASK)
    assert "mask" in layer.state_dict()
    assert layer.float().mask.dtype == torch.float32


def test_mask_as_a_list():
    layer = MaskedLinear(2, 2, [[1, 0], [1, 1]])
    assert torch.equal(layer.mask, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\).*got \(3, 2\)"):
        MaskedLinear(3, 2, MASK.T)
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\).*got \(2,\)"):
        MaskedLinear(3, 2, [1, 0])
