# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit minimises: the negative ELBO, by the path gradient or by Pyro's own estimators."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import fmean, stdev
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ...joint import LogJoint
from ...joint.masked_latents import WholeLatents
from ...joint.plates import hidden_sites, plate_nesting
from ...joint.protocols import MinibatchGuide, ScaledSteps

Model = Callable[..., Any]


#: times the number of particles: tails need many draws, which cost less than as many steps
TAIL_PARTICLES = 8
_TAIL_WEIGHT = 2.0
_MAX_DEVIATION = 50.0


class Objective(Protocol):
    """The negative ELBO of a guide as a function of all parameters, the model's included."""

    #: whether :meth:`tail_loss` is there, and :meth:`elbo_draws` are log weights of single draws
    has_weights: bool

    def loss(self, num_particles: int) -> Tensor:
        """A differentiable estimate of the negative ELBO in nats, a scalar."""

    def tail_loss(self, num_particles: int) -> Tensor:
        """As :meth:`loss`, but with a gradient that takes care of the tails."""

    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters by name."""

    def step_units(self) -> dict[str, Tensor]:
        """What to multiply the steps of some parameters by, by name."""

    def elbo_draws(self, count: int, num_estimates: int = ...) -> Tensor:
        """Independent unbiased estimates of the ELBO, ``(n,)`` of them, from ``count`` draws.

        Where draws cannot be told apart, n is at most about ``num_estimates``.
        """

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Has other arguments of model and guide from now on, as those of another mini-batch."""

    def culprits(self) -> list[str]:
        """The sites that make the last loss other than finite, as far as it can be said."""


def offers_protocol(guide: Any) -> bool:
    """Whether a guide has the two methods by which a fit starts it and asks it for draws.

    :param guide: any guide.
    """
    return hasattr(guide, "start_at") and hasattr(guide, "rsample_and_log_prob")


