# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The log joint density of a Pyro model as a function of many draws at once."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import biject_to

from .enumeration import summed_out
from .masked_latents import WholeLatents
from .outline import Outline, Outlines, outline_of
from .plates import agree, hidden_sites, is_subsampled, plate_nesting
from .scoring import ScoredRun
from .sites import Latents, is_enumerated, latent_nodes

_NUM_CHECKS = 5
_CHECK_SCALE = 0.1
_FEW = 32
_PLATE = "_draws"


class LogJoint:
    r"""The log joint density of a Pyro model, with the Jacobian, on the unconstrained space.

    .. math::

        \log p(x, c(z)) + \log |\det c'(z)|

    where c is Pyro's bijection onto the supports of the latents. Many draws are evaluated at once
    by the fastest of three ways that agrees with the model run one draw at a time: in one more
    :class:`pyro.plate` to the left of the model's own, by ``torch.vmap``, or one after the other.
    Discrete latents that are marked for enumeration are summed out, and elements of latents that a
    mask takes out have their prior density. Pyro's validation is off while
    the model runs, so that a draw outside of what the model can take gives NaN and no error.

    :param model: a Pyro model.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param init_loc_fn: where the latents are in the run that shows what they are, one of Pyro's
        starting functions.
    :raises ValueError: if a latent is discrete and not enumerated, or there is no latent.

    Example::

        >>> import pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(0.3))
        >>> log_joint = LogJoint(model)
        >>> log_joint(torch.zeros(5, 1)).shape, log_joint.way
        (torch.Size([5]), 'plate')
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
    ) -> None:
        self._model, self._init_loc_fn = model, init_loc_fn
        self._run = _bound(model, args, kwargs or {})
        trace = self._trace_of(self._run)
        self._outlines = Outlines()
        self._outlines.keep(args, kwargs or {}, outline_of(trace))
        self.latents = Latents.from_trace(trace)
        #: where the latents were in the run that showed what they are, shape ``(latent_dim,)``
        self.start = self.latents.unconstrain(_values(trace))
        self.num_plates = plate_nesting(trace)
        self.is_subsampled = is_subsampled(trace)
        self.is_enumerated = any(is_enumerated(node) for node in _sample_nodes(trace))
        #: "plate", "vmap" or "loop", and for a loop what the other ways failed of
        self.way, self.reason = self._choose_way()

    @property
    def latent_dim(self) -> int:
        """The number of unconstrained coordinates."""
        return self.latents.latent_dim

    def at(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> "LogJoint":
        """The log joint density of the same model for other arguments, as of another mini-batch.

        It is evaluated in the same way, which is not chosen anew, so that this costs next to nothing.

        :param args: the arguments.
        :param kwargs: the keyword arguments.
        :raises ValueError: if with these the model has other latents, or some of other shapes.
        """
        shapes = self.outline(args, kwargs).shapes
        expected = {name: site.shape for name, site in self.latents.sites.items()}
        if shapes != expected:
            raise ValueError(
                "the model has other latents with these arguments: expected the sites and shapes "
                f"{_plain(expected)}, got {_plain(shapes)}. Latents of the elements of a mini-batch "
                "need a guide that is told of the mini-batch, such as AutoAmortized"
            )
        other = copy.copy(self)
        other._run = _bound(self._model, args, kwargs or {})
        return other

    def outline(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Outline:
        """What a run with other arguments says of its sites; arguments of known shapes need no run.

        :param args: the arguments.
        :param kwargs: the keyword arguments.
        """
        run = _bound(self._model, args, kwargs or {})
        return self._outlines.find(args, kwargs or {}, lambda: self._trace_of(run))

    def __call__(self, z: Tensor) -> Tensor:
        """The log joint density of draws, NaN where the model fails.

        :param z: shape ``(n, latent_dim)``.
        :return: shape ``(n,)``.
        """
        with _quietly():
            return self._values_or_nan(z)

    def _values_or_nan(self, z: Tensor) -> Tensor:
        """One draw that a factorisation refuses must not cost the others."""
        try:
            return self._ways()[self.way](z)
        except (torch.linalg.LinAlgError, ValueError):
            if len(z) > _FEW:
                return torch.cat([self._values_or_nan(part) for part in z.split(_FEW)])
            return torch.stack([self._one_or_nan(row) for row in z])

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The value of each latent site, of shape ``batch + site shape``.

        :param z: shape ``batch + (latent_dim,)``.
        """
        return self.latents.constrain(z)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vector of all latents, shape ``batch + (latent_dim,)``.

        :param values: for each latent site, shape ``batch + site shape``.
        :raises ValueError: if a site is missing, or a value has another shape.
        """
        return self.latents.unconstrain(values)

    @torch.no_grad()
    def culprits(self, z: Tensor) -> list[str]:
        """The sites whose log-density is not finite at one of the draws.

        :param z: shape ``(n, latent_dim)``.
        """
        found: dict[str, None] = {}
        with _quietly():
            for row in z:
                found |= dict.fromkeys(self._culprits_of(row))
        return list(found)

    def _culprits_of(self, z: Tensor) -> list[str]:
        run = ScoredRun(self.latents.constrain(z))
        try:
            with hidden_sites(), run:
                self._run()
        except (torch.linalg.LinAlgError, ValueError) as error:
            return [f"the model itself ({error})"]
        return [name for name, term in run.terms.items() if not term.isfinite()]

    # The three ways

    def _ways(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"plate": self._by_plate, "vmap": self._by_vmap, "loop": self._by_loop}

    def _by_plate(self, z: Tensor) -> Tensor:
        values, ladj = self.latents.constrain_with_ladj(z)
        placed = {name: self._in_plate(name, value) for name, value in values.items()}
        dim = -1 - self.num_plates
        if self.is_enumerated and len(z) == 1:
            # Pyro's variable elimination has no dimension for a plate of one
            return torch.stack([self._one(z[0])])
        if self.is_enumerated:
            with hidden_sites(), pyro.plate(_PLATE, len(z), dim=dim):
                return ladj + self._summed_out(placed, _PLATE)
        run = ScoredRun(placed, keep_dim=dim)
        with hidden_sites(), run, pyro.plate(_PLATE, len(z), dim=dim):
            self._run()
        return sum(run.terms.values(), ladj)

    def _in_plate(self, name: str, value: Tensor) -> Tensor:
        """A value of shape ``(n,) + site shape`` with its draws to the left of all plates."""
        site = self.latents.sites[name]
        batch_dim = len(site.shape) - site.event_dim
        padding = (1,) * (self.num_plates - batch_dim)
        return value.reshape(value.shape[:1] + padding + value.shape[1:])

    def _by_vmap(self, z: Tensor) -> Tensor:
        found: Tensor = torch.vmap(self._one, randomness="same")(z)
        return found

    def _by_loop(self, z: Tensor) -> Tensor:
        state = torch.get_rng_state()
        found = []
        for row in z:
            # what the model draws itself, as a minibatch, is the same for all
            torch.set_rng_state(state)
            found.append(self._one(row))
        return torch.stack(found)

    def _one(self, z: Tensor) -> Tensor:
        values, ladj = self.latents.constrain_with_ladj(z)
        if self.is_enumerated:
            with hidden_sites():
                return ladj + self._summed_out(values, None)
        run = ScoredRun(values)
        with hidden_sites(), run:
            self._run()
        return sum(run.terms.values(), ladj)

    def _summed_out(self, values: Mapping[str, Tensor], draws: str | None) -> Tensor:
        placed = poutine.condition(self._run, dict(values))
        left = -1 - self.num_plates - (draws is not None)
        return summed_out(placed, left, draws)

    def _one_or_nan(self, z: Tensor) -> Tensor:
        try:
            return self._one(z)
        except (torch.linalg.LinAlgError, ValueError):
            return z.sum() * torch.nan

    # Set-up

    def _trace_of(self, run: Callable[[], Any]) -> poutine.Trace:
        starting = InitMessenger(_starting(self._init_loc_fn))
        with _quietly(), torch.no_grad(), hidden_sites(), starting:
            trace: poutine.Trace = poutine.trace(run).get_trace()
        return trace

    @torch.no_grad()
    def _choose_way(self) -> tuple[str, str]:
        start = self.start
        with torch.random.fork_rng(devices=[]):
            z = start + _CHECK_SCALE * torch.randn_like(start.expand(_NUM_CHECKS, -1))
        state = torch.get_rng_state()
        with _quietly():
            expected = torch.stack([self._reseeded(state, self._one_or_nan, row) for row in z])
            reason = ""
            for name in ("plate", "vmap"):
                reason = self._objection(name, z, expected, state)
                if not reason:
                    return name, ""
        return "loop", reason

    def _objection(self, name: str, z: Tensor, expected: Tensor, state: Tensor) -> str:
        """What speaks against a way, or an empty string."""
        try:
            found = self._reseeded(state, self._ways()[name], z)
        except Exception as error:  # whatever a model raises for many draws says the same: not so
            return f"{type(error).__name__}: {error}"
        if not agree(found, expected):
            return "many draws at once give another log-density than one at a time"
        return ""

    @staticmethod
    def _reseeded(state: Tensor, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        torch.set_rng_state(state)
        return function(z)


def _bound(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Callable[[], Any]:
    run: Callable[[], Any] = WholeLatents()(lambda: model(*args, **kwargs))
    return run


def _values(trace: poutine.Trace) -> dict[str, Tensor]:
    return {node["name"]: node["value"].detach() for node in latent_nodes(trace)}


def _plain(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in shapes.items()}


def _starting(init_loc_fn: Callable[..., Any]) -> Callable[[Any], Tensor]:
    def value(site: Any) -> Tensor:
        if is_enumerated(site) or site["fn"].support.is_discrete:
            drawn: Tensor = site["fn"].sample()
            return drawn
        try:
            started: Tensor = init_loc_fn(site)
        except NotImplementedError:  # an improper prior has no draws, and so no median
            started = _origin(site["fn"])
        return started

    return value


def _origin(fn: Any) -> Tensor:
    """The value of a distribution that is at zero on the unconstrained space."""
    bijection = biject_to(fn.support)
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    shape = bijection.inverse_shape(fn.shape())
    origin: Tensor = bijection(torch.zeros(shape, dtype=dtype, device=device))
    return origin


def _sample_nodes(trace: poutine.Trace) -> Iterator[Any]:
    return (node for node in trace.nodes.values() if node["type"] == "sample")


@contextmanager
def _quietly() -> Iterator[None]:
    with pyro.validation_enabled(False):
        yield
