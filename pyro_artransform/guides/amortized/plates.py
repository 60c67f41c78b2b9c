# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The plates of a model: how many elements each has for given arguments, and which are drawn."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from ...joint.sites import Site
from ..persistence.spec import GuideSpec
from ..prototype import compare_names, latents_of
from .layout import Group, PlateSizes, plate_sizes

# the model's arguments
Args = Sequence[object]
Kwargs = Mapping[str, object]

Plates = dict[str, pyro.plate]
CreatePlates = Callable[..., pyro.plate | Iterable[pyro.plate]]


class GivenIndices(Messenger):
    """Collects the names of the plates whose indices the model gives itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, message: Any) -> None:
        if site_is_subsample(message) and message["value"] is not None and not message["done"]:
            self.names.add(message["name"])

    def refuse(self, sizes: PlateSizes, of_user: Callable[[], Plates]) -> None:
        """Refuses such a plate, unless the user's ``create_plates`` makes it too."""
        names = self.names & sizes.keys()
        with poutine.block():
            unknown = names - of_user().keys() if names else names
        for name in sorted(unknown):
            dim, size, full_size = sizes[name]
            raise ValueError(
                f"the model gives the indices of plate '{name}' itself, by subsample= ({size} of "
                f"{full_size}), and the guide would draw others: expected create_plates=lambda ...: "
                f"pyro.plate('{name}', {full_size}, subsample=..., dim={dim}), a function of the "
                "model's arguments that returns the plate with these indices"
            )


def refuse_no_local_latents(sites: Collection[Site], guide_name: str) -> None:
    """Refuses a model without latents in plates, and plates without a size."""
    for site in sites:
        for frame in site.plates:
            if frame.full_size is None or frame.full_size < 1:
                raise ValueError(
                    f"site '{site.name}' is in plate '{frame.name}', which has no size: expected "
                    "pyro.plate(name, size)"
                )
    if not any(site.plates for site in sites):
        raise ValueError(
            f"{guide_name}: expected a model with latents in a plate, got one with no latents in a "
            f"plate, only {sorted(site.name for site in sites)}. AutoIAF is the guide of such a model"
        )


def sizes_of_run(spec: GuideSpec, run: Callable[[], object], model_is_checked: bool) -> PlateSizes:
    """The sizes of the plates around the guide's sites in one more run of the model.

    :param model_is_checked: whether it is known that the guide's sites are those of the model.
    """
    known, now = spec.latents.sites, latents_of(run)
    if not model_is_checked:
        # what had data at the set-up may be predicted now
        compare_names(known, now.keys() - set(spec.observed or ()))
    sites = [now[name] for name in known if name in now]
    for site in sites:
        _compare_elements(known[site.name], site)
    return plate_sizes(sites)


def _compare_elements(expected: Site, got: Site) -> None:
    """Refuses a site in other plates than at the set-up, or an element of another shape."""
    both = expected, got
    plates = [sorted(plate_sizes([site])) for site in both]
    shapes = [tuple(site.shape) for site in both]
    if not any(plates) and shapes[0] != shapes[1]:
        raise ValueError(
            f"site '{got.name}' is in no plate, and its shape changes with the data: expected "
            f"{shapes[0]}, as at the guide's set-up, got {shapes[1]}. Draw it in a pyro.plate over "
            "the data: then it is local to the elements of that plate"
        )
    events = [tuple(site.shape[len(site.batch_shape) :]) for site in both]
    of_element = "each element of its plates to have the shape"
    pairs: dict[str, Sequence[object]] = {"it in the plates": plates, of_element: events}
    for wanted, (before, now) in pairs.items():
        if before != now:
            raise ValueError(
                f"site '{got.name}': expected {wanted} {before}, as at the guide's set-up, got {now}"
            )


def check_sizes(
    group: Group, expected: Mapping[str, int], got: Mapping[str, int], reason: str
) -> None:
    """Refuses plates of a group with other sizes than expected; the reason says what to do."""
    for name in group.dims:
        if name in expected and expected[name] != got[name]:
            raise ValueError(
                f"plate '{name}' around the sites {sorted(group.latents.sites)} has another size: "
                f"expected {expected[name]} elements, got {got[name]}. {reason}"
            )


def plates_were_dropped(*args: object, **kwargs: object) -> Plates:
    """Stands for ``create_plates`` in a guide that was pickled."""
    raise RuntimeError(
        "this AutoAmortized has no create_plates: pickle drops it. guide.create_plates = "
        "create_plates puts it into the guide"
    )


def plates_of_user(guide: AutoGuide, args: Args, kwargs: Kwargs) -> Plates:
    """The plates that ``create_plates`` of a guide, or of its list, returns, by name, if any."""
    maker = guide if guide.master is None else guide.master()
    made = [] if maker.create_plates is None else maker.create_plates(*args, **kwargs)
    plates = [made] if isinstance(made, pyro.plate) else list(made)
    for plate in plates:
        if not isinstance(plate, pyro.plate):
            kind = type(plate).__name__
            raise TypeError(
                f"create_plates: expected it to return a pyro.plate or several, got {kind}"
            )
    return {plate.name: plate for plate in plates}


def have_other_sizes(plates: Plates, sizes: PlateSizes) -> bool:
    """Whether some plates do not have the sizes that they should have."""
    return any(
        (plate.subsample_size, plate.size) != (sizes[name].size, sizes[name].full_size)
        for name, plate in plates.items()
        if name in sizes
    )


def complete_plates(of_user: Plates, sizes: PlateSizes, device: torch.device) -> Plates:
    """The user's plates, each with its dimension, and new ones of all or some random elements.

    :param sizes: the sizes of the model's plates.
    :param device: the device of the indices of new plates.
    """
    plates = dict(of_user)
    for name, (dim, size, full_size) in sorted(sizes.items()):
        if name not in plates:
            plates[name] = pyro.plate(name, full_size, size, dim=dim, device=str(device))
        plate = plates[name]
        plate.dim = dim if plate.dim is None else plate.dim
        got, expected = (plate.size, plate.subsample_size, plate.dim), (full_size, size, dim)
        if got != expected:
            raise ValueError(
                f"create_plates: expected plate '{name}' of (size, sub-sample size, dim) {expected}, "
                f"as the model has it for these arguments, got {got}"
            )
    return plates
