# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Every guide and every model by name: a new one is one more line."""

import pytest
from pyro.distributions import transforms

from pyro_artransform import affine_autoregressive, iaf, maf, spline_autoregressive
from pyro_artransform.flows.transforms import chain
from pyro_artransform.guides import (
    AutoAutoregressive,
    AutoIAF,
    AutoMAF,
    AutoStructuredFlow,
    MixtureGuide,
)
from tests.guides import models

GUIDES = {
    "iaf": lambda model, **o: AutoIAF(model, num_transforms=2, hidden_dims=8, **o),
    "maf": lambda model, **o: AutoMAF(model, num_transforms=2, hidden_dims=8, **o),
    "splines": lambda model, **o: AutoAutoregressive(
        model, flow=lambda d: spline_autoregressive(d, 8), **o
    ),
    "inverse": lambda model, **o: AutoAutoregressive(
        model, flow=lambda d: affine_autoregressive(d, 8).inv, **o
    ),
    "chain": lambda model, **o: AutoAutoregressive(
        model, flow=lambda d: chain([iaf(d, 1, 8), maf(d, 1, 8)]), **o
    ),
    "structured": lambda model, **o: AutoStructuredFlow(model, hidden_dim=4, **o),
    "two structured": lambda model, **o: AutoStructuredFlow(
        model, hidden_dim=4, num_transforms=2, **o
    ),
    "mixture": lambda model, **o: MixtureGuide(model, num_transforms=1, hidden_dims=8, **o),
    "diagonal": lambda model, **o: AutoIAF(model, hidden_dims=8, full_rank=False, **o),
}
FOREIGN = {
    "Pyro's": lambda model, **o: AutoAutoregressive(
        model, flow=lambda d: transforms.affine_autoregressive(d, hidden_dims=[40]), **o
    ),
    "iterated": lambda model, **o: AutoAutoregressive(
        model, flow=lambda d: transforms.iterated(2, lambda: affine_autoregressive(d, 8)), **o
    ),
    "elementwise": lambda model, **o: AutoAutoregressive(
        model, flow=lambda d: transforms.spline(d), **o
    ),
}
MODELS = {
    "two": models.regression,
    "one": models.one_dimensional,
    "shapes": models.shapes,
    "mixed": models.mixed_dtypes,
    "gaussian": models.gaussian,
}
own_guides = pytest.mark.parametrize("new", GUIDES.values(), ids=GUIDES)


def _pairs():
    """Each guide with one model, AutoIAF and a structured guide with each."""
    found = {}
    for name, new in {**GUIDES, **FOREIGN}.items():
        of_all = name in ("iaf", "structured")
        for model in MODELS if of_all else ["shapes" if name in GUIDES else "gaussian"]:
            found[f"{name}-{model}"] = new, MODELS[model]
    return found


PAIRS = _pairs()
OWN_PAIRS = {name: pair for name, pair in PAIRS.items() if pair[0] in GUIDES.values()}
pairs = pytest.mark.parametrize(("new", "model"), PAIRS.values(), ids=PAIRS)
own_pairs = pytest.mark.parametrize(("new", "model"), OWN_PAIRS.values(), ids=OWN_PAIRS)
