# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Moments and quantiles of posterior draws."""

from collections.abc import Mapping, Sequence
from itertools import islice, product

import torch
from torch import Tensor

from .._base.arguments import shown
from ..model.vectorization import draws_at_a_time


class Summary(dict[str, dict[str, Tensor]]):
    """Moments and quantiles of each site, such as ``summary["theta"]["mean"]``; printed as a table."""

    def __repr__(self) -> str:
        columns = list(next(iter(self.values()), {}))
        rows: list[tuple[str, str]] = []
        for site, found in self.items():
            indices = product(*map(range, found["mean"].shape))
            for index in islice(indices, 50 - len(rows)):
                name = f"{site}[{', '.join(map(str, index))}]" if index else site
                rows.append((name, "".join(_cell(value[index].item()) for value in found.values())))
        width = max([4, *(len(name) for name, _ in rows)])
        lines = [" " * width + "".join(f"{column:>12}" for column in columns)]
        lines += [f"{name:{width}}{cells}" for name, cells in rows]
        num_rows = sum(found["mean"].numel() for found in self.values())
        if num_rows > len(rows):
            lines.append(f"... and {num_rows - len(rows)} more")
        return "\n".join(lines)


def summary(draws: Mapping[str, Tensor], probs: Sequence[float] = (0.05, 0.5, 0.95)) -> Summary:
    """The mean, standard deviation and quantiles of each coordinate of each site.

    :param draws: for each site a tensor of shape ``(n,) + site shape``.
    :param probs: levels of the quantiles, between 0 and 1.
    :return: a dict of dicts: for each site ``"mean"``, ``"sd"`` and one entry per level, such as
        ``"5%"`` for 0.05, each of the site's shape.
    :raises ValueError: if a site has no draws, or a level is not between 0 and 1.

    Example::

        >>> from pyro_artransform.posterior import summary
        >>> summary({"z": torch.linspace(0.0, 1.0, 101)}, probs=[0.1, 0.9])
                    mean          sd         10%         90%
        z          0.500       0.293       0.100       0.900
    """
    if probs:
        check_levels("probs", probs)
    table = Summary()
    for name, value in draws.items():
        if not value.dim() or not len(value):
            raise ValueError(
                f"draws: expected '{name}' of shape (n, ...), got {tuple(value.shape)}"
            )
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
        value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        has_sd = len(value) > 1 and value.numel()
        sd = value.std(0) if has_sd else torch.full_like(value[0], torch.nan)
        table[name] = {"mean": value.mean(0), "sd": sd}
        for prob, quantile in zip(probs, quantiles_of(value, value.new_tensor(probs))):
            table[name][f"{100 * prob:g}%"] = quantile
    return table


def check_levels(name: str, levels: Sequence[float] | Tensor) -> Tensor:
    """Checks the quantile levels of the argument ``name``, and returns them as a vector."""
    vector = torch.as_tensor(levels, dtype=torch.float64).reshape(-1)
    if not len(vector) or not ((vector >= 0) & (vector <= 1)).all():
        raise ValueError(f"{name}: expected numbers between 0 and 1, got {shown(vector.tolist())}")
    return vector


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """The quantiles ``(q, *)`` of each coordinate of draws ``(n, *)``, in their dtype."""
    # torch.quantile takes no more than 2**24 numbers at a time
    if not draws.numel():
        return draws.new_zeros(levels.shape + draws.shape[1:])
    columns = draws.reshape(len(draws), -1).split(draws_at_a_time(len(draws)), dim=1)
    # torch.quantile does not support half precision
    dtype = torch.promote_types(draws.dtype, torch.float32)
    levels = levels.to(draws.device, dtype)
    found = torch.cat([torch.quantile(part.to(dtype), levels, dim=0) for part in columns], dim=1)
    return found.reshape(levels.shape + draws.shape[1:]).to(draws.dtype)


def _cell(number: float) -> str:
    plain = abs(number) < 1e6 and (abs(number) >= 1e-3 or number == 0)
    return f"{number:12.3f}" if plain else f"{number:12.3e}"
