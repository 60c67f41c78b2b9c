# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What the shapes of a model's latents may depend on in its arguments."""

from collections.abc import Hashable
from typing import Any

# of a longer sequence only the length and the first element count
_FEW = 16


def argument_shapes(arguments: Any) -> Hashable:
    """The shapes, integers and names in a model's arguments, nested as they are.

    :param arguments: tensors, arrays and other things, in tuples, lists and dicts.
    :return: a key: equal for arguments that have the same shapes.
    """
    if isinstance(arguments, dict):
        return tuple((key, argument_shapes(value)) for key, value in arguments.items())
    if isinstance(arguments, (list, tuple)):
        few = arguments if len(arguments) <= _FEW else arguments[:1]
        return (len(arguments), *map(argument_shapes, few))
    if isinstance(arguments, (bool, int, str, type(None))):
        return arguments
    shape = getattr(arguments, "shape", None)
    return type(arguments).__name__ if shape is None else ("shape", *shape)
