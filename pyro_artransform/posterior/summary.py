# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What draws of a posterior say: moments and quantiles, likelihoods, and an ArviZ data set."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from .log_likelihood import Likelihood

Values = dict[str, Tensor]

# torch.quantile takes no more than 2**24 numbers at a time
_QUANTILE_NUMBERS = 2**23
_MAX_ROWS = 50


class Summary(dict[str, Values]):
    """Moments and quantiles of each site, tensors of the site's shape; printed as a table.

    ``summary["theta"]["mean"]``, and likewise ``"sd"`` and ``"5%"``.
    """

    def __repr__(self) -> str:
        columns = list(next(iter(self.values()), {}))
        rows = [row for name, found in self.items() for row in _rows(name, found)]
        shown = list(islice(rows, _MAX_ROWS))
        width = max([4, *(len(name) for name, _ in shown)])
        lines = [" " * width + "".join(f"{column:>12}" for column in columns)]
        lines += [f"{name:{width}}" + "".join(map(_cell, numbers)) for name, numbers in shown]
        if len(rows) > len(shown):
            lines.append(f"... and {len(rows) - len(shown)} more")
        return "\n".join(lines)


def summary(draws: Mapping[str, Tensor], probs: Sequence[float] = (0.05, 0.5, 0.95)) -> Summary:
    """The mean, the standard deviation and quantiles of each coordinate of each site.

    :param draws: for each site a tensor of shape ``(n,) + site shape``.
    :param probs: levels of the quantiles, between 0 and 1.
    :return: a dict of dicts: for each site its ``"mean"``, its ``"sd"`` and, for a level of 0.05,
        ``"5%"``, each of the site's shape.
    :raises ValueError: if there are no draws, or a level is not between 0 and 1.

    Example::

        >>> from pyro_artransform.inference import summary
        >>> summary({"z": torch.linspace(0.0, 1.0, 101)}, probs=[0.1, 0.9])
                    mean          sd         10%         90%
        z          0.500       0.293       0.100       0.900
    """
    if not all(0 <= prob <= 1 for prob in probs):
        raise ValueError(f"probs: expected numbers between 0 and 1, got {list(probs)}")
    for name, value in draws.items():
        if not value.dim() or not len(value):
            raise ValueError(
                f"draws: expected '{name}' of shape (n, ...), got {tuple(value.shape)}"
            )
    return Summary({name: _summary_of(value, probs) for name, value in draws.items()})


def _summary_of(draws: Tensor, probs: Sequence[float]) -> Values:
    if not draws.is_floating_point():
        draws = draws.to(torch.get_default_dtype())
    # torch has no quantiles in half precision
    draws = draws.detach().to(torch.promote_types(draws.dtype, torch.float32))
    sd = draws.std(0) if len(draws) > 1 else torch.full_like(draws[0], torch.nan)
    found = {"mean": draws.mean(0), "sd": sd}
    if not probs:
        return found
    levels = torch.as_tensor(list(probs), dtype=draws.dtype, device=draws.device)
    for prob, quantile in zip(probs, _quantiles(draws, levels)):
        found[f"{100 * prob:g}%"] = quantile
    return found


