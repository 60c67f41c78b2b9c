# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What models are written with: Pyro, or Pyro and NumPyro at once."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

#: a model and its arguments
Subject = tuple[Callable[..., Any], tuple[Any, ...]]
Model = Callable[[], Any]


@dataclass(frozen=True)
class Library:
    """What models call: Pyro's names, which are NumPyro's too, PyTorch or JAX, and how it makes an array."""

    sample: Callable[..., Any]
    plate: Callable[..., Any]
    factor: Callable[..., Any]
    dist: Any
    arrays: Any
    array: Callable[[np.ndarray], Any]

    def free(self, name: str, num: int) -> Any:
        """Latents without a density of their own, which factors are to have."""
        normal = self.dist.Normal(self.arrays.zeros(num), 1.0)
        return self.sample(name, normal.mask(False).to_event(1))

    def path(
        self, name: str, num: int, mean: Any, slope: Any, sd: Any, first: Any | None = None
    ) -> Any:
        """An autoregression around its mean, whose first value is stationary, or has an sd of its own."""
        if first is None:
            first = sd / (1 - slope**2) ** 0.5
        mean, slope, sd, first = map(column, (mean, slope, sd, first))
        z = self.free(name, num)
        start = self.dist.Normal(mean, first).log_prob(z[..., :1])
        steps = self.dist.Normal(mean + slope * (z[..., :-1] - mean), sd).log_prob(z[..., 1:])
        self.factor(f"{name}_path", start.sum(-1) + steps.sum(-1))
        return z


def column(value: Any) -> Any:
    """A latent before those of a path."""
    return value[..., None] if hasattr(value, "shape") else value


PYRO = Library(pyro.sample, pyro.plate, pyro.factor, pyro.distributions, torch, torch.tensor)


def in_numpyro() -> Library:
    """NumPyro in double precision."""
    import jax.numpy as jnp
    import numpyro

    numpyro.enable_x64()
    names = numpyro.sample, numpyro.plate, numpyro.factor, numpyro.distributions
    return Library(*names, jnp, jnp.asarray)


class Simulator:
    """Random numbers of a seed in order."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=self.generator)

    def poisson(self, rate: Tensor) -> Tensor:
        return torch.poisson(rate, generator=self.generator)


def tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(array, dtype=torch.get_default_dtype()) for array in arrays)


def from_folder(folder: Path, name: str = "models") -> Any:
    """A module of a folder."""
    sys.path.insert(0, str(folder))
    spec: Any = importlib.util.spec_from_file_location(f"given_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
