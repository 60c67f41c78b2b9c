# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Pyro handlers that run a model for its log-density."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from .sites import is_enumerated


def hidden_sites() -> BlockMessenger:
    """Hides the sites of a run from handlers around it, but not its parameters: they are trained."""
    return BlockMessenger(hide_types=["sample", "observe"])


def traced_parameters(run: Callable[[], object]) -> dict[str, Tensor]:
    """The unconstrained parameters that a run of a model or a guide asks Pyro for, by name."""
    with poutine.trace(param_only=True) as capture:
        run()
    found: dict[int, tuple[str, Tensor]] = {}
    for name in capture.trace.param_nodes:
        value: Any = capture.trace.nodes[name]["value"]
        # Pyro attaches this function; a parameter without it is its own unconstrained value
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        # a module's parameter may come by several names
        found.setdefault(id(leaf), (name, leaf))
    return dict(found.values())


class UnmaskedLatents(Messenger):
    """Gives the masked elements of continuous latents their prior density.

    A mask, such as that of ``obs_mask``, leaves elements of latents without a density, so that a
    guide of them would widen without bound, and its ELBO grow. With the prior their posterior is
    the prior, and that of the other elements stays the same. A mask that is ``False`` as a whole is
    left alone: it is how an improper prior is written.
    """

    def _pyro_sample(self, message: Message) -> None:
        is_latent = not (message["is_observed"] or site_is_subsample(message))
        if is_latent and not is_enumerated(message) and message["mask"] is not False:
            message["mask"] = None


class SiteLogProbs(Messenger):
    """Sets sites to given values, and collects the log-density of each sample site.

    It gives what a trace of the conditioned model gives, for a fraction of the time.

    :param given: the values of some sites.
    :param data_only: whether only sites with data count, their scale left out.
    """

    def __init__(self, given: Mapping[str, Tensor], *, data_only: bool = False) -> None:
        super().__init__()
        self._given, self._data_only = given, data_only
        #: the value of each site, indices of plates included
        self.values: dict[str, Tensor] = {}
        #: the log-density of each site, of its batch shape
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self._given and not message["is_observed"]:
            message["value"] = self._given[message["name"]]

    def _pyro_post_sample(self, message: Any) -> None:
        name, value = message["name"], message["value"]
        self.values[name] = value
        if site_is_subsample(message) or (self._data_only and not has_data(message)):
            return
        log_prob = message["fn"].log_prob(value, *message["args"], **message["kwargs"])
        scale = 1.0 if self._data_only else message["scale"]
        self.log_probs[name] = scale_and_mask(log_prob, scale, message["mask"])


def has_data(site: Any) -> bool:
    """Whether a site is observed, and is neither a factor, a deterministic value nor a subsample."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    return not (is_deterministic(site) or site_is_factor(site) or site_is_subsample(site))


def is_deterministic(site: Any) -> bool:
    """Whether a site is one of ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic"))


def sum_out_discrete(
    run: Callable[[], object], first_available_dim: int, draws: str | None
) -> Tensor:
    """The log-density of a model with its discrete latents summed out, by variable elimination.

    :param run: runs the model with its continuous latents at given values.
    :param first_available_dim: a dimension to the left of all plates.
    :param draws: the name of the plate of draws, which is not summed over, if there is one.
    :return: shape ``(n,)``, or a scalar without a plate of draws.
    """
    with poutine.enum(first_available_dim=first_available_dim):
        trace = poutine.trace(run).get_trace()
    trace.compute_log_prob()
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
            ordinal = frozenset(symbols[frame.name] for frame in frames)
            factors.setdefault(ordinal, []).append(site["packed"]["log_prob"])
    enumerated = set(trace.symbol_to_dim) - set(symbols.values())
    kept = frozenset() if draws is None else frozenset({symbols[draws]})
    total: Tensor = contract_to_tensor(factors, enumerated, target_ordinal=kept)
    return total
