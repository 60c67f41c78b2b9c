# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How a guide is kept: in the param store, in copies, in state dicts and in files."""

import copy
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..initialization import StartingValues
from ..sites.packing import unconstrained_shape
from ..sites.records import latent_sites, slim_trace
from . import serialization as saving
from .param_store import Standing, claim

Guide = TypeVar("Guide", bound="KeptGuide")

# where a state dict has the location, whose size, dtype and device are those of the guide
_LOCATION = "transform.transforms.1.loc"


class KeptGuide(AutoContinuous):
    """An autoguide whose parameters survive.

    :param model: a Pyro model.
    :param init_loc_fn: the starting value of each site.
    """

    #: the name before any suffix
    first_name: str
    #: everything that follows from the latent sites and the starting point
    _finish: Callable[[poutine.Trace, Tensor], None]

    def __init__(self, model: Callable[..., Any], init_loc_fn: Callable[..., Any]) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.first_name = self._pyro_name
        self._standing = Standing.NEW
        self._make_flow: Callable[[int], nn.Module] | None = None
        self._arguments: dict[str, Any] = {}
        self._parts: Any = None
        self._flow_start: dict[str, Tensor] = {}
        #: the sites that had data at the set-up, if that is known
        self._observed: list[str] | None = None
        #: whether the latents are known to be the model's: not where a file says what they are
        self._met_model = True

    @property
    def model(self) -> Callable[..., Any]:
        """The model.

        :raises RuntimeError: if the guide came without one.
        """
        if self._model is None:
            name = type(self).__name__
            raise RuntimeError(
                f"this {name} has no model: pickle drops it, and load(path) had none. SVI and "
                f"Predictive take the model themselves; guide.model = model, or {name}.load(path, "
                "model), puts one into the guide"
            )
        return self._model[0]

    @model.setter
    def model(self, model: Callable[..., Any]) -> None:
        self._model = (InitMessenger(StartingValues(init_to_median))(model),)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            # a model that is a module would become a part of the guide
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _check_set_up(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                f"this {type(self).__name__} does not know the model's latents yet: call it, or "
                "set_up, with the model's arguments first"
            )

    # The param store

    def _start_claim(self) -> None:
        self._standing = Standing.NEW
        self._claim()

    def _claim(self) -> None:
        self._standing = claim(self, self._standing, register=bool(self._pyro_context.active))

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        self.first_name = name

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        _forget(self)
        # not that of Pyro's autoguides, which takes the model from the original too
        state = dict(PyroModule.__getstate__(self))
        return {**state, "_model": None, "_make_flow": None, "master": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._standing = Standing.CARRIED

    def __deepcopy__(self: Guide, memo: dict[int, Any]) -> Guide:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        # a parameter copied in inference mode could never train
        with torch.inference_mode(False):
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._model, twin._make_flow = self._model, self._make_flow
        return twin

    def _apply(self: Guide, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Guide:
        super()._apply(fn, recurse)
        self._flow_start = {name: fn(value) for name, value in self._flow_start.items()}
        if self.prototype_trace is not None:
            self.prototype_trace = slim_trace(self.prototype_trace, fn)
        return self

    # State dicts

    def get_extra_state(self) -> Tensor:
        """The latent sites as bytes, so that a state dict says what it is of.

        Empty where there are none yet, or where a support cannot be written.
        """
        try:
            return saving.plain_to_tensor(self._sites_to_plain())
        except ValueError:
            return saving.plain_to_tensor(None)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing: the sites are wanted before the parameters, and are read then."""

    def _sites_to_plain(self) -> list[dict[str, Any]] | None:
        trace = self.prototype_trace
        return None if trace is None else saving.sites_to_plain(trace)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # called with local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        saving.check_finite({k: v for k, v in state_dict.items() if k.startswith(prefix)})
        problem = self._meet(state_dict, prefix)
        if problem is not None:
            args[-1].append(problem)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _meet(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Builds a guide that was never called; returns what keeps it from loading, if anything."""
        text = state_dict.get(f"{prefix}_extra_state")
        sites = None if text is None else saving.tensor_to_plain(text)
        if self.prototype_trace is None:
            if sites is not None:
                self._restore(sites, state_dict, prefix)
            elif any(key.startswith(f"{prefix}transform.") for key in state_dict):
                return (
                    f"{type(self).__name__} was never called, so it has no parameters yet, and the "
                    "state dict does not say of which sites it is: call the guide with the model's "
                    "arguments first"
                )
            return None
        nodes = latent_sites(self.prototype_trace).items()
        expected = {name: tuple(site["value"].shape) for name, site in nodes}
        got = expected if sites is None else {s["name"]: tuple(s["shape"]) for s in sites}
        if expected != got:
            return f"the state dict is of a guide of other sites: expected {expected}, got {got}"
        return None

    def _restore(self, sites: list[dict[str, Any]], state: dict[str, Tensor], prefix: str) -> None:
        """What the set-up does, without the model."""
        loc = state[f"{prefix}{_LOCATION}"]
        prototype = saving.sites_from_plain(sites, loc)
        nodes = latent_sites(prototype)
        self._unconstrained_shapes = {k: unconstrained_shape(site) for k, site in nodes.items()}
        self._cond_indep_stacks = {k: site["cond_indep_stack"] for k, site in nodes.items()}
        stacks = self._cond_indep_stacks.values()
        self._prototype_frames = {frame.name: frame for stack in stacks for frame in stack}
        self._finish(prototype, torch.zeros_like(loc))
        self._standing = Standing.CARRIED
        self._met_model = False

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the guide to a file of tensors and plain data.

        :param path: where to.
        :raises RuntimeError: if the guide was never called.
        :raises ValueError: if a support or an argument cannot be written as plain data, or a
            parameter is not finite.
        """
        self._check_set_up()
        self._claim()
        sites = saving.plain_to_tensor(self._sites_to_plain())
        state = {**self.state_dict(), "_extra_state": sites}
        saving.check_finite(state)
        plain = self._arguments_to_plain()
        saving.write(path, type(self).__name__, plain, state, self._observed)

    @classmethod
    def load(
        cls: type[Guide],
        path: str | os.PathLike[str],
        model: Callable[..., Any] | None = None,
        *,
        map_location: Any = None,
        **arguments: Any,
    ) -> Guide:
        """Reads a guide from a file that :meth:`save` wrote.

        :param path: where from.
        :param model: the model, to train on. To draw and to score, none is needed. The first call
            of the guide checks that its latents are those of the file.
        :param map_location: as for ``torch.load``.
        :param arguments: arguments of the constructor that no file holds: ``flow``, where it is not
            a preset's own.
        :return: a guide that draws without the model and without data.
        :raises ValueError: if the file is none that :meth:`save` wrote, is of another class of
            guide, holds NaN, or is of another flow.
        """
        saved = saving.read(path, cls.__name__, map_location)
        known = cls._arguments_from_plain(saved["arguments"])
        guide = cls(_no_model if model is None else model, **{**known, **arguments})
        try:
            guide.load_state_dict(saved["state"])
        except RuntimeError as error:
            raise ValueError(f"{path}: expected a guide with this flow, got: {error}") from error
        guide._observed = saved["observed"]
        if model is None:
            guide._model = None
        return guide

    def _arguments_to_plain(self) -> dict[str, Any]:
        return dict(self._arguments)

    @classmethod
    def _arguments_from_plain(cls, plain: dict[str, Any]) -> dict[str, Any]:
        return plain


def _forget(guide: nn.Module) -> None:
    """Empties the caches of transforms from elsewhere: they hold graphs, which no copy can take."""
    for part in guide.modules():
        for key in list(vars(part)):
            if key.startswith("_cache") and key != "_cache_size":
                setattr(part, key, (None, None) if key == "_cached_x_y" else None)


def _no_model() -> None:
    """Stands for a model until the guide is loaded."""
