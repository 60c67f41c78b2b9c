# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks that model, guide, loader and the options of a fit go together."""

import inspect
from collections.abc import Callable, Collection, Iterator
from functools import partial

from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.infer.autoguide.effect import AutoMessenger
from torch import nn

from ...joint import LogJoint
from ...joint.handlers import ModelStructure
from ...joint.protocols import MinibatchGuide, ReparametrizedGuide
from .loader import Batch, BatchStream


def check_names(model: Callable[..., object], options: Collection[str]) -> None:
    """Checks that a model has no parameter of the name of an option.

    :param model: a Pyro model.
    :param options: the names that are taken.
    :raises ValueError: if it has, and it is not bound by :func:`functools.partial`.
    """
    bound = model.keywords if isinstance(model, partial) else {}
    try:
        called = model.forward if isinstance(model, nn.Module) else model
        names = inspect.signature(called).parameters.keys() - bound
    except (TypeError, ValueError):  # not every callable says what it takes
        return
    taken = sorted(names & set(options))
    if taken:
        raise ValueError(
            f"the model has a parameter '{taken[0]}', which is an option of fit: expected another "
            f"name, or bind it first, as in functools.partial(model, {taken[0]}=...)"
        )


def check_arguments(
    loader: object, epochs: int | None, num_steps: int | None, args: tuple[object, ...]
) -> None:
    """Checks that the options of a fit go together.

    :raises ValueError: if they do not.
    """
    if loader is None and epochs is not None:
        raise ValueError("epochs: expected a loader to count them by, or num_steps instead")
    if epochs is not None and num_steps is not None:
        raise ValueError(f"expected epochs or num_steps, got both ({epochs} and {num_steps})")
    if loader is not None and args:
        raise ValueError(
            "expected no positional arguments of the model beside a loader, whose batches are its "
            f"arguments, got {len(args)}. Keyword arguments are added to each batch"
        )


def check_use(
    stream: BatchStream, guide: Callable[..., object], log_joint: LogJoint, first: Batch
) -> None:
    """Checks that the mini-batches of a loader are what model and guide take them for.

    :param stream: the batches of the loader.
    :param guide: the guide, after its first call.
    :param log_joint: the log joint density of the model.
    :param first: any batch.
    :raises ValueError: if they are not.
    """
    if stream.num_batches == 1 and stream.is_partition:
        return
    structure = log_joint.structure(*first)
    _check_indices(guide, structure)
    _check_scale(guide, structure)


def _check_indices(guide: Callable[..., object], structure: ModelStructure) -> None:
    parts = list(_parts(guide))
    needs = any(isinstance(part, MinibatchGuide) and part.needs_indices for part in parts)
    creates_plates = isinstance(guide, AutoGuide) and guide.create_plates is not None
    without = all(map(_is_stock, parts)) and not creates_plates
    if not (needs or (without and structure.subsampled_latents)):
        return
    named = f" (as '{structure.subsampled_latents[0]}')" if structure.subsampled_latents else ""
    raise ValueError(
        f"loader: the guide looks up what it knows of the elements of a plate{named} by their "
        "indices, and draws these itself: they are not those of the rows of a batch. Expected "
        "create_plates=, a function of a batch that returns the plate with the indices of its rows "
        "(subsample=), or an AutoAmortized with an encoder, which needs no indices"
    )


def _check_scale(guide: Callable[..., object], structure: ModelStructure) -> None:
    """Whether latents that are the same for all batches would meet one batch at a time."""
    knows_no_batch = all(_knows_no_batch(part) for part in _parts(guide))
    common = list(structure.shapes) if knows_no_batch else structure.global_latents
    if structure.is_scaled or not common:
        return
    raise ValueError(
        f"loader: the latent '{common[0]}' is of all batches, and the model does not say that a "
        "batch is a part of the data: its likelihood would count as if there were no other rows. "
        "Expected the rows in pyro.plate(name, number of all rows, subsample_size=len(batch)), or "
        "poutine.scale"
    )


def _parts(guide: Callable[..., object]) -> Iterator[object]:
    if isinstance(guide, AutoGuideList):
        yield from guide
    else:
        yield guide


def _knows_no_batch(guide: object) -> bool:
    """Whether the latents of a guide are the same whatever its arguments."""
    return isinstance(guide, ReparametrizedGuide) or _is_stock(guide)


def _is_stock(guide: object) -> bool:
    """Whether a guide is one of Pyro's own that has parameters for each element of a plate."""
    if isinstance(guide, AutoCallable):  # a function of the user's in an AutoGuideList
        return False
    is_pyros = type(guide).__module__.startswith("pyro.infer.autoguide")
    return is_pyros and not (isinstance(guide, AutoMessenger) and guide.amortized_plates)
