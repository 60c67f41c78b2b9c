# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The base of all guides, built for the latents of a model: copies, coordinates of the prior, quantiles."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any, ClassVar, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions.conditional import ConditionalTransform
from pyro.infer.autoguide import init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Transform

from .._base.arguments import asks_for_data, check_callable, check_integer
from .._base.files import FilePath
from ..model.coordinates.centering import CoordinatesArgument, check_coordinates, find_sites
from ..model.coordinates.coordinates import Coordinates
from ..model.density import Args, Kwargs, LogJoint
from ..model.sites import Latents
from ..posterior.summaries import check_levels, quantiles_of
from .persistence import guide_files
from .persistence.param_store import RegisteredGuide
from .persistence.spec import Arguments, GuideSpec, State, check_finite
from .prototype import StartMessenger, Traces, is_hidden, prototype_trace

Guide = TypeVar("Guide", bound="BaseGuide")
Model = Callable[..., object]


class BaseGuide(RegisteredGuide):
    """A guide whose parameters are those of ``transform``, the module that :meth:`build` returns.

    :class:`~pyro_artransform.guides.unconstrained.UnconstrainedGuide` draws all latents as one vector. A
    subclass calls :meth:`_set_up_from` at the end of its set-up, and :meth:`_registered_transform` where it
    uses the parameters.

    :param arguments: the constructor arguments that files hold.
    """

    #: the user's functions and the model's density: deep copies share them, pickles drop them
    _functions: ClassVar[tuple[str, ...]] = ("_model", "_make_flow", "_density", "_last_call")
    #: those of ``arguments`` that are not constructor arguments
    _found_arguments: ClassVar[tuple[str, ...]] = ("coordinates", "chooses_coordinates")
    _prototype_hide_fn = staticmethod(is_hidden)
    _num_quantile_draws = 10_000
    _make_flow: Any = None  #: makes the flow or flows
    _traces: Traces | None = None  # two runs of the model, during set-up only
    sample_posterior: Callable[..., dict[str, Tensor]]

    def __init__(
        self,
        model: Model,
        init_loc_fn: Model,
        arguments: Arguments,
        coordinates: CoordinatesArgument,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if isinstance(model, (Transform, ConditionalTransform)):
            raise TypeError(
                "model: expected a Pyro model, a callable with sample statements, got the transform "
                f"{type(model).__name__}; a flow goes into AutoAutoregressive(model, flow=...), as a "
                "callable that takes the latent dimension and returns it"
            )
        check_callable("init_loc_fn", init_loc_fn)
        RegisteredGuide.__init__(self, model)
        #: the constructor's arguments, and what set-up found out about the model
        self.arguments, self._requested = arguments, check_coordinates(coordinates)
        #: whether a fit may change lambda, in place
        self.chooses_coordinates = False
        #: whether chains may use other coordinates than the model's
        self.maps_priors = self._requested != "model"
        self._density: LogJoint | None = None
        self._last_call: Any = None  # its positional and keyword arguments
        self._spec: GuideSpec | None = None
        #: whether latents were compared with the model's, not only read from a file
        self._model_is_checked = True
        self._use_model(model, init_loc_fn)

    def build(self, latents: Latents, start: Tensor) -> nn.Module:
        """Makes the module with all parameters of the guide, for the latents of its model.

        It has the dtype and the device of ``start``, and follows from the latents and from ``arguments``, in
        which it may replace defaults: a loaded guide is built from these, without the model.

        :param start: where the guide starts, shape ``(latent_dim,)``: the initial values of the latents.
        """
        raise NotImplementedError(f"{type(self).__name__} has no build(latents, start)")

    # The model

    @property
    def model(self) -> Model:
        """The model; unpickled guides, and guides loaded without a model, have none."""
        if self._model is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no model, since pickle and load(path) drop it: set "
                f"guide.model = model, or use {type(self).__name__}.load(path, model)"
            )
        return self._model[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            self._use_model(value)
        else:
            super().__setattr__(name, value)

    def _use_model(self, model: Model, init_loc_fn: Callable[..., Any] | None = None) -> None:
        """Stores a model in a tuple, since a module would otherwise become a submodule of the guide."""
        names = None if self._spec is None else self._spec.latents.sites.keys()
        known = vars(self).get("_model")
        init_loc_fn = init_loc_fn or (known[2] if known else init_to_median)
        self._model = StartMessenger(init_loc_fn, names)(model), model, init_loc_fn

    # Coordinates from the model's prior

    @property
    def coordinates(self) -> Any:
        """How latents are expressed, :class:`Coordinates`; None before the first call."""
        return self._modules.get("coordinates")

    @property
    def prior_coordinates(self) -> Coordinates | None:
        """The coordinates in which fits work; None for the unconstrained space."""
        self._checked_spec()
        found: Coordinates = self.coordinates
        return found if found.with_location else None

    def _log_joint(self, *args: object, **kwargs: object) -> LogJoint:
        """The log density of the model, run without effects on outer handlers or the random state."""
        self.model  # noqa: B018 (raises where there is none)
        with torch.random.fork_rng(devices=[]), poutine.block():
            start = self._model[2]
            return LogJoint(self._model[1], args, kwargs, init_loc_fn=start)

    def log_joint_of(self, model: object, args: Args, kwargs: Kwargs) -> LogJoint | None:
        """The log joint density at these arguments; None for another model than the guide's."""
        known = self._density
        if known is None or known.model is not model:
            return None
        return known.with_arguments(args, kwargs)

    def _bind(self, args: Args, kwargs: Kwargs) -> LogJoint:
        """The log density of the model, and the arguments to use, by default those of the last call."""
        model = self._model and self._model[1]
        if self._density is None or self._density.model is not model:
            wanted = "the model's arguments with the first call, as in sample_posterior(n, *data)"
            of_file = (
                "coordinates from the prior, which may depend on the data that no file contains"
            )
            with asks_for_data(args, kwargs, f"expected {wanted}: this guide uses {of_file}"):
                self._density = self._log_joint(*args, **kwargs)
        elif not (args or kwargs):
            return self._density
        self._last_call = args, kwargs
        return self._density

    def mapped_density(self, args: Args = (), kwargs: Kwargs | None = None) -> LogJoint:
        """The log density in the guide's coordinates, by default at the arguments of the last call."""
        bound = self._bind(args, kwargs or {}).bound_to(*self._last_call)
        return bound.with_coordinates(self.prior_coordinates)

    def _run_of_model(self, args: Args, kwargs: Kwargs) -> Callable[[], object] | None:
        """The model at its arguments, for partially non-centred latents; None without such."""
        if self.coordinates.is_identity:
            return None
        model = self._bind(args, kwargs).model
        args, kwargs = self._last_call
        return partial(model, *args, **kwargs)

    def _mapped_sites(self, args: Args, kwargs: Kwargs, depends: bool) -> dict[str, bool]:
        """See :func:`find_sites`; empty if no prior was seen to depend on other latents."""
        requested = self._requested
        if requested == "model" or not (depends or isinstance(requested, Mapping)):
            return {}
        self._density = None  # left by a failed set-up
        return find_sites(self._bind(args, kwargs), requested)

    def _coordinate_arguments(self, with_location: dict[str, bool]) -> Arguments:
        """The arguments of the specification that describe coordinates."""
        if not (with_location or self._requested == "model"):
            return {}
        chooses = self._requested == "prior"
        return {"coordinates": with_location, "chooses_coordinates": chooses}

    def _found_in_model(self, args: Args, kwargs: Kwargs, depends: bool) -> Arguments:
        """Arguments of the specification that follow from the model's density."""
        return self._coordinate_arguments(
            dict.fromkeys(self._mapped_sites(args, kwargs, depends), True)
        )

    # Set-up

    def set_up(self, *args: object, **kwargs: object) -> None:
        """Runs the model to learn its latents, and builds the guide, like the first call."""
        if self._spec is None:
            with asks_for_data(args, kwargs, self._unknown):
                self._setup_prototype(*args, **kwargs)

    def _set_up_from(
        self, spec: GuideSpec, start: Tensor, locate: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Builds the guide at an initial point ``(latent_dim,)``, which ``locate`` maps to coordinates."""
        # a parameter made in inference mode cannot train
        with torch.inference_mode(False):
            start = start.detach().clone()
            with_location = spec.arguments.get("coordinates") or {}
            found = Coordinates(spec.latents, with_location, torch.ones_like(start))
            # what a property of this name keeps add_module from
            self._modules["coordinates"] = found
        of_build = start if locate is None or not found.with_location else locate(start)
        with torch.inference_mode(False):
            self.arguments = spec.arguments
            self.transform = self.build(spec.latents, of_build.detach().clone())
            self.chooses_coordinates = bool(spec.arguments.get("chooses_coordinates"))
            self.maps_priors = spec.arguments.get("coordinates") != {}
            self._spec, self.prototype_trace = spec, prototype_trace(spec.latents, start)
        if self._model is not None:
            # from now on, other latents of the model are predictions
            self._use_model(*self._model[1:])

    def _flow_maker(self) -> Any:
        if self._make_flow is None:
            raise RuntimeError(
                "this guide was pickled before its first call, without its flow: call it once before "
                "pickling it, or make a new one"
            )
        return self._make_flow

    @property
    def _unknown(self) -> str:
        return (
            f"this {type(self).__name__} does not know the model's latents yet: call it, or "
            "set_up, with the model's arguments first"
        )

    def _checked_spec(self) -> GuideSpec:
        if self._spec is None:
            raise RuntimeError(self._unknown)
        return self._spec

    def _registered_transform(self) -> Any:
        """``transform``, whose parameters are the param store's."""
        if self._spec is None:
            raise RuntimeError(self._unknown)
        entries, stored = self._entries, pyro.get_param_store()._params
        # otherwise the store was neither cleared nor loaded; reading store[key] applies transforms
        if not entries or not all(map(is_, map(stored.get, entries), entries.values())):
            self._register()
        return self.transform  # a param statement, as each access of the attribute is

    # Summaries

    @torch.no_grad()
    def quantiles(
        self,
        quantiles: Sequence[float] | Tensor,
        *args: object,
        num_samples: int | None = None,
        **kwargs: object,
    ) -> dict[str, Tensor]:
        """Quantiles of each coordinate of each site, from draws that are all held in memory.

        :param quantiles: q levels between 0 and 1.
        :param num_samples: the number of draws; by default 10,000, and 2,000 for an amortized guide.
        :return: for each site a tensor of shape ``(q,) + site shape``.
        """
        self.set_up(*args, **kwargs)
        levels = check_levels("quantiles", quantiles)
        n = self._num_quantile_draws if num_samples is None else num_samples
        draws = self.sample_posterior(check_integer("num_samples", n), *args, **kwargs)
        return {name: quantiles_of(value, levels) for name, value in draws.items()}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each coordinate of each site, by :meth:`quantiles`."""
        found = self.quantiles([0.5], *args, **kwargs)
        return {name: value[0] for name, value in found.items()}

    # Copies and files

    def __getstate__(self) -> dict[str, Any]:
        for part in self.modules():
            # caches of foreign transforms may hold graphs, which cannot be copied
            for key in list(vars(part)):
                if key.startswith("_cache") and key != "_cache_size":
                    setattr(part, key, (None, None) if key == "_cached_x_y" else None)
        # not AutoGuide's method, which would remove the model from the original, too
        state = dict(PyroModule.__getstate__(self))
        return {**state, **dict.fromkeys(self._functions), "master": None, "_entries": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ownership = "carried"

    def __deepcopy__(self: Guide, memo: dict[int, Any]) -> Guide:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        # a parameter copied in inference mode cannot train
        with torch.inference_mode(False):
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for name in self._functions:
            setattr(twin, name, getattr(self, name))
        return twin

    def _apply(self: Guide, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Guide:
        super()._apply(fn, recurse)
        self._entries = {}
        if self._spec is not None:
            spec = self._spec = self._spec.to(fn)
            self.coordinates.latents = spec.latents
            self.prototype_trace = prototype_trace(spec.latents, spec.zeros())
        return self

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        """Rejects parameters that are not finite, and any for a guide that was never called."""
        state = {k: value for k, value in state_dict.items() if k.startswith(prefix)}
        if self._spec is None and state:
            raise RuntimeError(
                f"{self._unknown}, before load_state_dict; or use save and load, which need no call"
            )
        check_finite(state)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save(self, path: FilePath) -> None:
        """Writes the guide to a file of tensors and plain data; a failure keeps an existing file.

        :raises RuntimeError: if the guide was never called.
        :raises ValueError: if a support or argument is not plain data, or a parameter is not finite.
        """
        guide_files.save(self, path)

    @classmethod
    def load(
        cls: type[Guide],
        path: FilePath,
        model: Model | None = None,
        *,
        map_location: Any = None,
        **arguments: Any,
    ) -> Guide:
        """Reads a guide from a file that :meth:`save` wrote.

        :param model: the model, for further training; draws and densities need it if the guide has
            coordinates from its prior, at first with its data. The first call compares its latents with the
            file's.
        :param map_location: as for ``torch.load``.
        :param arguments: constructor arguments that files do not hold: ``flow`` of ``AutoAutoregressive``,
            and ``encoder`` and ``create_plates`` of ``AutoAmortized``.
        :raises ValueError: if the file was not written by :meth:`save`, is damaged, has another class of
            guide, holds NaN, needs a flow that was not passed, or another one; if ``coordinates`` are passed.
        """
        return guide_files.load(cls, path, model, map_location, arguments)

    def _restore(self, spec: GuideSpec, state: State) -> None:
        """Builds the guide that a file describes; the constructor's arguments take precedence."""
        spec = replace(spec, arguments=spec.arguments | self.arguments)
        self._set_up_from(spec, spec.zeros())
        self._ownership, self._model_is_checked = "carried", False
        self.load_state_dict(state)
