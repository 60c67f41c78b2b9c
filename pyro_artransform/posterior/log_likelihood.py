# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log-likelihood of each datum of a model, at many draws of its latents."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from ..joint.plates import agree

Values = dict[str, Tensor]

_CHUNK = 1000
_NUM_CHECKS = 3


class LikelihoodRun(Messenger):
    """Puts the latents of a model where they are given, and keeps the log-density of its data.

    :param values: the value of each latent site.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values
        self.terms: Values = {}

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self._values and not message["is_observed"]:
            message["value"] = self._values[message["name"]]

    def _pyro_post_sample(self, message: Any) -> None:
        if has_data(message):
            log_prob = message["fn"].log_prob(message["value"])
            self.terms[message["name"]] = scale_and_mask(log_prob, mask=message["mask"])


def has_data(site: Any) -> bool:
    """Whether a site is observed, and is neither a factor, a deterministic value nor a subsample.

    :param site: a message of Pyro, as a trace holds it.
    """
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    return not (_is_deterministic(site) or site_is_factor(site) or site_is_subsample(site))


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic"))


class Likelihood:
    """The log-likelihood of each datum as a function of draws of all latents.

    Many draws are evaluated at once, in one more plate or by ``torch.vmap``, if that is the same as
    one at a time.

    :param model: a Pyro model.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :raises ValueError: if the model sub-samples its data.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._run = lambda: model(*args, **kwargs)
        with poutine.block():
            nodes: Any = poutine.trace(self._run).get_trace().nodes
        sites = {
            k: s for k, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)
        }
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
        _refuse_subsampling(frames)
        self._nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        self._event_dims = {k: site["fn"].event_dim for k, site in sites.items()}
        #: a value of each latent site, of each that has data, and of each deterministic one
        self.latents: Values = {k: s["value"] for k, s in sites.items() if not s["is_observed"]}
        self.observed: Values = {k: s["value"] for k, s in sites.items() if has_data(s)}
        self.deterministic: Values = {
            k: s["value"] for k, s in sites.items() if _is_deterministic(s)
        }

    def __call__(self, draws: Mapping[str, Tensor]) -> Values:
        """The log-likelihoods, of shape ``(n,) + batch shape`` for each site with data.

        :param draws: for each latent a tensor of shape ``(n,) + site shape``.
        :raises ValueError: if a latent is missing, or draws have wrong shapes.
        """
        undrawn = self.undrawn(draws)
        if undrawn:
            raise ValueError(f"draws: expected those of all latents, got none of {undrawn}")
        chosen = {name: draws[name] for name in self.latents}
        n = self._count(chosen)
        way = getattr(self, f"_by_{self.way(chosen)}")
        chunks = [
            way({name: value[start : start + _CHUNK] for name, value in chosen.items()})
            for start in range(0, n, _CHUNK)
        ]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def undrawn(self, draws: Mapping[str, Tensor]) -> list[str]:
        """The names of latents that have no draws.

        :param draws: for each latent a tensor of shape ``(n,) + site shape``.
        """
        return sorted(self.latents.keys() - draws.keys())

    def way(self, draws: Mapping[str, Tensor]) -> str:
        """How many draws are evaluated: by "plate", "vmap" or "loop".

        :param draws: for each latent a tensor of shape ``(n,) + site shape``.
        """
        few = {k: draws[k][:_NUM_CHECKS] for k in self.latents if k in draws}
        expected = self._by_loop(few)
        for name, way in (("plate", self._by_plate), ("vmap", self._by_vmap)):
            try:
                found = way(few)
            except Exception:  # whatever a model raises for many draws says the same: not so
                continue
            if all(agree(found[k], value) for k, value in expected.items()):
                return name
        return "loop"

    def in_plate(self, draws: Mapping[str, Tensor]) -> Values:
        """Draws with their dimension to the left of all plates of the model.

        :param draws: for each latent a tensor of shape ``(n,) + site shape``.
        """
        placed = {}
        for name, value in draws.items():
            padding = (1,) * (self._nesting + 1 + self._event_dims[name] - value.dim())
            placed[name] = value.reshape(value.shape[:1] + padding + value.shape[1:])
        return placed

    def _count(self, draws: Values) -> int:
        n = len(next(iter(draws.values()))) if draws else 0
        for name, value in draws.items():
            expected = (n, *self.latents[name].shape)
            if value.shape != expected:
                raise ValueError(
                    f"draws: expected '{name}' of shape {expected}, got {tuple(value.shape)}"
                )
        return n

    def _by_plate(self, draws: Values) -> Values:
        n = self._count(draws)
        run = LikelihoodRun(self.in_plate(draws))
        with poutine.block(), run, pyro.plate("_draws", n, dim=-1 - self._nesting):
            self._run()
        return {name: self._out_of_plate(name, term) for name, term in run.terms.items()}

    def _out_of_plate(self, name: str, term: Tensor) -> Tensor:
        batch_dim = self.observed[name].dim() - self._event_dims[name]
        return term.reshape(term.shape[:1] + term.shape[term.dim() - batch_dim :])

    def _by_vmap(self, draws: Values) -> Values:
        self._count(draws)
        found: Values = torch.vmap(self._one, randomness="same")(draws)
        return found

    def _by_loop(self, draws: Values) -> Values:
        rows = [self._one({k: v[i] for k, v in draws.items()}) for i in range(self._count(draws))]
        return {name: torch.stack([row[name] for row in rows]) for name in self.observed}

    def _one(self, values: Mapping[str, Tensor]) -> Values:
        run = LikelihoodRun(values)
        with poutine.block(), run:
            self._run()
        return run.terms


def _refuse_subsampling(frames: list[Any]) -> None:
    for frame in frames:
        if frame.full_size not in (None, frame.size):
            raise ValueError(
                f"model: expected all data, got the sub-sampled plate '{frame.name}' "
                f"({frame.size} of {frame.full_size})"
            )
