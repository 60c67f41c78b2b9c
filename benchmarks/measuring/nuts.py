# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Chains of peers: NUTS of NumPyro, and nutpie on the density of a NumPyro model."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import NUTS
from numpyro.infer.util import initialize_model

#: latents whose effective draws are counted at once, for memory
CHUNK = 64


class Block(NamedTuple):
    """Draws of a chain by site, on the unconstrained space and as they are, and gradients of each."""

    unconstrained: dict[str, Any]
    sites: dict[str, Any]
    num_gradients: Any


def blocks(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    seed: int,
    num_warm_up: int,
    size: int,
    **options: Any,
) -> Iterator[Block]:
    """A chain without end, its warm-up first, in blocks of so many draws, compiled once."""
    numpyro.enable_x64()
    kernel = NUTS(model, **options)
    state = kernel.init(jax.random.PRNGKey(seed), num_warm_up, None, args, {})
    constrain = jax.vmap(kernel.postprocess_fn(args, {}))

    @jax.jit
    def block(state: Any) -> Any:
        def draw(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, args, {})
            return state, (state.z, state.num_steps)

        state, (z, num_steps) = jax.lax.scan(draw, state, None, size)
        return state, Block(z, constrain(z), num_steps)

    while True:
        state, found = jax.block_until_ready(block(state))
        yield found


class Enough(Exception):
    """Ends a chain of a peer."""


class Nutpie:
    """nutpie with the log density of a NumPyro model, one chain."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], seed: int) -> None:
        # else each call may wait for a thread, which takes up to three times as long
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        numpyro.enable_x64()
        began = time.process_time()
        info: Any = initialize_model(
            jax.random.PRNGKey(seed), model, model_args=args, validate_grad=False
        )
        start, to_sites = jax.flatten_util.ravel_pytree(info.param_info.z)
        self.constrain = jax.jit(jax.vmap(lambda z: info.postprocess_fn(to_sites(z))))
        self.density = jax.jit(jax.value_and_grad(lambda z: -info.potential_fn(to_sites(z))))
        self.size, self.seed, self.num_gradients = len(start), seed, 0
        self.seconds_of_initialization = time.process_time() - began

    def run(self, watch: Callable[[int, Callable[[int], Any]], None], **options: Any) -> None:
        """Draws until ``watch`` raises `Enough`.

        :param watch: takes how many draws there are after the warm-up, and what makes sites of the last ones.
        """
        import nutpie

        kept: list[np.ndarray] = []
        is_over = [False]

        def last(count: int) -> Any:
            return self.constrain(np.stack(kept[-count:]))

        def log_density(z: np.ndarray) -> tuple[float, np.ndarray]:
            self.num_gradients += 1
            value, gradient = self.density(z)
            return float(value), np.asarray(gradient)

        def expand(z: np.ndarray) -> dict[str, np.ndarray]:
            """nutpie calls it with each draw, those of the warm-up too."""
            kept.append(np.array(z))
            try:
                watch(len(kept) - options["tune"], last)
            except Enough:
                is_over[0] = True
                raise
            return {"z": kept[-1]}

        functions = (lambda: log_density), (lambda *_: expand)
        dtype, size = np.dtype("float64"), self.size
        model = nutpie.compiled_pyfunc.from_pyfunc(size, *functions, [dtype], [(size,)], ["z"])
        options |= {"draws": 10**6, "seed": self.seed, "progress_bar": False}
        try:
            nutpie.sample(model, chains=1, cores=1, save_warmup=False, **options)
        except BaseException:  # what it makes of Enough is no Exception
            if not is_over[0]:
                raise


def least_ess(draws: np.ndarray) -> float:
    """Of the worst latent, of draws of chains ``(chains, n, latents)``."""
    parts = range(0, draws.shape[2], CHUNK)
    found = [effective_sample_size(draws[..., start : start + CHUNK]) for start in parts]
    return float(np.nanmin(np.concatenate(found)))
