# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The choice of a guide for a model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from pyro.infer.autoguide.initialization import InitMessenger, init_to_median

from ..joint.sites import Latents, initial_value
from ..joint.traces import subsampled_plates
from .amortized.amortized_guide import AutoAmortized
from .persistence.persistent_guide import PersistentGuide
from .presets import AutoIAF
from .prototype import one_more_run
from .structured.structured_guide import AutoStructuredFlow

# On chains AutoIAF is better by 0.01 nats at 43 latents, and worse and slower at 83 (benchmarks/choice.md).
_MOST_FOR_IAF = 50


def choose_guide(
    model: Callable[..., object],
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    is_minibatch: bool = False,
) -> tuple[PersistentGuide, str]:
    """A new guide of a model, and why it is this one.

    It is ``AutoAmortized`` where latents are in a sub-sampled plate, which no other guide can follow;
    ``AutoIAF`` for few latents, and where the data are sub-sampled, since a mini-batch may lack
    dependencies of the posterior; ``AutoStructuredFlow`` for many.

    :param is_minibatch: whether the arguments are one of many mini-batches.
    :raises ValueError: if there are no latents, or discrete ones that are not enumerated.
    """
    # from the values that guides start at: draws of the prior may be extreme, or impossible
    start = InitMessenger(partial(initial_value, init_to_median))
    trace = one_more_run(partial(start(model), *args, **(kwargs or {})))
    latents = Latents.from_trace(trace)
    parts = {plate.name for plate in subsampled_plates(trace)}
    count = "1 latent" if latents.latent_dim == 1 else f"{latents.latent_dim} latents"
    for site in latents.sites.values():
        for plate in site.plates:
            if plate.name in parts:
                return AutoAmortized(model), f"for latents in the sub-sampled plate '{plate.name}'"
    if parts or is_minibatch:
        return AutoIAF(model), f"for {count} and sub-sampled data"
    is_small = latents.latent_dim <= _MOST_FOR_IAF
    return (AutoIAF if is_small else AutoStructuredFlow)(model), f"for {count}"
