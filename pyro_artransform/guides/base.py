# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The base of all guides: the model, coordinates from its prior, quantiles, copies and files."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import is_
from typing import Any, ClassVar, Literal, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions.conditional import ConditionalTransform
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Transform

from .._base import files
from .._base.arguments import asks_for_data, check_callable, check_integer
from .._base.files import FilePath
from ..model.coordinates.centering import CoordinatesArgument, check_coordinates, find_sites
from ..model.coordinates.coordinates import Coordinates
from ..model.density import Args, Kwargs, LogJoint
from ..model.sites import Latents
from ..posterior.summaries import check_levels, quantiles_of
from . import param_store
from .prototype import StartMessenger, is_hidden, prototype_trace

Guide = TypeVar("Guide", bound="BaseGuide")
Model = Callable[..., object]


class BaseGuide(AutoGuide):
    """A guide whose parameters are those of ``transform``, a module made at the first call.

    A subclass calls :meth:`_set_up_from` at the end of its set-up, and :meth:`_registered_transform` where it
    uses the parameters. These are also in Pyro's param store, under its name.
    """

    #: the user's functions and the model's density: deep copies share them, pickles drop them
    _functions: ClassVar[tuple[str, ...]] = ("_model", "_make_flow", "_density", "_last_call")
    _prototype_hide_fn = staticmethod(is_hidden)
    _num_quantile_draws = 10_000
    #: which values take precedence if the store has others under the guide's name: "new", the store's;
    #: "carried" (a copied or unpickled guide), its own; "settled", the store's if loaded since then
    _ownership: Literal["new", "carried", "settled"] = "new"
    _entries: Mapping[str, nn.Parameter] = {}  #: its entries in the store
    sample_posterior: Callable[..., dict[str, Tensor]]

    def __init__(
        self, model: Model, make_flow: Any, init_loc_fn: Model, coordinates: CoordinatesArgument
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
        # not AutoContinuous.__init__, which would wrap the model again
        AutoGuide.__init__(self, model)
        self.first_name: str = self._pyro_name  #: the name before any number
        self._make_flow, self._requested = make_flow, check_coordinates(coordinates)
        #: whether a fit may change lambda, in place
        self.chooses_coordinates = False
        #: whether chains may use other coordinates than the model's
        self.maps_priors = self._requested != "model"
        self._density: LogJoint | None = None
        self._last_call: Any = None  # its positional and keyword arguments
        self._use_model(model, init_loc_fn)

    def _build(self, latents: Latents, start: Tensor) -> nn.Module:
        """Makes the module with all parameters of the guide, of the dtype and the device of ``start``.

        :param start: where the guide starts, shape ``(latent_dim,)``: the initial values of the latents.
        """
        raise NotImplementedError

    # The model

    @property
    def model(self) -> Model:
        """The model; unpickled guides have none."""
        if self._model is None:
            raise RuntimeError(
                f"this {type(self).__name__} has no model, since pickle drops it: set guide.model = model"
            )
        return self._model[0]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "model":
            self._use_model(value)
        else:
            super().__setattr__(name, value)

    def _use_model(self, model: Model, init_loc_fn: Callable[..., Any] | None = None) -> None:
        """Stores a model in a tuple, since a module would otherwise become a submodule of the guide."""
        names = None if self.coordinates is None else self.coordinates.latents.sites.keys()
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
        found = self._known_coordinates()
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
            wanted = "the model's arguments, as in sample_posterior(n, *data)"
            of_prior = "coordinates from the prior, which may depend on the data"
            with asks_for_data(args, kwargs, f"expected {wanted}: this guide uses {of_prior}"):
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

    def _find_coordinates(self, args: Args, kwargs: Kwargs, depends: bool) -> dict[str, bool]:
        """The sites that are partially non-centred, and whether with the location of the prior."""
        return dict.fromkeys(self._mapped_sites(args, kwargs, depends), True)

    # Set-up

    def set_up(self, *args: object, **kwargs: object) -> None:
        """Runs the model to learn its latents, and builds the guide, like the first call."""
        if self.coordinates is None:
            with asks_for_data(args, kwargs, self._unknown):
                self._setup_prototype(*args, **kwargs)

    def _set_up_from(
        self,
        latents: Latents,
        with_location: Mapping[str, bool],
        start: Tensor,
        locate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Builds the guide at an initial point ``(latent_dim,)``, which ``locate`` maps to coordinates."""
        # a parameter made in inference mode cannot train
        with torch.inference_mode(False):
            start = start.detach().clone()
            found = Coordinates(latents, with_location, torch.ones_like(start))
            # what a property of this name keeps add_module from
            self._modules["coordinates"] = found
        try:
            of_build = start if locate is None or not with_location else locate(start)
            with torch.inference_mode(False):
                self.transform = self._build(latents, of_build.detach().clone())
        except BaseException:
            # the next call must not see a guide that is only half set up
            del self._modules["coordinates"]
            raise
        self.prototype_trace = prototype_trace(latents, start)
        self.chooses_coordinates = bool(with_location) and self._requested == "prior"
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

    def _known_coordinates(self) -> Coordinates:
        if self.coordinates is None:
            raise RuntimeError(self._unknown)
        found: Coordinates = self.coordinates
        return found

    def _zeros(self) -> Tensor:
        """Zeros of the shape, the dtype and the device of the latent vector."""
        return torch.zeros_like(self._known_coordinates().centered)

    def _registered_transform(self) -> Any:
        """``transform``, whose parameters are the param store's."""
        self._known_coordinates()
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
        if self.coordinates is not None:
            latents = Latents(site.to(fn) for site in self.coordinates.latents.sites.values())
            self.coordinates.latents = latents
            self.prototype_trace = prototype_trace(latents, self._zeros())
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Rejects parameters that are not finite, and any for a guide that was never called."""
        state = {k: value for k, value in state_dict.items() if k.startswith(prefix)}
        if self.coordinates is None and state:
            raise RuntimeError(f"{self._unknown}, before load or load_state_dict")
        _check_finite(state)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save(self, path: FilePath) -> None:
        """Writes the state dict to a file, as ``torch.save`` does; a failure keeps an existing file.

        :raises RuntimeError: if the guide was never called.
        :raises ValueError: if a parameter is not finite.
        """
        self._known_coordinates()
        self._register()
        state = self.state_dict()
        _check_finite(state)
        files.save(path, dict(state))

    def load(self, path: FilePath) -> None:
        """Reads the state dict that :meth:`save` wrote.

        The guide must be made for the same model with the same arguments and set up, as in ``guide =
        AutoIAF(model)``, ``guide.set_up(*data)``, ``guide.load(path)``. Only names and shapes of parameters
        are compared, so that a model with the same number of latents is not noticed.

        :raises RuntimeError: if the guide was never called, or its parameters have other names or shapes.
        :raises ValueError: if a parameter is not finite.
        """
        state = torch.load(path, map_location=self._zeros().device, weights_only=True)
        self.load_state_dict(state)

    # Pyro's param store

    def _register(self) -> None:
        param_store.register(self)

    def drop_orphans(self) -> None:
        """Before the first call, deletes parameters of dead guides of its name from Pyro's param store."""
        param_store.drop_orphans(self)

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        self.first_name = name


def _check_finite(state: Mapping[str, Any]) -> None:
    """Refuses a state dict with NaN or infinite entries."""
    for name, value in state.items():
        if torch.is_tensor(value) and value.is_floating_point() and not value.isfinite().all():
            bad = f"{int((~value.isfinite()).sum())} of {value.numel()} that are not"
            raise ValueError(f"parameter '{name}': expected finite numbers, got {bad}")
