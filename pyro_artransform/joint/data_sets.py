# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""A model of one data set as one of many, each with latents of its own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .traces import is_deterministic, plate_nesting
from .vectorization import DrawPlate, Terms, describe

DATA_SETS = "data_sets"  #: the name of their plate
_NUM_COMPARED = 3
_TOLERANCE = 1e-3  # of a log density, relative and in nats


def over_data_sets(
    model: Callable[..., object], data: Mapping[str, Tensor]
) -> Callable[..., object]:
    """The model of many data sets at once: a plate of them, with latents of its own for each.

    The plate is to the left of the model's own plates, so that the model is run once for all data sets. It
    has to be written for that, as for the draws of many guides: reductions over dimensions counted from the
    right, no branches on values, no index to the left of the last plate (``docs/vectorization.md``). The
    first call compares a few data sets with single runs.

    :param model: a Pyro model of one data set.
    :param data: the data by site, each of shape ``(S,) + site shape``; what the arguments of the model have
        for these sites is replaced.
    :return: a model with the arguments of this one. Its latents have the shape ``(S, ...)``, with
        dimensions of size 1 for plates that they are not in.
    :raises ValueError: if sites have different numbers of data sets or there are none; at a call, if the
        model has no such sites, or gives another density for many data sets than for each alone.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_artransform.inference import over_data_sets
        >>> def model(sigma):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("rows", 4):
        ...         pyro.sample("y", dist.Normal(mu, sigma))
        >>> many = over_data_sets(model, {"y": torch.randn(20, 4)})
        >>> pyro.poutine.trace(many).get_trace(2.0).nodes["mu"]["value"].shape
        torch.Size([20, 1])
    """
    sizes = {name: len(value) for name, value in data.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(
            f"data: expected as many data sets of each site, at least one, got {sizes}"
        )
    return _DataSets(model, dict(data))


class _DataSets:
    """See :func:`over_data_sets`."""

    def __init__(self, model: Callable[..., object], data: dict[str, Tensor]) -> None:
        self._model, self._data = model, data
        self._size = len(next(iter(data.values())))
        self._num_plates: int | None = None
        self._placed: Terms = {}

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        run = partial(self._model, *args, **kwargs)
        if self._num_plates is None:
            self._set_up(run)
        return self._run(run)

    def _run(self, run: Callable[[], object]) -> object:
        with pyro.plate(DATA_SETS, self._size, dim=-1 - (self._num_plates or 0)):
            return poutine.condition(run, self._placed)()

    @torch.no_grad()
    def _set_up(self, run: Callable[[], object]) -> None:
        """Places the data to the left of the model's plates, and compares densities."""
        with torch.random.fork_rng(devices=[]), poutine.block():
            single: Any = poutine.trace(run).get_trace()
            sites = {name: node for name, node in single.nodes.items() if node["type"] == "sample"}
            if unknown := sorted(self._data.keys() - sites.keys()):
                raise ValueError(f"data: expected sites of {sorted(sites)}, got {unknown}")
            self._num_plates = plate_nesting(single)
            event_dims = {name: sites[name]["fn"].event_dim for name in self._data}
            self._placed = DrawPlate(self._size, self._num_plates).place(self._data, event_dims)
            try:
                fault = self._fault(run, sites)
            except Exception as error:  # any means that the model does not take many data sets
                fault = describe(error)
        if fault:
            self._num_plates = None
            raise ValueError(
                f"model: expected one that takes data sets in a plate to the left of its own, got {fault}. "
                "Write it with dimensions counted from the right, or with the plate of data sets in it"
            )

    def _fault(self, run: Callable[[], object], sites: Mapping[str, Any]) -> str:
        """The sites of a few data sets whose densities are others than alone, in words."""
        together: Any = poutine.trace(partial(self._run, run)).get_trace()
        together.compute_log_prob()
        dim, fault = -1 - (self._num_plates or 0), ""
        for k in range(0, self._size, max(self._size // _NUM_COMPARED, 1)):
            given = {}
            for name, site in sites.items():
                if is_deterministic(site) or site_is_subsample(site):
                    continue
                value, event_dim = together.nodes[name]["value"], site["fn"].event_dim
                given[name] = value.select(dim - event_dim, k).reshape(site["value"].shape)
            alone: Any = poutine.trace(poutine.condition(run, given)).get_trace()
            alone.compute_log_prob()
            for name in given:
                log_prob = together.nodes[name]["log_prob"].select(dim, k).sum()
                expected = alone.nodes[name]["log_prob"].sum()
                if not torch.allclose(log_prob, expected, _TOLERANCE, _TOLERANCE, equal_nan=True):
                    fault = f"other densities of site '{name}' than for each data set alone"
        return fault
