# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A dose response of twelve subjects, and the quantiles of its scales by chains; see tails.md.

Given log ed50 a response is linear in e0 and emax, which are integrated out in closed form; log ed50 is
by the trapezoidal rule, subject by subject. Seven parameters are left for NUTS of NumPyro.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
from pyro import distributions as dist
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "tails_reference.json"
DOSES = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
SCALES = ("s[0]", "s[1]", "s[2]", "sigma")
#: points of log ed50 in units of its sd, and chains, draws of each and of its warm-up
NODES, CHAINS, DRAWS, WARM_UP = np.linspace(-7.0, 7.0, 141), 4, 10_000, 1_000


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


def marginal_model(y: Any) -> None:
    """The same for NumPyro, without latents of subjects."""
    import jax.numpy as jnp
    import numpyro
    from jax.scipy.special import logsumexp
    from numpyro import distributions as jdist

    me0 = numpyro.sample("me0", jdist.Normal(0.0, 2.0))
    memax = numpyro.sample("memax", jdist.Normal(0.0, 5.0))
    mled50 = numpyro.sample("mled50", jdist.Normal(0.0, 1.0))
    s = numpyro.sample("s", jdist.HalfNormal(1.0).expand([3]).to_event(1))
    sigma = numpyro.sample("sigma", jdist.HalfNormal(1.0))
    x = DOSES / (jnp.exp(mled50 + s[2] * NODES)[:, None] + DOSES)  # nodes, doses
    left = y[:, None] - me0 - memax * x  # subjects, nodes, doses
    # I + U'U / sigma^2 of U = [s0 1, s1 x], for the determinant lemma and Woodbury's identity
    a = 1 + len(DOSES) * (s[0] / sigma) ** 2
    b = s[0] * s[1] * x.sum(-1) / sigma**2
    c = 1 + (s[1] / sigma) ** 2 * (x**2).sum(-1)
    u, v = s[0] * left.sum(-1) / sigma**2, s[1] * (left * x).sum(-1) / sigma**2
    determinant = a * c - b**2
    square = (left**2).sum(-1) / sigma**2 - (c * u**2 - 2 * b * u * v + a * v**2) / determinant
    log_density = -square / 2 - jnp.log(determinant) / 2 - len(DOSES) * jnp.log(sigma)
    numpyro.factor("y", logsumexp(log_density - NODES**2 / 2, axis=-1).sum())


def quantiles(levels: tuple[float, ...]) -> Mapping[str, Mapping[float, float]]:
    """Those of the reference."""
    stored = json.loads(REFERENCE.read_text())["quantiles"]
    return {name: {level: stored[name][str(level)] for level in levels} for name in SCALES}


def make_reference(levels: tuple[float, ...]) -> None:
    """Chains, and their quantiles into the file."""
    import numpyro
    from measuring.nuts import long_run
    from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

    sizes = {"num_chains": CHAINS, "num_warmup": WARM_UP, "num_samples": DRAWS}
    draws, num_divergent = long_run(marginal_model, (data(),), 0, sizes)
    scales = {f"s[{k}]": draws["s"][..., k] for k in range(3)} | {"sigma": draws["sigma"]}
    found = {name: np.quantile(z, levels) for name, z in scales.items()}
    followed = [np.log(z) for z in scales.values()]
    followed += [1.0 * (z < at) for name, z in scales.items() for at in found[name]]
    ess = min(float(effective_sample_size(z)) for z in followed)
    rhat = max(float(split_gelman_rubin(z)) for z in followed)
    about = (
        f"Quantiles of scales of models/dose.py: NUTS of NumPyro {numpyro.__version__}, latents of "
        f"subjects integrated out, float64, seed 0, {CHAINS} chains of {DRAWS:,} draws after {WARM_UP:,} "
        f"of warm-up, {num_divergent} divergent. Of log scales and of "
        f"indicators of each quantile the least ESS is {ess:,.0f}, the largest R-hat {rhat:.4f}. Made by "
        "benchmarks/tails.py --reference."
    )
    rounded = {
        name: {str(level): float(f"{q:.5g}") for level, q in zip(levels, values)}
        for name, values in found.items()
    }
    REFERENCE.write_text(json.dumps({"about": about, "quantiles": rounded}, indent=1) + "\n")
