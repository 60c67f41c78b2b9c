# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Random models: any distribution as a latent or a likelihood, in plates of all kinds, under any handler."""

import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

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
PLATES = {
    "plate": {"plate": {"size": 3}},
    "whole subsample": {"plate": {"size": 3, "subsample_size": 3}},
    "left": {"plate": {"size": 2, "dim": -2}},
    "nested": {"outer": {"size": 2, "dim": -2}, "inner": {"size": 3, "dim": -1}},
}


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
            drawn = _sample(f"z{k}", LATENTS[distribution], place, loc)
            if place in ("alone", "event"):
                found[k] = drawn[0]
        if self.branch is not None and 0 in found and (_location(found[0]) > self.branch).any():
            pyro.factor("branch", torch.tensor(-3.0))
        with poutine.scale(scale=self.scale):
            for k, (distribution, place, parent) in enumerate(self.data):
                loc, make = _location(found.get(parent)), LIKELIHOODS[distribution]
                _sample(f"y{k}", make, place, loc, self.values, self.masked)

    def wrapped(self):
        """The model under its handlers, the first one innermost."""
        model = self
        for kind in self.handlers:
            model = HANDLERS[kind](model)
        return model


def _location(parent):
    """A number for each draw, from the value of a latent that is in no plate."""
    if parent is None:
        return torch.tensor(0.1)
    value, event_dim = parent
    first = value[(..., *[-1] * event_dim)] if event_dim else value
    return first.tanh() if first.is_floating_point() else first


def _sample(name, make, place, loc, values=None, masked=False):
    """Draws the sites of a place; gives the value and the number of event dimensions of each."""

    def site(step, distribution):
        obs = None if values is None else values[f"{name}_{step}"]
        return pyro.sample(f"{name}_{step}", distribution, obs=obs), distribution.event_dim

    if place == "steps":
        return [site(step, make(loc)) for step in pyro.plate(f"{name}_steps", 3)]
    if place == "event":
        return [site(0, make(loc[..., None].expand((*loc.shape, 2))).to_event(1))]
    with ExitStack() as around:
        for part, options in PLATES.get(place, {}).items():
            around.enter_context(pyro.plate(f"{name}_{part}", **options))
        if masked and place in ("plate", "whole subsample", "nested"):
            around.enter_context(poutine.mask(mask=torch.tensor([True, False, True])))
        return [site(0, make(loc))]


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


def _last_latent(model):
    """A value of the last latent, so that the first one stays."""
    try:
        with poutine.seed(rng_seed=5):
            trace = plain_trace(model)
    except Exception:
        return {}
    names = [n for n, _ in trace.iter_stochastic_nodes() if n.startswith("z")]
    return {name: trace.nodes[name]["value"] for name in names[1:][-1:]}


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


def _with_lifted(model):
    weight = poutine.lift(
        lambda: pyro.param("weight", lambda: torch.tensor(0.2)), {"weight": dist.Normal(0.0, 1.0)}
    )

    def both():
        pyro.sample("y_weight", dist.Normal(weight(), 1.0), obs=torch.tensor(0.4))
        model()

    return both


def _hidden():
    pyro.sample("hidden", dist.Normal(0.0, 1.0))


HANDLERS = {
    "scale": partial(poutine.scale, scale=0.7),
    "mask": partial(poutine.mask, mask=torch.tensor(True)),
    "no mask": partial(poutine.mask, mask=True),
    "condition": lambda model: poutine.condition(model, _last_latent(model)),
    "do": lambda model: poutine.do(model, _last_latent(model)),
    "reparam": partial(poutine.reparam, config=_reparam),
    "lift": _with_lifted,
    "seed": partial(poutine.seed, rng_seed=3),
    "block": lambda model: lambda: (model(), poutine.block(_hidden)()),
    "trace": lambda model: lambda: poutine.trace(model).get_trace() and None,
    "infer": partial(poutine.infer_config, config_fn=lambda site: {"note": 1}),
}


@st.composite
def random_models(draw):
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
    branch = draw(st.sampled_from([None, None, None, 0.5, -0.5]))
    chosen = draw(st.lists(st.sampled_from([*HANDLERS]), max_size=2))
    return RandomModel(
        latents, data, chosen, branch, draw(st.booleans()), draw(st.sampled_from([1.0, 2.5]))
    )


def densities_by_pyro(model, z):
    """The log joint density at each draw, by runs that improper priors and warnings do not end.

    NaN where Pyro itself fails.
    """
    rows = []
    for row in z:
        try:
            rows.append(by_trace(model, row, plain_trace))
        except (ValueError, RuntimeError):
            rows.append(z.new_tensor(torch.nan))
    return torch.stack(rows)


def runs_in_pyro(model):
    """Whether Pyro itself can trace a model and score its draw."""
    try:
        plain_trace(model).log_prob_sum()
    except Exception:
        return False
    return True
