# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A dose response of twelve subjects, and the quantiles of its scales by long chains; see tails.md."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyro
from pyro import distributions as dist
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "tails_reference.json"
DOSES = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
SCALES = ("s[0]", "s[1]", "s[2]", "sigma")


def dose(doses: Tensor, y: Tensor) -> None:
    me0 = pyro.sample("me0", dist.Normal(0.0, 2.0))
    memax = pyro.sample("memax", dist.Normal(0.0, 5.0))
    mled50 = pyro.sample("mled50", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("subjects", len(y)):
        e0 = pyro.sample("e0", dist.Normal(me0, s[0]))
        emax = pyro.sample("emax", dist.Normal(memax, s[1]))
        ed50 = pyro.sample("led50", dist.Normal(mled50, s[2])).exp()
        mean = e0[..., None] + emax[..., None] * doses / (ed50[..., None] + doses)
        pyro.sample("y", dist.Normal(mean, sigma).to_event(1), obs=y)


def data() -> np.ndarray:
    """Responses ``(12, 6)``, of which noise hides how much e0 differs from subject to subject."""
    random = np.random.default_rng(4)
    e0, emax, led50 = (
        loc + s * random.normal(size=(12, 1)) for loc, s in ((0.5, 0.15), (4.0, 0.8), (0.3, 0.5))
    )
    return e0 + emax * DOSES / (np.exp(led50) + DOSES) + 0.6 * random.normal(size=(12, 6))


def quantiles(levels: tuple[float, ...]) -> Mapping[str, Mapping[float, float]]:
    """Those of the reference."""
    stored = json.loads(REFERENCE.read_text())["quantiles"]
    return {name: {level: stored[name][str(level)] for level in levels} for name in SCALES}
