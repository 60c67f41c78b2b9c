# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Guides that persist in the param store, copies, state dicts and files."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from torch import Tensor
from torch.distributions import Transform

from ..._base import files
from ..._base.arguments import asks_for_data, check_callable, check_integer
from ..._base.files import FilePath
from ...model.coordinates.centering import CoordinatesArgument, check_coordinates, find_sites
from ...model.coordinates.coordinates import Coordinates
from ...model.density import Args, Kwargs, LogJoint
from ...posterior.summaries import check_levels, quantiles_of
from ..prototype import StartMessenger, Traces, is_hidden, prototype_trace
from .param_store import RegisteredGuide
from .spec import Arguments, GuideSpec, State, check_finite, check_size

Guide = TypeVar("Guide", bound="PersistentGuide")
Model = Callable[..., object]

_KIND = "a guide of class {}, format 9"


class PersistentGuide(RegisteredGuide):
    """An autoguide built from a :class:`~pyro_artransform.guides.persistence.spec.GuideSpec`.

    A subclass calls :meth:`_set_up_from` at the end of its set-up, and :meth:`_registered_transform` where
    it uses the parameters of ``transform``.
    """

    #: the user's functions and the model's density: deep copies share them, pickles drop them
    _functions: ClassVar[tuple[str, ...]] = ("_model", "_make_flow", "_density", "_last_call")
    #: arguments in a spec that are not constructor arguments
    _found_arguments: ClassVar[tuple[str, ...]] = ("coordinates", "chooses_coordinates")
    _prototype_hide_fn = staticmethod(is_hidden)
    _num_quantile_draws = 10_000
    _make_flow: Any  #: makes the flow or flows
    _traces: Traces | None = None  # two runs of the model, during set-up only
    #: makes ``transform`` from a spec and an initial point ``(latent_dim,)``
    _build: Callable[..., None]
    #: lower bound on the elements of a spec's state dict, checked before a guide is built from a file
    _least_numbers: Callable[[GuideSpec], int]
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
        self._arguments, self._requested = arguments, check_coordinates(coordinates)
        self._density: LogJoint | None = None
        self._last_call: Any = None  # its positional and keyword arguments
        self._spec: GuideSpec | None = None
        #: whether latents were compared with the model's, not only read from a file
        self._model_is_checked = True
        self._use_model(model, init_loc_fn)

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

    @property
    def chooses_coordinates(self) -> bool:
        """Whether a fit may change lambda, in place."""
        return bool(self._spec and self._spec.arguments.get("chooses_coordinates"))

    @property
    def maps_priors(self) -> bool:
        """Whether chains may use other coordinates than the model's: not with ``coordinates="model"``."""
        return self._spec is None or self._spec.arguments.get("coordinates") != {}

    def _log_joint(self, *args: object, **kwargs: object) -> LogJoint:
        """The log density of the model, run without effects on outer handlers or the random state."""
        self.model  # noqa: B018 (raises where there is none)
        with torch.random.fork_rng(devices=[]), poutine.block():
            start, traces = self._model[2], self._traces
            return LogJoint(self._model[1], args, kwargs, init_loc_fn=start, traces=traces)

    def log_joint_of(self, model: object, args: Args, kwargs: Kwargs) -> LogJoint | None:
        """The log joint density at these arguments; None for another model than the guide's."""
        known = self._density
        return (
            None
            if known is None or known.model is not model
            else known.with_arguments(args, kwargs)
        )

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
            self._last_call = args, kwargs
        elif args or kwargs:
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

    def set_up(self, *args: object, **kwargs: object) -> None:
        """Runs the model to learn its latents, and builds the flows, like the first call."""
        if self._spec is None:
            with asks_for_data(args, kwargs, self._unknown):
                self._setup_prototype(*args, **kwargs)

    def _resolved_arguments(self, latent_dim: int) -> Arguments:
        """Constructor arguments, with defaults, that take precedence over those of a file."""
        return {}

    def _flow_maker(self) -> Any:
        if self._make_flow is None:
            raise RuntimeError(
                "this guide was pickled before its first call, without its flow: call it once before "
                "pickling it, or make a new one"
            )
        return self._make_flow

    def _set_up_from(self, spec: GuideSpec, start: Tensor) -> None:
        """Builds the guide at an initial point ``(latent_dim,)``."""
        # a parameter made in inference mode cannot train
        with torch.inference_mode(False):
            start = start.detach().clone()
            self._build(spec, start)
            with_location = spec.arguments.get("coordinates") or {}
            # what a property of this name keeps add_module from
            self._modules["coordinates"] = Coordinates(
                spec.latents, with_location, torch.ones_like(start)
            )
            self._spec, self.prototype_trace = spec, prototype_trace(spec.latents, start)
        if self._model is not None:
            # from now on, other latents of the model are predictions
            self._use_model(*self._model[1:])

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
        if self._spec is not None:
            spec = self._spec = self._spec.to(fn)
            self.coordinates.latents = spec.latents
            self.prototype_trace = prototype_trace(spec.latents, spec.zeros())
        return self

    def get_extra_state(self) -> Tensor:
        """The spec as bytes; empty before the first call, or if a support cannot be serialized."""
        text = ""
        if self._spec is not None:
            # functions come from the constructor, not from a state dict
            known = {k: v for k, v in self._spec.arguments.items() if not callable(v)}
            with suppress(ValueError):
                text = replace(self._spec, arguments=known).to_json()
        return _as_tensor(text)

    def set_extra_state(self, state: Tensor) -> None:
        """Does nothing, as the spec is read before the parameters."""

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        """Extends torch's method to guides never called; rejects the state of another guide."""
        state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        text = bytes(state.pop("_extra_state", _as_tensor("")).tolist()).decode()
        check_finite(state)
        if text:
            spec = GuideSpec.from_json(text, next(value.device for value in state.values()))
            if self._spec is None:  # the guide's arguments take precedence over the state's
                arguments = spec.arguments | self._resolved_arguments(spec.latents.latent_dim)
                built = replace(spec, arguments=arguments)
                check_size(state, self._least_numbers(built))
                self._set_up_from(built, built.zeros())
                self._ownership, self._model_is_checked = "carried", False
            both = self._checked_spec().sites, spec.sites
            expected, got = ({site.name: tuple(site.shape) for site in sites} for sites in both)
            if expected != got:
                message = f"expected {expected}, got {got}"
                raise RuntimeError(f"the state dict belongs to a guide with other sites: {message}")
        elif self._spec is None and state:
            raise RuntimeError(
                f"{type(self).__name__} was never called, so it has no parameters yet, and the state "
                "dict does not name its sites: call the guide with the model's arguments first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Files

    def save(self, path: FilePath) -> None:
        """Writes the guide to a file of tensors and plain data; a failure keeps an existing file.

        :raises RuntimeError: if the guide was never called.
        :raises ValueError: if a support or argument is not plain data, or a parameter is not finite.
        """
        spec = self._checked_spec().to_json()
        self._register()
        # an expanded tensor declares more elements than the file would hold
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        del state["_extra_state"]
        check_finite(state)
        files.write(path, _KIND.format(type(self).__name__), {"spec": spec, "state": state})

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
        if held := arguments.keys() & {*cls._found_arguments}:
            raise ValueError(f"{held.pop()}: expected none, as the file holds those of the guide")
        saved = files.read(path, _KIND.format(cls.__name__), map_location)
        try:
            known = GuideSpec.from_json(saved["spec"], torch.device("cpu")).arguments
            known = {key: v for key, v in known.items() if key not in cls._found_arguments}
            guide = cls((lambda: None) if model is None else model, **{**known, **arguments})
            guide.load_state_dict({**saved["state"], "_extra_state": _as_tensor(saved["spec"])})
        except Exception as error:
            wanted = "what the guide's save writes, and the guide's flow"
            raise ValueError(f"{path}: expected {wanted}, got: {error}") from error
        if model is None:
            guide._model = None
        return guide


def _as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")
