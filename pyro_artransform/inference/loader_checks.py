# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Checks that the mini-batches of a loader are what model and guide take them for."""

from collections.abc import Callable, Iterable, Sequence

from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.infer.autoguide.effect import AutoMessenger

from ..arguments import first_of
from ..joint import LogJoint
from ..joint.protocols import MinibatchGuide, ReparametrizedGuide
from .loader import Batch, BatchStream


def check_use(
    stream: BatchStream, guide: Callable[..., object], log_joint: LogJoint, first: Batch
) -> None:
    """Checks that a guide knows which elements a batch has, and a model how many rows there are.

    :param guide: the guide, after its first call.
    """
    if stream.whole.is_all_data:
        return
    structure = log_joint.structure(*first)
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    if _looks_up_indices(guide, parts, structure.subsampled_latents):
        of = f" (as '{structure.subsampled_latents[0]}')" if structure.subsampled_latents else ""
        raise ValueError(
            f"loader: the guide {type(guide).__name__} looks up what it knows of the elements of a "
            f"plate{of} by their indices, and draws these itself: they are not those of the rows of a "
            "batch. Expected guide=AutoAmortized(model, encoder), whose encoder reads the batch, or "
            "create_plates=, a function of a batch that returns the plate with the indices of its rows "
            "(subsample=)"
        )
    common = structure.global_latents
    if all(isinstance(part, ReparametrizedGuide) or _is_stock(part) for part in parts):
        common = list(structure.shapes)  # the latents are the same for all arguments of the guide
    if common and not structure.is_scaled:
        raise ValueError(
            f"loader: the latent '{common[0]}' is of all batches, and the model does not say that a "
            "batch is a part of the data: its likelihood would count as if there were no other "
            "rows. Expected the rows in pyro.plate(name, number of all rows, "
            "subsample_size=len(batch)), or poutine.scale"
        )


def refuse_missing(dependencies: Sequence[str]) -> None:
    """Refuses a guide whose graph lacks dependencies that other mini-batches have.

    :param dependencies: these, in words.
    """
    if not dependencies:
        return
    raise ValueError(
        "loader: the guide's graph lacks dependencies of the posterior that mini-batches have: "
        f"{first_of(dependencies)}. The first batch alone does not have them all: "
        "make the guide anew and set it up with all data before the fit, guide.set_up(*all_data), or use "
        "AutoIAF, or AutoAmortized for latents of the rows themselves"
    )


def _looks_up_indices(guide: object, parts: Iterable[object], subsampled: list[str]) -> bool:
    """Whether a guide draws the indices itself of the elements that it has parameters for."""
    for part in parts:
        if isinstance(part, MinibatchGuide) and part.needs_indices:
            return True
    creates_plates = isinstance(guide, AutoGuide) and guide.create_plates is not None
    return bool(subsampled) and not creates_plates and all(map(_is_stock, parts))


def _is_stock(guide: object) -> bool:
    """Whether a guide is one of Pyro's own that has parameters for each element of a plate."""
    if isinstance(guide, AutoCallable):  # a function of the user's in an AutoGuideList
        return False
    is_pyros = type(guide).__module__.startswith("pyro.infer.autoguide")
    return is_pyros and not (isinstance(guide, AutoMessenger) and guide.amortized_plates)
