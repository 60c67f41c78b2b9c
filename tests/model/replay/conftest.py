# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch


@pytest.fixture(params=["TorchScript", "torch.fx"], autouse=True)
def runner(request, monkeypatch):
    """Programs run by TorchScript, and as in a PyTorch that has no TorchScript."""
    if request.param == "torch.fx":
        for name in ("Graph", "_create_function_from_graph"):
            monkeypatch.delattr(torch._C, name)
    return request.param