class PathObjective:
    """The ELBO with the path gradient, which vanishes where the guide is the posterior.

    :param log_joint: the log joint density of the model.
    :param guide: a guide with ``rsample_and_log_prob``.

    **References**

    1. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
       (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194
    """

    def __init__(self, log_joint: LogJoint, guide: Any) -> None:
        self._of_any_batch = self._log_joint = log_joint
        self._guide = guide
        self._last = log_joint.start[None]

    has_weights = True

    def loss(self, num_particles: int) -> Tensor:
        return self._terms(num_particles).mean()

    def tail_loss(self, num_particles: int) -> Tensor:
        r"""As :meth:`loss`, but by the gradient of another divergence, that sees the tails better.

        Near the posterior the ELBO hardly notices a tail that is too light, of which there are few
        draws; k-hat does. With :math:`w = p / q`, every f-divergence :math:`E_q[f(w)]` has the path
        gradient of the ELBO with weights :math:`w^2 f''(w)`, which are one for the ELBO. These here
        are :math:`1 + \lambda \min(d^2, c)`, d the deviation of :math:`\log w` from its median in
        units of its spread. The minimum is the posterior all the same.

        **References**

        1. Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu,
           Maddison, 2019), https://arxiv.org/abs/1810.04152
        2. Variational Inference via chi Upper Bound Minimization (Dieng, Tran, Ranganath, Paisley,
           Blei, 2017), https://arxiv.org/abs/1611.00328
        """
        terms = self._terms(TAIL_PARTICLES * num_particles)
        deviation = (terms.detach() - terms.detach().median()).abs()
        spread = deviation.square().mean().sqrt() + torch.finfo(terms.dtype).tiny
        weights = 1 + _TAIL_WEIGHT * (deviation / spread).square().clamp(max=_MAX_DEVIATION)
        weighted = (weights * terms).mean()
        return terms.detach().mean() + (weighted - weighted.detach())

    def _terms(self, num_particles: int) -> Tensor:
        z, log_q = self._guide.rsample_and_log_prob(num_particles, path=True)
        self._last = z.detach()
        terms: Tensor = log_q - self._log_joint(z)
        return terms

    def parameters(self) -> dict[str, Tensor]:
        own = dict(self._guide.named_parameters()) if isinstance(self._guide, nn.Module) else {}
        seen = {id(parameter) for parameter in own.values()}
        with torch.no_grad():
            captured = _captured(lambda: self.loss(1))
        named = {f"guide.{name}": parameter for name, parameter in own.items()}
        others = {name: p for name, p in captured.items() if id(p) not in seen}
        return {**named, **others}

    def step_units(self) -> dict[str, Tensor]:
        scales = _step_scales(self._guide)
        own = self._guide.named_parameters() if scales else ()
        return {f"guide.{name}": scales[id(p)] for name, p in own if id(p) in scales}

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._log_joint = self._of_any_batch.at(args, kwargs)

    @torch.no_grad()
    def elbo_draws(self, count: int, num_estimates: int = 0) -> Tensor:
        z, log_q = self.draws(count)
        return self.log_density(z) - log_q

    @torch.no_grad()
    def draws(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws of the guide and their log-densities, shapes ``(n, latent_dim)`` and ``(n,)``."""
        found: tuple[Tensor, Tensor] = self._guide.rsample_and_log_prob(count)
        return found

    @torch.no_grad()
    def log_density(self, z: Tensor) -> Tensor:
        """The log joint density of draws, shape ``(n,)``."""
        return torch.cat([self._log_joint(chunk) for chunk in z.split(_CHUNK)])

    def culprits(self) -> list[str]:
        if not bool(self._last.isfinite().all()):
            return ["the guide's own draws"]
        return self._log_joint.culprits(self._last)


_CHUNK = 1024
_NUM_ESTIMATES = 32


class PyroObjective:
    """The ELBO by Pyro's estimators, for any guide.

    A guide that has a path gradient of its own, by an attribute ``path`` that is true or false, is
    asked for it.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param arguments: the positional and the keyword arguments of both.
    :param log_joint: the log joint density of the model.
    """

    def __init__(
        self,
        model: Model,
        guide: Model,
        arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
        log_joint: LogJoint,
    ) -> None:
        self._model, self._guide = WholeLatents()(model), guide
        self._arguments = arguments
        self._kind = TraceEnum_ELBO if log_joint.is_enumerated else Trace_ELBO
        with torch.no_grad():
            self._num_plates = plate_nesting(*self._traces())
        self._elbos: dict[int, Any] = {}
        #: by the name of a guide's parameter, its name in Pyro's store
        self._names: dict[int, str] = {}
        #: whether many particles are evaluated at once
        self.is_vectorized = True
        # particles are a plate
        self.is_vectorized = log_joint.way == "plate" and self._can_be_vectorized()

    has_weights = False

    def tail_loss(self, num_particles: int) -> Tensor:
        return self.loss(num_particles)

    def loss(self, num_particles: int) -> Tensor:
        args, kwargs = self._arguments
        elbo = self._elbo(num_particles)
        with _quietly(), _by_path(self._guide):
            loss: Tensor = elbo.differentiable_loss(self._model, self._guide, *args, **kwargs)
        return loss

    def parameters(self) -> dict[str, Tensor]:
        return _captured(lambda: self._value(1))

    def step_units(self) -> dict[str, Tensor]:
        scales = _step_scales(self._guide)
        if scales and not self._names:
            self._names = {id(p): name for name, p in self.parameters().items()}
        return {self._names[key]: unit for key, unit in scales.items() if key in self._names}

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._arguments = args, kwargs

    def elbo_draws(self, count: int, num_estimates: int = _NUM_ESTIMATES) -> Tensor:
        batch = max(count // num_estimates, 1)
        losses = [self._value(batch) for _ in range(max(count // batch, 1))]
        like = next(iter(self.parameters().values()))
        return -like.new_tensor(losses, dtype=torch.float64)

    @torch.no_grad()
    def culprits(self) -> list[str]:
        for _ in range(_NUM_LOOKS):
            found = [name for trace in self._traces() for name in _not_finite(trace)]
            if found:
                return found
        return []

    @torch.no_grad()
    def _value(self, num_particles: int) -> float:
        args, kwargs = self._arguments
        with _quietly():
            return float(self._elbo(num_particles).loss(self._model, self._guide, *args, **kwargs))

    def _elbo(self, num_particles: int) -> Any:
        if num_particles not in self._elbos:
            self._elbos[num_particles] = self._kind(
                num_particles=num_particles,
                vectorize_particles=self.is_vectorized and num_particles > 1,
                max_plate_nesting=self._num_plates,
            )
        return self._elbos[num_particles]

    def _traces(self) -> tuple[poutine.Trace, poutine.Trace]:
        """One run of the guide, and of the model at its draws."""
        args, kwargs = self._arguments
        with _quietly():
            guide_trace = poutine.trace(self._guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(self._model, trace=guide_trace)
            return guide_trace, poutine.trace(replayed).get_trace(*args, **kwargs)

    def _can_be_vectorized(self) -> bool:
        """Whether the mean over particles at once is that over particles in turn, but for noise."""
        with torch.random.fork_rng(devices=[]):
            try:
                at_once = [self._value(_NUM_CHECKED) for _ in range(_NUM_CHECKED)]
            except Exception:  # whatever a model raises for many particles says the same: not so
                return False
            finally:
                self._elbos.clear()
            self.is_vectorized = False
            in_turn = [self._value(_NUM_CHECKED) for _ in range(_NUM_CHECKED)]
            self._elbos.clear()
        return _are_alike(at_once, in_turn)


_NUM_CHECKED = 8
_NUM_LOOKS = 16


def _by_path(guide: Any) -> AbstractContextManager[None]:
    """The context of the path gradient, of a guide that has one."""
    return guide.path_gradient() if isinstance(guide, MinibatchGuide) else nullcontext()


def _step_scales(guide: Any) -> dict[int, Tensor]:
    """The scales of a guide's steps, by the ids of its parameters."""
    if isinstance(guide, ScaledSteps):
        return {id(parameter): scale for parameter, scale in guide.step_scales().items()}
    named = dict(guide.named_parameters()) if isinstance(guide, nn.Module) else {}
    return {id(named[name]): unit for name, unit in getattr(guide, "step_units", dict)().items()}


def _captured(run: Callable[[], Any]) -> dict[str, Tensor]:
    """The unconstrained parameters that a run asks Pyro for, by name."""
    with poutine.trace(param_only=True) as capture:
        run()
    nodes = capture.trace.nodes.items()
    named = {n: _leaf(node["value"]) for n, node in nodes if node["type"] == "param"}
    # a module's parameter may come by several names
    first = {id(value): name for name, value in reversed(named.items())}
    return {name: value for name, value in named.items() if first[id(value)] == name}


def _leaf(parameter: Any) -> Tensor:
    # those that a module keeps to itself are their own unconstrained values
    leaf: Tensor = parameter.unconstrained() if hasattr(parameter, "unconstrained") else parameter
    return leaf


def _are_alike(a: list[float], b: list[float]) -> bool:
    """Whether two lists of numbers have the same mean, but for noise and for what is not finite."""
    a, b = ([x for x in numbers if math.isfinite(x)] for numbers in (a, b))
    if len(a) < 2 or len(b) < 2:
        return True
    error = math.hypot(stdev(a) / math.sqrt(len(a)), stdev(b) / math.sqrt(len(b)))
    return abs(fmean(a) - fmean(b)) <= 10 * error + 1e-6 * abs(fmean(b)) + 1e-8


def _not_finite(trace: poutine.Trace) -> Iterator[str]:
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not hasattr(node["fn"], "log_prob"):
            continue
        if site_is_subsample(node):
            continue
        if not bool(node["fn"].log_prob(node["value"]).isfinite().all()):
            yield name


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Pyro's validation and its warnings of NaN: a fit counts and names what is not finite.

    The sites are hidden from handlers around the fit, the parameters not.
    """
    with hidden_sites(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered ")
        yield
