# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Random models: any distribution as a latent or a likelihood, in plates of all kinds, under any handler."""

import warnings
from dataclasses import dataclass, field

import pyro
import torch
from hypothesis import strategies as st
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.poutine.messenger import Messenger
from torch.distributions import biject_to

from tests.attack.distributions import LATENTS, LIKELIHOODS, WITHOUT_BATCHES, datum
from tests.model.models import by_trace

PLACES = ("alone", "event", "plate", "whole subsample", "nested", "left", "steps")
SHAPES = {
    "alone": (),
    "event": (2,),
    "plate": (3,),
    "whole subsample": (3,),
    "nested": (2, 3),
    "left": (2, 1),
}
HANDLERS = (
    *(
        "scale",
        "mask",
        "no mask",
        "condition",
        "do",
        "reparam",
        "lift",
        "seed",
        "block",
        "trace",
        "infer",
    ),
)


@dataclass
class RandomModel:
    """A model from what was drawn; equal ones are equal models."""

    latents: list[tuple[str, str, int]]  # distribution, place, index of the parent latent
    data: list[tuple[str, str, int]]
    handlers: list[str]
    branch: float | None  # draws above it meet a factor, by a branch on any of them
    masked: bool
    scale: float
    values: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for k, (distribution, place, _) in enumerate(self.data):
            for step in range(3 if place == "steps" else 1):
                self.values[f"y{k}_{step}"] = datum(distribution, SHAPES.get(place, ()))

    def __call__(self):
        found = {}
        for k, (distribution, place, parent) in enumerate(self.latents):
            loc = _location(found.get(parent))
            for value, event_dim in _sample(f"z{k}", LATENTS[distribution], place, loc):
                if place in ("alone", "event"):
                    found[k] = value, event_dim
        if self.branch is not None and 0 in found and (_location(found[0]) > self.branch).any():
            pyro.factor("branch", torch.tensor(-3.0))
        with poutine.scale(scale=self.scale):
            for k, (distribution, place, parent) in enumerate(self.data):
                loc = _location(found.get(parent))
                list(
                    _sample(
                        f"y{k}", LIKELIHOODS[distribution], place, loc, self.values, self.masked
                    )
                )

    def wrapped(self):
        """The model under its handlers, the first one innermost."""
        model = self
        for kind in self.handlers:
            model = _wrap(kind, model)
        return model


def _location(parent):
    """A number for each draw, from the value of a latent that is in no plate."""
    if parent is None:
        return torch.tensor(0.1)
    value, event_dim = parent
    first = value[(..., *[-1] * event_dim)] if event_dim else value
    return first.tanh() if first.is_floating_point() else first


def _sample(name, distribution, place, loc, values=None, masked=False):
    """Draws a site in its place; gives its value and number of event dimensions."""
    if place == "steps":
        for step in pyro.plate(f"{name}_steps", 3):
            yield _site(f"{name}_{step}", distribution(loc), values, False)
    elif place == "alone":
        yield _site(f"{name}_0", distribution(loc), values, False)
    elif place == "event":
        yield _site(
            f"{name}_0",
            distribution(loc[..., None].expand((*loc.shape, 2))).to_event(1),
            values,
            False,
        )
    elif place == "plate":
        with pyro.plate(f"{name}_plate", 3):
            yield _site(f"{name}_0", distribution(loc), values, masked)
    elif place == "whole subsample":
        with pyro.plate(f"{name}_plate", 3, subsample_size=3):
            yield _site(f"{name}_0", distribution(loc), values, masked)
    elif place == "left":
        with pyro.plate(f"{name}_plate", 2, dim=-2):
            yield _site(f"{name}_0", distribution(loc), values, False)
    else:
        with pyro.plate(f"{name}_outer", 2, dim=-2), pyro.plate(f"{name}_inner", 3, dim=-1):
            yield _site(f"{name}_0", distribution(loc), values, masked)


def _site(name, distribution, values, masked):
    obs = None if values is None else values[name]
    if masked:
        with poutine.mask(mask=torch.tensor([True, False, True])):
            return pyro.sample(name, distribution, obs=obs), distribution.event_dim
    return pyro.sample(name, distribution, obs=obs), distribution.event_dim


