# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Pyro effect handlers that evaluate the log density of a model."""

import copy
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, Message
from pyro.poutine.scale_messenger import ScaleMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.distributions import Distribution, constraints

from .traces import has_data, is_enumerated, support_of


def hidden_sites() -> BlockMessenger:
    """Hides the sites of a run from outer handlers, but not its parameters, which are trained."""
    return BlockMessenger(hide_types=["sample", "observe"])


def traced_parameters(run: Callable[[], object]) -> dict[str, Tensor]:
    """The unconstrained Pyro parameters that a run of a model or guide uses and trains, by name."""
    with poutine.trace(param_only=True) as capture:
        run()
    found: dict[int, tuple[str, Tensor]] = {}
    for name in capture.trace.param_nodes:
        value: Any = capture.trace.nodes[name]["value"]
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if leaf.requires_grad:
            found.setdefault(id(leaf), (name, leaf))  # a module's parameter may have several names
    return dict(found.values())


class UnmaskedLatents(Messenger):
    """Gives masked continuous latents their prior density, so that guides do not widen where they are masked.

    ``mask=False`` stays, the idiom for an improper prior.
    """

    def _pyro_sample(self, message: Message) -> None:
        is_latent = not (message["is_observed"] or site_is_subsample(message))
        if is_latent and not is_enumerated(message) and message["mask"] is not False:
            message["mask"] = None


class SiteLogProbs(Messenger):
    """Sets sites to given values and collects the log density of each sample site.

    The log densities equal those of a conditioned trace; with ``data_only``, of data and
    factors only, unscaled.
    """

    def __init__(self, given: Mapping[str, Tensor], *, data_only: bool = False) -> None:
        super().__init__()
        self._given, self._data_only = given, data_only
        self.values: dict[str, Tensor] = {}  #: by site, plate indices included
        self.log_probs: dict[str, Tensor] = {}  #: by site, of its batch shape
        self.frames: dict[str, tuple[CondIndepStackFrame, ...]] = {}  #: plates by site

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self._given and not message["is_observed"]:
            message["value"] = self._given[message["name"]]

    def _pyro_post_sample(self, message: Any) -> None:
        name, value = message["name"], message["value"]
        self.values[name] = value
        is_likelihood = has_data(message) or site_is_factor(message)
        if site_is_subsample(message) or (self._data_only and not is_likelihood):
            return
        scale = 1.0 if self._data_only else message["scale"]
        self.log_probs[name] = scale_and_mask(_log_prob(message), scale, message["mask"])
        self.frames[name] = message["cond_indep_stack"]

    def frame(self, name: str, plate: str) -> CondIndepStackFrame | None:
        """The frame of a plate around a site; ``None`` if the site is not in it."""
        return next((frame for frame in self.frames[name] if frame.name == plate), None)

    def by_element(self, plate: str, left_out: Container[str] = ()) -> tuple[Tensor, Tensor]:
        """Log densities of n draws by element of a plate ``(n, size)``, and of all other sites ``(n,)``.

        Elements exclude the scale of a subsampled plate. The dimension of draws is left of all plates.
        """
        inside, outside = list[Tensor](), list[Tensor]()
        for name in filter(lambda name: name not in left_out, self.log_probs):
            frame, term = self.frame(name, plate), self.log_probs[name]
            if frame is None:
                outside.append(term.flatten(1).sum(1))
            else:
                rows = term.movedim(frame.dim or -1, 1).reshape(len(term), frame.size, -1)
                scale = (frame.full_size or frame.size) / frame.size
                inside.append(rows.sum(-1) / scale)
        if not inside:
            raise ValueError(f"expected sites in plate '{plate}', got {list(self.log_probs)}")
        none = torch.zeros_like(inside[0][:, 0])
        return sum(inside, torch.zeros_like(inside[0])), sum(outside, none)


def _log_prob(site: Any) -> Tensor:
    """The unmasked log density of a site, with masked data replaced by data that count.

    A mask removes NaN, or the log of zero, from the density, but not from the gradient. Counts with a
    probability above 1, due to round-off, get probability zero: differences of log-gammas lose precision for
    NegativeBinomial in float32 from 1e6 failures on, and would make a spurious mode there.
    """
    fn, value, mask = _unchecked(site["fn"]), site["value"], site["mask"]
    if isinstance(mask, Tensor) and has_data(site) and not is_functorch_wrapped_tensor(mask):
        event_dim = fn.event_dim
        event = value.shape[value.dim() - event_dim :]
        batch = torch.broadcast_shapes(mask.shape, value.shape[: value.dim() - event_dim])
        if not mask.any():
            shape, dtype = torch.broadcast_shapes(batch, fn.batch_shape), torch.get_default_dtype()
            return torch.zeros(shape, dtype=dtype, device=mask.device)
        is_counted, value = mask.expand(batch), value.expand(batch + event)
        counted = value.reshape(-1, *event)[is_counted.flatten().int().argmax()]
        value = torch.where(is_counted[(..., *(None,) * event_dim)], value, counted)
    log_prob: Tensor = fn.log_prob(value, *site["args"], **site["kwargs"])
    support = support_of(fn)
    if has_data(site) and support.is_discrete and support is not constraints.boolean:
        log_prob = log_prob.masked_fill(log_prob > 0.1, -torch.inf)
    return log_prob


def _unchecked(fn: Any) -> Any:
    """A copy of a distribution without argument checks, which read values; itself if it has none."""
    changed = {
        name: part
        for name, checked in vars(fn).items()
        if isinstance(checked, Distribution) and (part := _unchecked(checked)) is not checked
    }
    if not (changed or vars(fn).get("_validate_args")):
        return fn
    twin = copy.copy(fn)
    vars(twin).update(changed, _validate_args=False)
    return twin


class FoundScale(Messenger):
    """Whether the model uses ``poutine.scale``: such a scale may depend on any value of its arguments."""

    is_found = False

    def _pyro_sample(self, _: Message) -> None:
        self.is_found |= any(isinstance(handler, ScaleMessenger) for handler in _PYRO_STACK)


class FirstIndices(Messenger):
    """Gives plates their first indices if nothing depends on them: drawing permutes all indices."""

    def _pyro_sample(self, message: Any) -> None:
        if site_is_subsample(message) and message["value"] is None:
            drawn = message["fn"]
            size = min(drawn.subsample_size or drawn.size, drawn.size)
            message["value"] = torch.arange(size, device=drawn.device)
