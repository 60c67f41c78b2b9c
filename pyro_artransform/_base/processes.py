# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a computation over all data needs of the processes that hold the data."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class OneProcess:
    """A process that holds all data; ``inference.parallel`` has the same methods for several."""

    size = 1  #: the number of processes

    def gather_objects(self, what: str, own: T) -> list[T]:
        """The objects of all processes, by rank; ``what`` they are is logged if others are late."""
        return [own]

    def hold(self, share: object) -> None:
        """Registers this process's share of an object, for :meth:`sum`."""

    def sum(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """The sum of a function over all processes, each with its own shares among the arguments."""
        return function(*args)