class ImproperAtOrigin(Messenger):
    """Gives an improper prior, which has no draws, the value of the origin."""

    def _pyro_sample(self, msg):
        if (
            isinstance(getattr(msg["fn"], "base_dist", msg["fn"]), dist.ImproperUniform)
            and msg["value"] is None
        ):
            bijection = biject_to(msg["fn"].support)
            msg["value"] = bijection(torch.zeros(bijection.inverse_shape(msg["fn"].shape())))


def plain_trace(model):
    """A run of a model by Pyro alone."""
    with poutine.block(), torch.no_grad(), ImproperAtOrigin(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pyro.validation_enabled(False):
            return poutine.trace(model).get_trace()


def _wrap(kind, model):
    if kind == "scale":
        return poutine.scale(model, scale=0.7)
    if kind == "mask":
        return poutine.mask(model, mask=torch.tensor(True))
    if kind == "no mask":
        return poutine.mask(model, mask=True)
    if kind in ("condition", "do"):
        # of the last latent, so that the first one stays
        try:
            with poutine.seed(rng_seed=5):
                trace = plain_trace(model)
        except Exception:
            return model
        names = [n for n, _ in trace.iter_stochastic_nodes() if n.startswith("z")]
        if len(names) < 2:
            return model
        values = {names[-1]: trace.nodes[names[-1]]["value"]}
        return (
            poutine.condition(model, values) if kind == "condition" else poutine.do(model, values)
        )
    if kind == "reparam":
        return poutine.reparam(model, config=_reparam)
    if kind == "lift":
        return lambda: (
            _with_param(poutine.lift(_param, {"weight": dist.Normal(0.0, 1.0)})),
            model(),
        )
    if kind == "seed":
        return poutine.seed(model, rng_seed=3)
    if kind == "block":
        return lambda: (model(), poutine.block(_hidden)())
    if kind == "trace":
        return lambda: poutine.trace(model).get_trace() and None
    return poutine.infer_config(model, config_fn=lambda site: {"note": 1})


def _reparam(site):
    fn = site["fn"]
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    if (
        site["is_observed"]
        or not site["name"].startswith("z")
        or site["name"].endswith(("_decentered", "_base"))
    ):
        return None
    if isinstance(fn, (dist.Normal, dist.StudentT, dist.Logistic, dist.Gumbel, dist.Laplace)):
        return LocScaleReparam(0.5 if isinstance(fn, dist.Normal) else 0.0)
    return TransformReparam() if isinstance(fn, dist.LogNormal) else None


def _param():
    return pyro.param("weight", lambda: torch.tensor(0.2))


def _with_param(model):
    pyro.sample("y_weight", dist.Normal(model(), 1.0), obs=torch.tensor(0.4))


def _hidden():
    pyro.sample("hidden", dist.Normal(0.0, 1.0))


@st.composite
def random_models(draw, handlers=HANDLERS, branches=True):
    def distribution(names, place):
        return draw(
            st.sampled_from(sorted(set(names) - (set() if place == "alone" else WITHOUT_BATCHES)))
        )

    latents = []
    for k in range(draw(st.integers(1, 4))):
        place = draw(st.sampled_from(PLACES))
        latents.append((distribution(LATENTS, place), place, draw(st.integers(-1, k - 1))))
    data = []
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(PLACES))
        data.append(
            (distribution(LIKELIHOODS, place), place, draw(st.integers(-1, len(latents) - 1)))
        )
    branch = draw(st.sampled_from([None, None, None, 0.5, -0.5])) if branches else None
    chosen = draw(st.lists(st.sampled_from(handlers), max_size=2))
    return RandomModel(
        latents, data, chosen, branch, draw(st.booleans()), draw(st.sampled_from([1.0, 2.5]))
    )


def density_by_pyro(model, z):
    """The log joint density at one draw, by runs that improper priors and warnings do not end."""
    return by_trace(model, z, plain_trace)


def runs_in_pyro(model):
    """Whether Pyro itself can trace a model and score its draw."""
    try:
        plain_trace(model).log_prob_sum()
    except Exception:
        return False
    return True
