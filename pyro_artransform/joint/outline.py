# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a run of a model says of its sites, for arguments that change from one mini-batch to the next."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from .plates import is_part
from .sites import is_enumerated

# arguments of other shapes come and go by batches: so many are remembered
_MOST_SIGNATURES = 64


class Outline(NamedTuple):
    """A run of a model without its values.

    :param shapes: the shape of each continuous latent.
    :param globals: the names of those that are in no plate.
    :param in_part: the names of those in a plate that holds a part of its elements only.
    :param scale: the largest number that the log-density of data is multiplied by, beside that of
        the latents in no plate: in a plate of 100 elements, of which 20 are there, it is 5.
    """

    shapes: dict[str, torch.Size]
    globals: list[str]
    in_part: list[str]
    scale: float

    @property
    def is_scaled(self) -> bool:
        """Whether the data are scaled, up or down."""
        return not math.isclose(self.scale, 1.0, rel_tol=1e-9)


def outline_of(trace: poutine.Trace) -> Outline:
    """The outline of a run.

    :param trace: its trace.
    """
    sites: list[Any] = [node for node in trace.nodes.values() if _is_site(node)]
    latents = [node for node in sites if not node["is_observed"] and not is_enumerated(node)]
    globals_ = [node for node in latents if not node["cond_indep_stack"]]
    data = [node for node in sites if node["is_observed"]] or sites
    common = max((_largest(node["scale"]) for node in globals_), default=1.0)
    scale = max((_largest(node["scale"]) for node in data), default=1.0) / common
    return Outline(
        shapes={node["name"]: node["value"].shape for node in latents},
        globals=[node["name"] for node in globals_],
        in_part=[node["name"] for node in latents if any(map(is_part, node["cond_indep_stack"]))],
        scale=scale,
    )


class Outlines:
    """Outlines by the shapes of the arguments."""

    def __init__(self) -> None:
        self._known: dict[Any, Outline] = {}

    def keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outline: Outline) -> None:
        """Remembers the outline of a run with these arguments."""
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
        self._known[_signature((args, kwargs))] = outline

    def find(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        trace: Callable[[], poutine.Trace],
    ) -> Outline:
        """The outline of a run with these arguments, which takes place if there was none like it."""
        key = _signature((args, kwargs))
        if key not in self._known:
            # whether there was a run before must not show in the draws that follow
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                self.keep(args, kwargs, outline_of(trace()))
        return self._known[key]


def _is_site(node: Any) -> bool:
    return node["type"] == "sample" and not site_is_subsample(node)


def _largest(scale: Any) -> float:
    return float(scale.max()) if isinstance(scale, torch.Tensor) else float(scale)


def _signature(value: Any) -> Any:
    """All of the arguments that the sites and shapes of a run may depend on, as far as can be seen."""
    if hasattr(value, "shape"):
        return tuple(value.shape), getattr(value, "dtype", None)
    if isinstance(value, Mapping):
        return tuple((name, _signature(value[name])) for name in sorted(value, key=str))
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return value if isinstance(value, (int, float, str, type(None))) else type(value)
