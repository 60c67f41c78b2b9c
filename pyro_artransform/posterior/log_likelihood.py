# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log-likelihood of each datum of a model, at many draws of its latents."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..joint.handlers import SiteLogProbs
from ..joint.traces import check_data, has_data, is_deterministic, plate_nesting, subsampled_plates
from ..joint.vectorization import (
    STRATEGIES,
    DrawPlate,
    Terms,
    agree,
    choose_strategy,
    evaluate_many,
    stack,
)

_CHUNK = 1000
# strategies are compared at so many draws, and at those that are extreme in so many coordinates
_NUM_COMPARED = 8
_NUM_COORDINATES = 32


@torch.no_grad()
def log_likelihood(
    model: Callable[..., object], draws: Mapping[str, Tensor], *args: object, **kwargs: object
) -> dict[str, Tensor]:
    """The log-likelihood of each datum at each draw.

    Scales, such as those of ``poutine.scale``, are left out: each number is the log-density of a
    datum. Masked data have zero, which adds nothing to a sum over data, but counts as a datum where
    the spread of the terms does, as in the standard errors of ``arviz.loo``. A site with event
    dimensions has one datum for each element of its batch shape.

    :param model: a Pyro model with data.
    :param draws: for each latent site of the model a tensor of shape ``(n,) + site shape``; further
        sites are ignored.
    :param args: the model's arguments.
    :param kwargs: its keyword arguments.
    :return: for each site that has data (a factor has none) a tensor of shape ``(n,) + batch shape``.
    :raises ValueError: if the model has a latent without draws (discrete latents that are summed out
        have none: draw them by :func:`pyro.infer.infer_discrete`), or it sub-samples its data, or a
        site has data at some draws only, or draws have wrong shapes.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_artransform.posterior import log_likelihood
        >>> def model(data):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=data)
        >>> log_likelihood(model, {"z": torch.zeros(5)}, torch.zeros(3))["y"].shape
        torch.Size([5, 3])
    """
    return Likelihood(model, args, kwargs)(draws)


class Likelihood:
    """The log-likelihood of each datum as a function of draws of all latents, and the sites behind it.

    Many draws are evaluated at once where that agrees with single runs.
    """

    def __init__(
        self, model: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        self.run = partial(model, *args, **kwargs)
        with poutine.block():
            trace = poutine.trace(self.run).get_trace()
        for frame in subsampled_plates(trace):
            raise ValueError(
                f"model: expected all data, got the sub-sampled plate '{frame.name}' "
                f"({frame.size} of {frame.full_size})"
            )
        check_data(trace)
        self._num_plates = plate_nesting(trace)
        nodes: Any = trace.nodes.items()
        sites = {k: s for k, s in nodes if s["type"] == "sample" and not site_is_subsample(s)}
        self._event_dims = {k: site["fn"].event_dim for k, site in sites.items()}
        #: a value of each latent site, and of each that has data
        self.latents: Terms = {k: s["value"] for k, s in sites.items() if not s["is_observed"]}
        self.observed: Terms = {k: s["value"] for k, s in sites.items() if has_data(s)}
        #: whether there is a deterministic site
        self.has_deterministic = any(map(is_deterministic, sites.values()))

    def __call__(self, draws: Mapping[str, Tensor]) -> Terms:
        """The log-likelihoods, of shape ``(n,) + batch shape`` for each site with data."""
        undrawn = self.undrawn(draws)
        if undrawn:
            raise ValueError(f"draws: expected those of all latents, got none of {undrawn}")
        chosen = {name: draws[name] for name in self.latents}
        first = STRATEGIES.index(self.strategy(draws))
        rows = _compared_rows(chosen)
        few = {name: value[rows] for name, value in chosen.items()}
        expected = evaluate_many(self._evaluate, few, "loop")
        for strategy in STRATEGIES[first:]:
            found = evaluate_many(self._evaluate, chosen, strategy, chunk_size=_CHUNK)
            # a draw that is not among the few may take a branch, and with it all others
            if agree({name: term[rows] for name, term in found.items()}, expected, slack=10):
                break
        return found

    def undrawn(self, draws: Mapping[str, Tensor]) -> list[str]:
        """The names of latents that have no draws."""
        return sorted(self.latents.keys() - draws.keys())

    def strategy(self, draws: Mapping[str, Tensor]) -> str:
        """How many draws are evaluated: by "plate", "vmap", "copies" or "loop"."""
        chosen = {name: draws[name] for name in self.latents if name in draws}
        n = next((len(value) for value in chosen.values() if value.dim()), 1)
        for name, value in chosen.items():
            expected, got = (n, *self.latents[name].shape), tuple(value.shape)
            if got != expected:
                raise ValueError(f"draws: expected '{name}' of shape {expected}, got {got}")
        rows = _compared_rows(chosen)
        few = {name: value[rows] for name, value in chosen.items()}
        return choose_strategy(self._evaluate, few)[0]

    def in_plate(self, draws: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Draws with their dimension to the left of all plates of the model."""
        num_draws = len(next(iter(draws.values())))
        return DrawPlate(num_draws, self._num_plates).place(draws, self._event_dims)

    def deterministic(self, draws: Mapping[str, Tensor]) -> Terms:
        """The values of deterministic sites at each draw and the data, of shape ``(n,) + site shape``."""
        rows = []
        for values in zip(*draws.values()):
            run = poutine.condition(self.run, dict(zip(draws, values)))
            with poutine.block():
                nodes: Any = poutine.trace(run).get_trace().nodes.items()
            sites = {k: site for k, site in nodes if site["type"] == "sample"}
            rows.append({k: site["value"] for k, site in sites.items() if is_deterministic(site)})
            _check_same(rows[0], rows[-1])
        return stack(rows)

    def _evaluate(self, draws: Mapping[str, Tensor], size: int | None) -> Terms:
        plate = DrawPlate(size, self._num_plates)
        scored = SiteLogProbs(plate.place(draws, self._event_dims), data_only=True)
        with poutine.block(), scored:
            plate.run(self.run)
        _check_same(self.observed, scored.log_probs)
        if size is None:
            return scored.log_probs
        found = {}
        for name, term in scored.log_probs.items():
            batch_dim = self.observed[name].dim() - self._event_dims[name]
            found[name] = term.reshape(term.shape[:1] + term.shape[term.dim() - batch_dim :])
        return found


def _check_same(expected: Terms, found: Terms) -> None:
    """Refuses sites that some runs of a model have, and others have not."""
    for name in sorted(expected.keys() ^ found.keys()):
        raise ValueError(
            f"model: expected the same sites at each draw, got '{name}' at some only; have it in "
            f"each branch, or hide it by poutine.block(model, hide=['{name}'])"
        )


def _compared_rows(draws: Mapping[str, Tensor]) -> list[int]:
    """Draws at which strategies are compared: some, and those where branches are likely to differ."""
    n = len(next(iter(draws.values()))) if draws else 0
    if not n:
        return []
    rows = set(range(0, n, -(-n // _NUM_COMPARED)))
    coordinates = torch.cat([value.reshape(n, -1).double() for value in draws.values()], -1)
    step = -(-coordinates.shape[-1] // _NUM_COORDINATES)
    part = coordinates[:, ::step]
    return sorted({*rows, *part.argmin(0).tolist(), *part.argmax(0).tolist()})
