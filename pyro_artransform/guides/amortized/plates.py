# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How many elements each plate has for given arguments of a model."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .layout import Frame, Group, frames_of, plates_of
from .legacy.sites.records import Site, is_hidden, latent_sites

# of a longer sequence the length and the first element have to do
_FEW = 16

# from how many times as many elements on a mini-batch is drawn without a look at all of them
_FEW_OF_MANY = 16

_PLAIN = (bool, int, str, type(None))


def signature_of(arguments: Any) -> Any:
    """What the sizes of plates may hang on in a model's arguments: shapes, integers and names.

    :param arguments: tensors, arrays and whatever else, in tuples, lists and dicts.
    :return: something to be used as a key.
    """
    if isinstance(arguments, dict):
        return tuple((key, signature_of(value)) for key, value in arguments.items())
    if isinstance(arguments, (list, tuple)):
        few = arguments if len(arguments) <= _FEW else arguments[:1]
        return (len(arguments), *map(signature_of, few))
    if isinstance(arguments, _PLAIN):
        return arguments
    shape = getattr(arguments, "shape", None)
    return type(arguments).__name__ if shape is None else ("shape", *shape)


class GivenIndices(Messenger):
    """Collects the names of the plates whose indices the model gives itself."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, message: Site) -> None:
        if site_is_subsample(message) and message["value"] is not None and not message["done"]:
            self.names.add(message["name"])


def run_frames(
    prototype: poutine.Trace,
    frames: Mapping[str, Frame],
    rerun: Callable[[], Any],
    observed: Collection[str] | None,
) -> tuple[dict[str, Frame], set[str]]:
    """Runs the model for the frames of its plates, and refuses latents of other shapes than before.

    :param prototype: the guide's prototype trace, of one element of each plate.
    :param frames: the frames that are known already.
    :param rerun: runs the model.
    :param observed: None for the model that the guide was set up for; for another one, which has to
        have the same latents, the sites that had data then, which may be predicted now.
    :return: the frames now, and the names of the plates whose indices the model gives itself.
    :raises ValueError: if a latent in no plate has another shape than before, an element of a latent
        in a plate has, or a latent is in other plates.
    """
    given = GivenIndices()
    with torch.random.fork_rng(devices=[]), poutine.block(), torch.no_grad():
        trace = poutine.trace(poutine.block(given(rerun), is_hidden)).get_trace()
    sites, known = latent_sites(trace), latent_sites(prototype)
    if observed is not None:
        _compare_names(set(known), set(sites) - set(observed))
    for name, site in known.items():
        if name in sites:
            _compare(name, site, sites[name])
    return {**frames, **frames_of(trace, known)}, given.names


def _compare_names(expected: set[str], got: set[str]) -> None:
    for name in sorted(expected ^ got):
        where = "the model has no such latent" if name in expected else "the guide has no such site"
        raise ValueError(
            f"site '{name}': {where}: expected the sites of the guide, {sorted(expected)}, got "
            f"{sorted(got)}. The guide is of another model"
        )


def _compare(name: str, site: Site, now: Site) -> None:
    plates = plates_of(site), plates_of(now)
    if plates[0] != plates[1]:
        raise ValueError(
            f"site '{name}': expected it in the plates {sorted(plates[0])}, as at the guide's "
            f"set-up, got {sorted(plates[1])}"
        )
    shapes = [tuple(s["value"].shape) for s in (site, now)]
    if not plates[0] and shapes[0] != shapes[1]:
        raise ValueError(
            f"site '{name}' is in no plate, and its shape changes with the data: expected "
            f"{shapes[0]}, as at the guide's set-up, got {shapes[1]}. Draw it in a pyro.plate over "
            "the data: then it is local to the elements of that plate"
        )
    events = [tuple(s["fn"].event_shape) for s in (site, now)]
    if events[0] != events[1]:
        raise ValueError(
            f"site '{name}': expected each element of its plates to have the shape {events[0]}, as "
            f"at the guide's set-up, got {events[1]}"
        )


def refuse_given_indices(
    given: set[str], frames: Mapping[str, Frame], known: Collection[str]
) -> None:
    """Refuses a model that says itself which elements its plates have.

    :param given: the names of such plates.
    :param frames: the frames of the plates that the guide makes.
    :param known: the names of the plates whose indices the guide is told.
    :raises ValueError: if it does, and the guide is not told.
    """
    for name in sorted(given & frames.keys()):
        if name not in known:
            frame = frames[name]
            raise ValueError(
                f"the model gives the indices of plate '{name}' itself, by subsample= ({frame.size} "
                f"of {frame.full_size}), and those of the guide would take their place: expected "
                "create_plates, a function of the model's arguments that returns the plate with "
                f"these indices, as AutoAmortized(..., create_plates=lambda ...: pyro.plate('{name}', "
                f"{frame.full_size}, subsample=..., dim={frame.dim}))"
            )


def new_plate(name: str, frame: Frame, device: torch.device) -> pyro.plate:
    """A plate of all elements, or of a random part of them.

    A small part of many elements is drawn at a cost that grows with the part only.

    :param name: its name.
    :param frame: its frame.
    :param device: where its indices are.
    """
    size: Any = {"subsample_size": frame.size}
    few = frame.size * _FEW_OF_MANY <= frame.full_size
    if few and device.type == "cpu" and not torch._C._get_tracing_state():
        size = {"subsample": _few_of_many(frame.full_size, frame.size)}
    return pyro.plate(name, frame.full_size, **size, dim=frame.dim, device=str(device))


def _few_of_many(full_size: int, size: int) -> Tensor:
    """So many different integers, each as likely as any, in a random order."""
    distinct = torch.empty(0, dtype=torch.long, device="cpu")
    while len(distinct) < size:
        distinct = torch.randint(full_size, (2 * size,), device="cpu").unique()
    return distinct[torch.randperm(len(distinct), device="cpu")[:size]]


def check_plates(plates: Mapping[str, pyro.plate], frames: Mapping[str, Frame]) -> None:
    """Refuses plates of a user that are not the model's, and gives each its dimension.

    :param plates: the plates of ``create_plates`` by name.
    :param frames: the frames of the model's plates.
    :raises ValueError: if one of them has another size or dimension.
    """
    for name in plates.keys() & frames.keys():
        plate, frame = plates[name], frames[name]
        plate.dim = frame.dim if plate.dim is None else plate.dim
        got = plate.size, plate.subsample_size, plate.dim
        expected = frame.full_size, frame.size, frame.dim
        if got != expected:
            raise ValueError(
                f"create_plates: expected plate '{name}' of (size, sub-sample size, dim) {expected}, "
                f"as the model has it for these arguments, got {got}"
            )


def check_table(group: Group, table: Tensor, full_sizes: Mapping[str, int]) -> None:
    """Refuses plates of another size than a table of embeddings has rows.

    :raises ValueError: if there is one.
    """
    for name, dim in group.dims.items():
        expected, got = table.shape[dim - 1], full_sizes[name]
        if expected != got:
            raise ValueError(
                f"plate '{name}' around the sites {sorted(group.sites)} has another size than at the "
                f"guide's set-up: expected {expected} elements, for which there are embeddings, got "
                f"{got}. Make a new guide, or give it an encoder, which has features of any element"
            )


def check_same(group: Group, sizes: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Refuses other numbers of elements for one group of latents than for another.

    :raises ValueError: if they differ.
    """
    for name in sizes.keys() & now.keys():
        if sizes[name] != now[name]:
            raise ValueError(
                f"the elements of plate '{name}' have to be the same for all latents: expected "
                f"{sizes[name]}, got {now[name]} for the sites {sorted(group.sites)}. Embeddings are "
                "of all elements, and the features of a mini-batch are not"
            )
