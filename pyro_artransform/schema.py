# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Schemas of PyTorch operations."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple


class Schema(NamedTuple):
    """Argument and return types of an operation."""

    name: str
    names: list[str]
    defaults: list[Any]
    types: list[Any]
    returns: list[Any]
    written: list[int]  #: indices of arguments that it mutates

    @staticmethod
    @cache
    def of(func: Any) -> "Schema":
        schema, arguments = func._schema, func._schema.arguments
        return Schema(
            schema.name,
            [each.name for each in arguments],
            [each.default_value if each.has_default_value() else None for each in arguments],
            [each.type for each in arguments],
            [each.type for each in schema.returns],
            [i for i, each in enumerate(arguments) if each.alias_info and each.alias_info.is_write],
        )

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """All arguments of a call, in schema order, with defaults."""
        rest = zip(self.names[len(args) :], self.defaults[len(args) :])
        return [*args, *(kwargs.get(name, default) for name, default in rest)]