def _quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    columns = draws.reshape(len(draws), -1).split(max(1, _QUANTILE_NUMBERS // len(draws)), dim=1)
    found = torch.cat([torch.quantile(part, levels, dim=0) for part in columns], dim=1)
    return found.reshape(levels.shape + draws.shape[1:])


def _rows(name: str, found: Values) -> list[tuple[str, list[float]]]:
    shape = found["mean"].shape
    names = [_coordinate(name, index) for index in product(*map(range, shape))]
    numbers = torch.stack([value.flatten() for value in found.values()], -1).tolist()
    return list(zip(names, numbers))


def _coordinate(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def _cell(number: float) -> str:
    plain = abs(number) < 1e6 and (abs(number) >= 1e-3 or number == 0)
    return f"{number:12.3f}" if plain else f"{number:12.3e}"


@torch.no_grad()
def log_likelihood(
    model: Callable[..., Any], draws: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> Values:
    """The log-likelihood of each datum at each draw.

    Scales, as of ``poutine.scale``, are left out, so that the number is the log-density of the
    datum. Where data are masked it is zero, which adds nothing to a sum over data. A site of
    several event dimensions is one datum for each element of its batch shape.

    :param model: a Pyro model with data.
    :param draws: for each latent site of the model a tensor of shape ``(n,) + site shape``; more
        sites are no harm.
    :param args: the model's arguments.
    :param kwargs: its keyword arguments.
    :return: for each site that has data (a factor has none) a tensor of shape ``(n,) + batch shape``.
    :raises ValueError: if the model has a latent that has no draws (discrete ones that are summed
        out have none: draw them by :func:`pyro.infer.infer_discrete`), or it sub-samples its data,
        or draws have wrong shapes.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_artransform.inference import log_likelihood
        >>> def model(data):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=data)
        >>> log_likelihood(model, {"z": torch.zeros(5)}, torch.zeros(3))["y"].shape
        torch.Size([5, 3])
    """
    return Likelihood(model, args, kwargs)(draws)


@torch.no_grad()
def to_inference_data(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    num_samples: int = 1000,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Draws of a posterior as ArviZ takes them.

    The groups are ``posterior``, with deterministic sites too, ``posterior_predictive``, by Pyro's
    ``Predictive``, ``log_likelihood`` (not if the model has discrete latents that are summed out)
    and ``observed_data``. There is one chain, of independent draws.

    :param model: a Pyro model.
    :param guide: a guide of it.
    :param num_samples: how many draws.
    :param args: the arguments of both.
    :param kwargs: their keyword arguments.
    :return: an ``arviz.InferenceData``, from version 1 of ArviZ on an ``xarray.DataTree``.
    :raises ImportError: if ArviZ is missing.
    :raises ValueError: if ``num_samples`` is no positive integer.
    """
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples: expected a positive integer, got {num_samples!r}")
    from_dict = _arviz().from_dict
    likelihood = Likelihood(model, args, kwargs)
    draws = posterior_draws(guide, likelihood.latents, num_samples, args, kwargs)
    predicted = _predictions(likelihood, model, draws, args, kwargs)
    groups = {
        "posterior": {**draws, **{name: predicted[name] for name in likelihood.deterministic}},
        "posterior_predictive": {name: predicted[name] for name in likelihood.observed},
    }
    if not likelihood.undrawn(draws):
        groups["log_likelihood"] = likelihood(draws)
    chains = {k: {s: _numbers(v)[None] for s, v in group.items()} for k, group in groups.items()}
    chains["observed_data"] = {k: _numbers(v) for k, v in likelihood.observed.items()}
    chains = {name: group for name, group in chains.items() if group}
    if "posterior" in inspect.signature(from_dict).parameters:
        return from_dict(**chains)
    return from_dict(chains)


def posterior_draws(
    guide: Any,
    latents: Mapping[str, Tensor],
    num_samples: int,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Values:
    """Draws of any guide: by its ``sample_posterior``, or else by Pyro's ``Predictive``.

    :param guide: a guide.
    :param latents: for each latent site a value, for its shape.
    :param num_samples: how many draws, n.
    :param args: the guide's arguments.
    :param kwargs: its keyword arguments.
    :return: for each site that the guide has a tensor of shape ``(n,) + site shape``.
    """
    if hasattr(guide, "sample_posterior"):
        drawn = guide.sample_posterior(num_samples, *args, **(kwargs or {}))
    else:
        drawn = Predictive(guide, num_samples=num_samples)(*args, **(kwargs or {}))
    return _of_shapes(drawn, latents, num_samples)


def _predictions(
    likelihood: Likelihood,
    model: Callable[..., Any],
    draws: Values,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Values:
    """New values of data and deterministic sites at each draw."""
    sites = {**likelihood.observed, **likelihood.deterministic}
    if not sites:
        return {}
    # a deterministic site takes the draws in a plate for a dimension of its own
    parallel = not likelihood.deterministic and likelihood.way(draws) == "plate"
    predictive = Predictive(
        poutine.uncondition(model),
        posterior_samples=likelihood.in_plate(draws) if parallel else draws,
        return_sites=list(sites),
        parallel=parallel,
    )
    return _of_shapes(predictive(*args, **kwargs), sites, len(next(iter(draws.values()))))


def _of_shapes(found: Mapping[str, Tensor], sites: Mapping[str, Tensor], n: int) -> Values:
    # Predictive puts a dimension in place of each plate that a site is not in
    return {k: found[k].reshape((n, *v.shape)) for k, v in sites.items() if k in found}


def _numbers(value: Tensor) -> Any:
    return value.detach().to("cpu").numpy()


def _arviz() -> Any:
    try:
        import arviz
    except ImportError as error:
        raise ImportError(
            "to_inference_data needs ArviZ: pip install pyro_artransform[arviz]"
        ) from error
    return arviz
