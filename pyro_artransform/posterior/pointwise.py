# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The pointwise log likelihood of a model at many draws of its latents."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor
from torch import Tensor

from .._base.arguments import first_of
from ..model.draw_plate import DrawPlate
from ..model.handlers import SiteLogProbs
from ..model.run_once import run_once
from ..model.traces import (
    check_data,
    has_data,
    is_deterministic,
    is_enumerated,
    latent_nodes,
    observed_nodes,
    plate_nesting,
    subsampled_plates,
)
from ..model.vectorization import (
    Draws,
    Terms,
    choose_strategy,
    stack,
    vectorized,
)


@torch.no_grad()
def log_likelihood(
    model: Callable[..., object], draws: Mapping[str, Tensor], *args: object, **kwargs: object
) -> dict[str, Tensor]:
    """The log likelihood of each datum at each draw.

    Scales, such as those of ``poutine.scale``, are ignored: each value is the log density of a datum.
    Masked data have the value zero, and still count as data in the spread of the terms, as in standard
    errors of ``arviz.loo``. A site with event dimensions has one datum per element of its batch shape.

    A factor in the plates of exactly one site with data is part of the likelihood of each of these data, such
    as the probability of a longer time where data are censored. Any other factor, even a part of the prior,
    is an error, since terms without it may lack data. If it is no part of the likelihood, pass
    ``poutine.block(model, hide=[name])``.

    :param draws: for each latent site of the model a tensor of shape ``(n,) + site shape``; other
        sites are ignored.
    :return: for each site with data a tensor of shape ``(n,) + batch shape``.
    :raises ValueError: if a latent of the model has no draws (draw discrete latents that were summed
        out with :func:`pyro.infer.infer_discrete`), the model subsamples its data, a site has data at
        some draws only, a factor belongs to no single data, or draws have wrong shapes.

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
    return Likelihood(partial(model, *args, **kwargs))(draws)


class Likelihood:
    """The pointwise log likelihood as a function of draws of all latents, and the sites of the model."""

    def __init__(self, run: Callable[[], object], is_of_all_data: bool = True) -> None:
        self.run = run
        trace = run_once(run, validated=True)
        for frame in subsampled_plates(trace) if is_of_all_data else ():
            raise ValueError(
                f"model: expected all data, got the subsampled plate '{frame.name}' ({frame.size} of "
                f"{frame.full_size})"
            )
        check_data(trace, all_shapes=False)  # Pyro's MCMC accepts such models, too
        self._num_plates = plate_nesting(trace)
        latents, observed = latent_nodes(trace), observed_nodes(trace)
        self._event_dims = {site["name"]: site["fn"].event_dim for site in (*latents, *observed)}
        #: a value of each latent site, and of each site with data
        self.latents: Terms = {site["name"]: site["value"] for site in latents}
        self.observed: Terms = {s["name"]: s["value"] for s in observed if has_data(s)}
        #: the names of the discrete latents that are summed out
        self.enumerated = {site["name"] for site in latents if is_enumerated(site)}
        #: by factor, the site with data whose terms it is added to; empty if there is no such site
        self._site_of: dict[str, str] = {
            factor["name"]: _site_with_data(factor, [s for s in observed if has_data(s)])
            for factor in filter(site_is_factor, observed)
        }
        #: why data have no terms of their own; empty if they have
        self.incomplete = _about_factors([name for name, site in self._site_of.items() if not site])
        self.has_deterministic = any(map(is_deterministic, observed))

    def __call__(self, draws: Draws) -> Terms:
        """The log likelihoods of each site with data, of shape ``(n,) + batch shape``."""
        if undrawn := sorted(self.latents.keys() - draws.keys()):
            raise ValueError(f"draws: expected those of all latents, got none of {undrawn}")
        if self.incomplete:
            raise ValueError(
                f"model: expected a log likelihood of each datum, got {self.incomplete}"
            )
        chosen = self.given(draws)
        flat = torch.cat([v.reshape(len(v), -1).double() for v in chosen.values()], -1)
        scores = flat[:, :: -(-flat.shape[-1] // 32)]
        first = choose_strategy(self._evaluate, chosen).strategy
        return vectorized(self._evaluate, chosen, lambda _: scores, first, chunk_size=1000)[1]

    def predicted(self, draws: Draws) -> Terms:
        """A value of each latent without draws, except latents that are summed out given data."""
        hidden = self.enumerated if self.observed else ()
        return {k: v for k, v in self.latents.items() if not (k in draws or k in hidden)}

    def given(self, draws: Draws) -> Terms:
        """Selects the draws of the model's latents, and checks their shapes."""
        chosen = {name: draws[name] for name in self.latents if name in draws}
        n = next((len(value) for value in chosen.values() if value.dim()), 1)
        for name, value in chosen.items():
            expected, got = (n, *self.latents[name].shape), tuple(value.shape)
            if got != expected:
                raise ValueError(
                    f"draws: expected '{name}' of shape {expected}, got {got}; for new groups give "
                    f"predict(model, draws, ...) no draws of '{name}', which are then drawn from the prior"
                )
        return chosen

    def sites(self, draws: Draws, is_wanted: Callable[[Any], bool], observed: bool = True) -> Terms:
        """Runs the model once per draw, and returns the wanted sites, ``(n,) + site shape``.

        :param observed: whether data keep their values; otherwise they are drawn.
        """
        rows = list[Terms]()
        for values in zip(*draws.values()):
            at = dict(zip(draws, values))
            trace = run_once(self.run, at=at, observed=observed, validated=True)
            nodes_wanted = [
                n for n in trace.nodes.values() if n["type"] == "sample" and is_wanted(n)
            ]
            rows.append({node["name"]: node["value"] for node in nodes_wanted})
            _check_same(rows[0], rows[-1])
        return stack(rows)

    def _evaluate(self, draws: Draws, size: int | None) -> Terms:
        plate = DrawPlate(size, self._num_plates)
        scored = SiteLogProbs(plate.place(draws, self._event_dims), data_only=True)
        with poutine.block(), scored:
            plate.run(self.run)
        terms = scored.log_probs
        _check_same({*self.observed, *self._site_of}, {*terms})
        for factor, name in self._site_of.items():
            terms[name] = terms[name] + terms.pop(factor)
        if size is None:
            return terms
        log_probs = {}
        for name, term in terms.items():
            batch_dim = self.observed[name].dim() - self._event_dims[name]
            log_probs[name] = term.reshape(term.shape[:1] + term.shape[term.dim() - batch_dim :])
        return log_probs


def _site_with_data(factor: Any, sites: list[Any]) -> str:
    """The only one of the sites in the plates of a factor; empty without one, or without plates."""
    plates = {frame.name for frame in factor["cond_indep_stack"]}
    same = [s["name"] for s in sites if plates == {frame.name for frame in s["cond_indep_stack"]}]
    return same[0] if plates and len(same) == 1 else ""


def _about_factors(names: list[str]) -> str:
    """Why these factors have no term for each datum, and what to do; empty without factors."""
    return first_of(names) and (
        f"the factor {first_of([*map(repr, names)])}, which is not in the plates of exactly one site with "
        "data. If it is part of the likelihood, put it into the plate of its data, with a term for each; if "
        f"it is part of the prior, leave it out by poutine.block(model, hide={names})"
    )


def _check_same(expected: Collection[str], found: Collection[str]) -> None:
    """Raises a ``ValueError`` if two runs of a model have different sites."""
    for name in sorted({*expected} ^ {*found}):
        raise ValueError(
            f"model: expected the same sites at each draw, got '{name}' only at some; put it into each "
            f"branch, or hide it by poutine.block(model, hide=['{name}'])"
        )
