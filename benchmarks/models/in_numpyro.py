# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models for NumPyro in the form that its NUTS needs the fewest seconds for.

Each takes the same arguments, and has all latents of the original, deterministic ones where they are not
those that NUTS moves in. Of the centred and the non-centred form, half and half too, each was measured
on simulated data: the states and the field are faster centred, the volatility with a scan over white
noise (4 and more times), the groups non-centred; item responses and the walk of 2,000 steps differ
little. The funnel is non-centred.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import distributions as dist

from models.hierarchies import schools
from models.library import in_numpyro
from models.posteriors import BOUND

Model = Callable[..., None]


def normal_hierarchy(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    with numpyro.plate("groups", len(y)):
        white = numpyro.sample("white", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * white)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def stochastic_volatility(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    phi = 2 * numpyro.sample("phi_star", dist.Beta(20.0, 1.5)) - 1
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    white = numpyro.sample("white", dist.Normal(jnp.zeros(len(y)), 1.0).to_event(1))

    def step(state: Any, noise: Any) -> tuple[Any, Any]:
        state = phi * state + noise
        return state, state

    noises = white.at[0].divide(jnp.sqrt(1 - phi**2))
    _, states = jax.lax.scan(step, 0.0, noises, unroll=8)
    h = numpyro.deterministic("h", mu + sigma * states)
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2)).to_event(1), obs=y)


def irt_2pl(y: Any) -> None:
    sigma_a = numpyro.sample("sigma_a", dist.HalfNormal(1.0))
    sigma_b = numpyro.sample("sigma_b", dist.HalfNormal(2.0))
    persons = numpyro.plate("persons", y.shape[0], dim=-2)
    items = numpyro.plate("items", y.shape[1], dim=-1)
    with persons:
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with items:
        white = numpyro.sample("white", dist.Normal(0.0, 1.0))
        log_a = numpyro.deterministic("log_a", sigma_a * white)
        b = numpyro.sample("b", dist.Normal(0.0, sigma_b))
    with persons, items:
        numpyro.sample("y", dist.Bernoulli(logits=jnp.exp(log_a) * (theta - b)), obs=y)


def neals_funnel(num_latents: Any) -> None:
    v = numpyro.sample("v", dist.Normal(0.0, 3.0))
    with numpyro.plate("latents", int(num_latents)):
        white = numpyro.sample("white", dist.Normal(0.0, 1.0))
        numpyro.deterministic("x", jnp.exp(v / 2) * white)


def schools_centred() -> None:
    """Moves in the non-centred form, since NUTS does not reach the neck of the other."""
    numpyro.deterministic("theta", schools(in_numpyro(), centred=False)())


MODELS = normal_hierarchy, stochastic_volatility, irt_2pl, neals_funnel
PEERS: dict[str, Model] = {model.__name__: model for model in MODELS}


def peer(posterior: str, model_name: str) -> Model:
    """The NumPyro model of a posterior for either library, or else of a Pyro model of some name."""
    if posterior == "schools, centred":
        return schools_centred
    if posterior in BOUND:
        return BOUND[posterior](in_numpyro())
    if model_name not in PEERS:
        raise ValueError(f"expected a model among {list(PEERS)}, got {model_name}")
    return PEERS[model_name]
