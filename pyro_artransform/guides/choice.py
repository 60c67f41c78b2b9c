# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The choice of a guide for a model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pyro.infer.autoguide.initialization import InitMessenger, init_to_median

from ..model.sites import Latents, initial_value
from ..model.traces import subsampled_plates
from .amortized.amortized_guide import AutoAmortized
from .base import BaseGuide
from .mixture import MixtureGuide
from .presets import AutoIAF
from .prototype import one_more_run
from .structured.structured_guide import AutoStructuredFlow

# On volatility paths AutoIAF is better by 0.01 nats at 43 latents, and worse and slower at 83.
_MOST_FOR_IAF = 50


def choose_guide(
    model: Callable[..., object],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    is_minibatch: bool = False,
    has_elements: bool = False,
) -> tuple[BaseGuide, str]:
    """Makes a guide for a model, and says why it is of this class.

    Chooses ``AutoAmortized`` if latents are in a subsampled plate, which no other guide supports;
    ``AutoIAF`` for few latents, and for subsampled data, since a mini-batch may lack dependencies of the
    posterior; ``AutoStructuredFlow`` for many latents, also with mini-batches if it is
    known which elements of plates depend on each other.

    :param is_minibatch: whether the arguments are one of many mini-batches.
    :param has_elements: whether it is known which elements of plates their rows read.
    :raises ValueError: if there are no latents, or discrete ones that are not enumerated.
    """
    # at the initial values of guides, since prior draws may be extreme or impossible
    start = InitMessenger(partial(initial_value, init_to_median))
    trace = one_more_run(partial(start(model), *args, **(kwargs or {})))
    latents = Latents.from_trace(trace)
    parts = {plate.name for plate in subsampled_plates(trace)}
    count = "1 latent" if latents.latent_dim == 1 else f"{latents.latent_dim} latents"
    for site in latents.sites.values():
        for plate in site.plates:
            if plate.name in parts:
                return AutoAmortized(model), f"for latents in the subsampled plate '{plate.name}'"
    if has_elements and latents.latent_dim > _MOST_FOR_IAF:
        return AutoStructuredFlow(model), f"for {count} and subsampled data"
    if parts or is_minibatch:
        return AutoIAF(model), f"for {count} and subsampled data"
    is_small = latents.latent_dim <= _MOST_FOR_IAF
    return (AutoIAF if is_small else AutoStructuredFlow)(model), f"for {count}"


def choose_mixture(guide: object, num_modes: int) -> tuple[MixtureGuide, str] | None:
    """A mixture with a component for each mode, in place of a chosen ``AutoIAF``; ``None`` for others."""
    if num_modes < 2 or type(guide) is not AutoIAF:
        return None
    return MixtureGuide(guide.model, num_components=num_modes), f"for {num_modes} modes"
