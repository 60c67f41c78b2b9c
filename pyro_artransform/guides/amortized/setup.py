# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How an amortised guide is set up by its model, and kept in copies, state dicts and files."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn

from . import encoder as encoding
from .factors import GlobalFactor, LocalFactor
from .layout import Frame, Layout, frames_of, layout, one_element, starting_points
from .legacy.initialization import KnownStartingValues
from .legacy.persistence import serialization as saving
from .legacy.persistence.param_store import Standing
from .legacy.persistence.persistent_guide import KeptGuide
from .legacy.sites import packing
from .legacy.sites.records import is_hidden, latent_sites, refuse_moving_structure
from .plates import GivenIndices, refuse_given_indices, run_frames, signature_of
from .posterior import Hierarchy

Guide = TypeVar("Guide", bound="KeptAmortized")

# arguments of other shapes come and go by batches: so many are remembered
_MOST_SIGNATURES = 64


class KeptAmortized(KeptGuide):
    """An amortised guide without its draws: what it knows of the model, and its parameters.

    :param model: a Pyro model.
    :param init_loc_fn: the starting value of each site.
    :param encoder: a function of the model's arguments, or None.
    :param create_plates: a function of the model's arguments, or None.
    """

    _prototype_hide_fn = staticmethod(is_hidden)  # type: ignore[assignment]

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any],
        encoder: Callable[..., Any] | None,
        create_plates: Callable[..., Any] | None,
    ) -> None:
        self._starting: KnownStartingValues | None = KnownStartingValues(init_loc_fn)
        super().__init__(model, self._starting)
        self.create_plates = create_plates
        self._had_plates = create_plates is not None
        # in a tuple, as the model is: its parameters become the guide's at the set-up
        self._encoder = (encoder,)
        self._make_local_flow: Callable[[int, int], Any] | None = None
        self._layout: Layout
        self._frames: dict[str, Frame] = {}
        self._frames_by_signature: dict[Any, dict[str, Frame]] = {}

    @property
    def model(self) -> Callable[..., Any]:
        """The model.

        :raises RuntimeError: if the guide came without one.
        """
        model: Callable[..., Any] = KeptGuide.model.__get__(self)
        return model

    @model.setter
    def model(self, model: Callable[..., Any]) -> None:
        self._starting = KnownStartingValues(init_to_median)
        self._know_sites()
        self._model = (InitMessenger(self._starting)(model),)

    @property
    def _parts(self) -> Hierarchy:
        """The factors; to read the attribute itself is a param statement."""
        self._check_set_up()
        hierarchy: Hierarchy = self._modules["transform"]  # type: ignore[assignment]
        return hierarchy

    @_parts.setter
    def _parts(self, nothing: None) -> None:
        """There is nothing to remember."""

    # Set-up

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """Runs the model, to learn its latents and plates, and builds the flows, unless that is done
        already.

        The first call of the guide does the same.

        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        rng_state, given = torch.get_rng_state(), GivenIndices()
        try:
            # not that of AutoContinuous, for which the latents of a mini-batch are all there are
            AutoGuide._setup_prototype(self, *args, **kwargs)
            trace = self.prototype_trace
            _refuse_no_locals(trace, type(self).__name__)
            self._observed = refuse_moving_structure(
                trace, lambda: given(self.model)(*args, **kwargs), rng_state
            )
            self._frames = frames_of(trace, latent_sites(trace))
            self._refuse_given(given.names, args, kwargs)
            # a parameter made in inference mode could never train
            with torch.inference_mode(False):
                self._learn(trace, args, kwargs)
        except BaseException:
            # half a prototype would pass for a whole one at the next call
            self.prototype_trace = None
            raise
        self._frames_by_signature = {signature_of((args, kwargs)): self._frames}
        self._start_claim()

    def _refuse_given(self, given: set[str], args: Any, kwargs: Any) -> None:
        if not given & self._frames.keys():
            return
        if self.master is not None:
            known = set(given) if self.master().create_plates is not None else set()
        else:
            with poutine.block():
                known = set(self._created_plates(args, kwargs))
        refuse_given_indices(given, self._frames, known)

    def _created_plates(self, args: Any, kwargs: Any) -> dict[str, pyro.plate]:
        """The plates of ``create_plates`` by name."""
        if self.create_plates is None:
            if self._had_plates:
                raise RuntimeError(
                    f"this {type(self).__name__} has no create_plates: pickle drops it. "
                    "guide.create_plates = create_plates puts it into the guide"
                )
            return {}
        plates = self.create_plates(*args, **kwargs)
        plates = [plates] if isinstance(plates, pyro.plate) else list(plates)
        for plate in plates:
            if not isinstance(plate, pyro.plate):
                raise TypeError(
                    "create_plates: expected it to return a pyro.plate or several, got "
                    f"{type(plate).__name__}"
                )
        return {plate.name: plate for plate in plates}

    def _learn(self, trace: poutine.Trace, args: Any, kwargs: Any) -> None:
        """Everything that follows from the first run of the model, and of the encoder."""
        prototype = one_element(trace)
        sorted_ = layout(prototype)
        starts = starting_points(trace, sorted_.groups)
        features = self._first_features(sorted_, args, kwargs)
        feature_dims = {name: value.shape[-1] for name, value in features.items()}
        full_sizes = {name: frame.full_size for name, frame in self._frames.items()}
        tables = {
            group.name: (*group.batch_shape(full_sizes), self._arguments["embedding_dim"])
            for group in sorted_.groups
            if group.name not in features
        }
        loc = _start_of_globals(trace, sorted_)
        self._build(sorted_, loc, starts, feature_dims, tables)
        self.prototype_trace = prototype

    def _first_features(self, sorted_: Layout, args: Any, kwargs: Any) -> encoding.Features:
        (encoder,) = self._encoder
        if encoder is None:
            return {}
        with poutine.block():
            plates = {
                name: pyro.plate(name, f.full_size, subsample_size=f.size, dim=f.dim)
                for name, f in self._frames.items()
            }
        found = encoding.encode_registered(encoder, plates, args, kwargs)
        return encoding.features_by_group(found, sorted_.groups)

    def _build(
        self,
        sorted_: Layout,
        loc: Tensor | None,
        starts: Mapping[str, Tensor],
        feature_dims: Mapping[str, int],
        tables: Mapping[str, tuple[int, ...]],
    ) -> None:
        """The factors.

        :param sorted_: the layout of the latents.
        :param loc: where the globals start.
        :param starts: where the elements of each group start.
        :param feature_dims: the number of features of each group that has an encoder.
        :param tables: the shape of the features of all elements of each other group.
        """
        scale, locals_ = self._arguments["init_scale"], []
        globals_ = None if loc is None else GlobalFactor(self._make_flow, loc, scale)
        seen = 0 if globals_ is None else globals_.context_dim
        dims = {group.name: group.latent_dim for group in sorted_.groups}
        for group in sorted_.groups:
            rest_dim = seen + sum(dims[name] for name in group.parents)
            *table_shape, feature_dim = tables.get(group.name, (feature_dims.get(group.name, 0),))
            factor = LocalFactor(
                self._make_local_flow,
                starts[group.name],
                scale,
                feature_dim,
                rest_dim,
                table_shape or None,
            )
            locals_.append(factor)
        (encoder,) = self._encoder
        module = encoder if isinstance(encoder, nn.Module) else None
        self.transform = Hierarchy(globals_, locals_, module)
        self._layout = sorted_
        self._know_sites(sorted_)

    def _know_sites(self, sorted_: Layout | None = None) -> None:
        sorted_ = sorted_ or self.__dict__.get("_layout")
        if sorted_ is not None and self._starting is not None:
            names = {name for group in sorted_.groups for name in group.sites}
            self._starting.known = frozenset(names | set(sorted_.globals.nodes))

    # Plates for other arguments

    def _frames_for(self, args: Any, kwargs: Any) -> dict[str, Frame]:
        """The frames of the plates for these arguments: the model is run where they are new."""
        if self._model is None or torch._C._get_tracing_state():
            return self._frames
        signature = signature_of((args, kwargs))
        if signature not in self._frames_by_signature:
            self._frames, given = run_frames(
                self.prototype_trace,
                self._frames,
                lambda: self.model(*args, **kwargs),
                None if self._met_model else self._observed or (),
            )
            self._met_model = True
            self._refuse_given(given, args, kwargs)
            if len(self._frames_by_signature) >= _MOST_SIGNATURES:
                self._frames_by_signature.clear()
            self._frames_by_signature[signature] = self._frames
        self._frames = self._frames_by_signature[signature]
        return self._frames

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_make_local_flow": None, "create_plates": None, "_starting": None}

    def __deepcopy__(self: Guide, memo: dict[int, Any]) -> Guide:
        twin: Guide = super().__deepcopy__(memo)
        twin._make_local_flow, twin.create_plates = self._make_local_flow, self.create_plates
        twin._starting = self._starting
        return twin

    def _apply(self: Guide, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Guide:
        super()._apply(fn, recurse)
        if self.prototype_trace is not None:
            self._layout = layout(self.prototype_trace)
        return self

    def _restore(self, sites: list[dict[str, Any]], state: dict[str, Tensor], prefix: str) -> None:
        """What the set-up does, without the model."""
        prefix = f"{prefix}transform."
        like = state[f"{prefix}locals.0.affine.loc"]
        prototype = saving.sites_from_plain(sites, like)
        sorted_ = layout(prototype)
        num_globals = sum(z.shape[-1] for z in _flat(sorted_, like))
        loc = like.new_zeros(num_globals) if num_globals else None
        starts = {group.name: like.new_zeros(group.latent_dim) for group in sorted_.groups}
        feature_dims, tables = {}, {}
        for k, group in enumerate(sorted_.groups):
            table = state.get(f"{prefix}locals.{k}.table")
            if table is not None:
                columns = table.shape[-1] - 2 * group.latent_dim
                tables[group.name] = (*table.shape[:-1], columns)
                continue
            context_dim = state[f"{prefix}locals.{k}.affine.linear.weight"].shape[-1]
            summary = state.get(f"{prefix}globals.summary.weight")
            seen = num_globals if summary is None else len(summary)
            dims = {other.name: other.latent_dim for other in sorted_.groups}
            feature_dims[group.name] = context_dim - seen - sum(dims[p] for p in group.parents)
            if self._encoder[0] is None:
                raise ValueError(
                    f"the guide had an encoder for plate '{group.name}', which no file or state "
                    f"dict holds: expected {type(self).__name__}(..., encoder=...) with one, got none"
                )
        self._build(sorted_, loc, starts, feature_dims, tables)
        self.prototype_trace = prototype
        self._frames = self._prototype_frames = frames_of(prototype, latent_sites(prototype))
        self._frames_by_signature = {}
        self._standing = Standing.CARRIED
        self._met_model = False


def _flat(sorted_: Layout, like: Tensor) -> list[Tensor]:
    sites = latent_sites(sorted_.globals).values()
    return [like.new_empty(packing.unconstrained_shape(site).numel()) for site in sites]


def _start_of_globals(trace: poutine.Trace, sorted_: Layout) -> Tensor | None:
    """The unconstrained starting values of the globals, None if there are none."""
    sites = latent_sites(sorted_.globals)
    if not sites:
        return None
    values = {name: site["value"].detach() for name, site in latent_sites(trace).items()}
    latent, _ = packing.unconstrain(sorted_.globals, {name: values[name] for name in sites})
    for site, z in packing.split(sorted_.globals, latent):
        if not z.isfinite().all():
            raise ValueError(
                f"site '{site['name']}': expected a starting value inside its support, got "
                f"{values[site['name']].tolist()}"
            )
    return latent


def _refuse_no_locals(trace: poutine.Trace, name: str) -> None:
    sites = latent_sites(trace)
    for site in sites.values():
        for frame in site["cond_indep_stack"]:
            if frame.full_size is None or frame.full_size < 1:
                raise ValueError(
                    f"site '{site['name']}' is in plate '{frame.name}', which has no size: expected "
                    "pyro.plate(name, size)"
                )
    if not any(site["cond_indep_stack"] for site in sites.values()):
        raise ValueError(
            f"{name}: the model has no latents in a plate, of which each element would get a "
            f"distribution of its own: its latents are {sorted(sites)}. AutoIAF is the guide of "
            "such a model"
        )
