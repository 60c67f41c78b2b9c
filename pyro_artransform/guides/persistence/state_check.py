# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of a state dict, before a guide is built for it or takes it over."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

State = Mapping[str, Tensor]


class LeastState(NamedTuple):
    """What the state dict of a guide has at least, as its sites and arguments say.

    :param vectors: the lengths of vectors in it.
    :param numbers: the number of numbers in all tensors.
    :param tensors: the number of tensors.
    """

    vectors: Sequence[int]
    numbers: int
    tensors: int = 1


def check_sizes(state: State, least: LeastState) -> None:
    """Refuses a state dict that a guide cannot have, before memory and time go into building that."""
    lengths = {len(value) for value in state.values() if value.dim() == 1}
    stored: dict[int, int] = {}
    is_expanded = False
    for value in state.values():
        # by storage: an expanded tensor declares more numbers than there are
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes() // value.element_size()
        is_expanded = is_expanded or value.numel() > stored[storage.data_ptr()]
    numbers = sum(stored.values())
    is_short = numbers < least.numbers or len(state) < least.tensors
    if is_expanded or is_short or not lengths.issuperset(least.vectors):
        raise RuntimeError(
            "the state does not fit the sites and arguments of its guide: expected vectors of "
            f"{list(least.vectors)} numbers, and at least {least.numbers} numbers in {least.tensors} "
            f"tensors, got {numbers} in {len(state)}"
        )


def check_finite(state: State) -> None:
    """Refuses a state dict with NaN or infinite entries."""
    for name, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise ValueError(
                f"parameter '{name}': expected finite numbers, got {bad} of {value.numel()} "
                "that are not"
            )
