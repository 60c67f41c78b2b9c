# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""From how many latents on ``fit`` chooses ``AutoStructuredFlow`` where it is given no guide; see choice.md.

OMP_NUM_THREADS=1 python benchmarks/choice.py [chain|dense|plate ...]
"""

import sys
import time
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from volatility import simulate, stochastic_volatility

from pyro_artransform import AutoIAF, AutoStructuredFlow, fit

SIZES = {"chain": (20, 40, 80, 120), "plate": (80,), "dense": (80, 200)}


def regression(x: Tensor, y: Tensor) -> None:
    """A logistic regression: each coefficient depends on each other one."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    prior = dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1)
    slopes = pyro.sample("slopes", prior)
    logits = (x @ (scale[..., None] * slopes)[..., None])[..., 0]
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def groups(y: Tensor) -> None:
    """Groups in a plate with an unknown mean and scale."""
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", len(y)):
        z = pyro.sample("z", dist.Normal(mean, scale))
        pyro.sample("y", dist.StudentT(4.0, z, 0.5), obs=y)


def posterior(kind: str, size: int) -> tuple[Callable[..., None], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(size)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    if kind == "chain":
        return stochastic_volatility, (simulate(size, seed=size),)
    if kind == "plate":
        return groups, (1 + 0.7 * draw(size) + 0.5 * draw(size),)
    x, slopes = draw(3 * size, size), draw(size)
    logits = x @ slopes / size**0.5
    return regression, (x, (logits + draw(3 * size) > 0).double())


def main(kinds: list[str]) -> None:
    torch.set_default_dtype(torch.float64)
    print("posterior, latents | guide | ELBO | k-hat | trusted, marginals | steps | CPU s")
    for kind in kinds or SIZES:
        for size in SIZES[kind]:
            model, args = posterior(kind, size)
            for make in (AutoIAF, AutoStructuredFlow):
                pyro.clear_param_store()
                guide, began = make(model), time.process_time()
                result = fit(model, guide, *args, seed=0, progress=False)
                seconds = time.process_time() - began
                print(
                    f"{kind} {guide.latent_dim} | {make.__name__} | {result.elbo:.3f} ± "
                    f"{result.elbo_se:.3f} | {result.khat:.2f} | {result.trusted}, "
                    f"{result.marginals_trusted} | {result.num_steps} | {seconds:.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:])
