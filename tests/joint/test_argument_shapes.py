# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_artransform.joint.argument_shapes import argument_shapes


def test_shapes_of_arguments():
    arguments = (torch.zeros(2, 3), [1, {"x": torch.zeros(4)}], None, list(range(1000)), 0.5)
    assert argument_shapes(arguments) == (
        5,
        ("shape", 2, 3),
        (2, 1, (("x", ("shape", 4)),)),
        None,
        (1000, 0),
        "float",
    )
