# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A guide from a file meets its model: whether they have the same latents."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from .records import (
    Site,
    change_tensors,
    describe_support,
    is_hidden,
    latent_sites,
    refuse_subsampling,
    same_support,
)


def refuse_other_model(
    prototype: poutine.Trace, observed: Collection[str] | None, rerun: Callable[[], Any]
) -> None:
    """Refuses a model whose latents are not those of the guide.

    :param prototype: the guide's prototype trace.
    :param observed: the sites that had data when the guide was set up; without data they are
        predicted, and are no concern of the guide. None if it is not known which.
    :param rerun: runs the model.
    :raises ValueError: if a site is missing, or one too many, or its shape or support is another;
        or if it is in a plate that is sub-sampled.
    """
    with torch.random.fork_rng(devices=[]), poutine.block(), torch.no_grad():
        trace = poutine.trace(poutine.block(rerun, is_hidden)).get_trace()
    expected, got = latent_sites(prototype), latent_sites(trace)
    for name in set(got) - set(expected):
        if observed is None or name in observed:
            trace.remove_node(name)
            del got[name]
    _compare_names(expected, got)
    refuse_subsampling(trace)
    for name, site in expected.items():
        _compare(name, site, got[name])


def _compare_names(expected: dict[str, Site], got: dict[str, Site]) -> None:
    for name in sorted(expected.keys() ^ got.keys()):
        where = "the model has no such latent" if name in expected else "the guide has no such site"
        raise ValueError(
            f"site '{name}': {where}: expected the sites of the guide, {sorted(expected)}, got "
            f"{sorted(got)}. The guide is of another model"
        )


def _compare(name: str, site: Site, other: Site) -> None:
    shapes = tuple(site["fn"].shape()), tuple(other["fn"].shape())
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"site '{name}': the guide was set up for the shape {shapes[0]}, and in this model, "
            f"for these arguments, it is {shapes[1]}: expected {shapes[0]}, got {shapes[1]}"
        )
    supports = _comparable(site["fn"].support), _comparable(other["fn"].support)
    if not same_support(*supports):
        raise ValueError(
            f"site '{name}': expected the support {describe_support(supports[0])}, for which the "
            f"guide was set up, got {describe_support(supports[1])}. The guide is of another model"
        )


def _comparable(support: constraints.Constraint) -> constraints.Constraint:
    """A support whose bounds are where, and as exact as, another one's can be compared."""

    def change(bound: Tensor) -> Tensor:
        return bound.detach().to(device="cpu", dtype=torch.float32)

    return change_tensors(support, change)
