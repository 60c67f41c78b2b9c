# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""The subjects of benchmarks/fit.py: each trains one guide, or runs one chain, and records as it goes.

A record is a list of rows (step, CPU seconds, value). The clock starts after imports, and stands still
while the ELBO or the effective sample size is measured. Pyro and NumPyro are imported on use, so that
neither is in the process of the other.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fit_posteriors import Library, Model, Posterior

#: draws a step of all guides, and fresh draws that their ELBO is measured by
NUM_PARTICLES, NUM_DRAWS = 16, 4000
#: nats from the log evidence, and effective draws of the worst coordinate, that a run ends with
GAP, ESS = 0.05, 400
#: steps or draws between two looks, at least, and the growth of steps from one look to the next
EVERY, GROWTH = 50, 1.1
NUM_WARM_UP, MAX_TREE = 500, 10


@dataclass
class Record:
    """What a run has to show, and its clock.

    :param evidence: the log evidence, from which the gap is taken.
    :param limit: CPU seconds after which the run ends.
    """

    evidence: float
    limit: float
    rows: list[tuple[int, float, float]] = field(default_factory=list)
    paused_for: float = 0.0
    began: float = field(default_factory=time.process_time)

    @property
    def seconds(self) -> float:
        return time.process_time() - self.began - self.paused_for

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here takes no time."""
        began = time.process_time()
        yield
        self.paused_for += time.process_time() - began

    def note(self, step: int, measure: Callable[[], Any]) -> float:
        """Adds a row, whose value is measured while the clock stands still."""
        seconds = self.seconds
        with self.paused():
            value = float(measure())
        self.rows.append((step, seconds, value))
        return value

    def note_gap(self, step: int, elbo: Callable[[], Any]) -> bool:
        """Adds a row, and says whether the run is at its end."""
        gap = self.note(step, lambda: self.evidence - float(elbo()))
        return gap <= GAP or self.seconds > self.limit

    def note_ess(self, draws: int, ess: Callable[[], Any]) -> bool:
        """The same for a chain."""
        return self.note(draws, ess) >= ESS or self.seconds > self.limit


def looks() -> Iterator[int]:
    """The steps after which a guide is looked at, all of them multiples of some number."""
    step = EVERY
    while True:
        yield step
        step = max(step + EVERY, EVERY * round(GROWTH * step / EVERY))


def in_torch(posterior: Posterior, seed: int) -> Model:
    """The model for Pyro, and PyTorch as it is for all subjects of Pyro."""
    import pyro
    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    pyro.enable_validation(False)
    return posterior.bind(
        Library(pyro.sample, pyro.plate, pyro.factor, pyro.distributions, torch.tensor)
    )


def in_jax(posterior: Posterior) -> Model:
    """The model for NumPyro, in the same precision."""
    import jax.numpy as jnp
    import numpyro

    numpyro.enable_x64()
    return posterior.bind(
        Library(numpyro.sample, numpyro.plate, numpyro.factor, numpyro.distributions, jnp.asarray)
    )


def this_package(name: str, posterior: Posterior, seed: int, **run: Any) -> dict[str, Any]:
    """`fit` with nothing set, to its end."""
    import torch

    import pyro_artransform
    from pyro_artransform.model import LogJoint

    model = in_torch(posterior, seed)
    density = LogJoint(model)
    record, coming = Record(**run), looks()
    waited_for = [1]

    def elbo() -> torch.Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            draws, log_q = guide.rsample_and_log_prob(NUM_DRAWS)
            return (density(draws) - log_q).mean()

    def look(step: int, _: float) -> None:
        if step >= waited_for[0]:
            record.note_gap(step, elbo)
            waited_for[0] = next(coming)

    guide = getattr(pyro_artransform, name)(model)
    result = pyro_artransform.fit(model, guide, callback=look, progress=False)
    record.note_gap(result.num_steps, elbo)
    found = {"verdict": result.verdict, "trusted": result.trusted, "khat": result.khat}
    found |= {"marginals_trusted": result.marginals_trusted, "start": result.start}
    return {"rows": record.rows, **found}


def pyro_guide(
    name: str, posterior: Posterior, seed: int, step_size: float, **run: Any
) -> dict[str, Any]:
    """A guide of Pyro by its own ELBO."""
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO, autoguide

    model = in_torch(posterior, seed)
    losses = [
        Trace_ELBO(count, max_plate_nesting=1, vectorize_particles=True)
        for count in (NUM_PARTICLES, NUM_DRAWS)
    ]
    # as many layers as the other flows have; Pyro's networks may not be narrower than their input
    options = {"num_transforms": 3, "hidden_dim": [max(64, posterior.dim)] * 2}
    record = Record(**run)
    guide = getattr(autoguide, name)(model, **(options if name == "AutoIAFNormal" else {}))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": step_size}), losses[0])

    def elbo() -> float:
        with torch.random.fork_rng(), torch.no_grad():
            return -losses[1].loss(model, guide)

    done = 0
    for step in looks():
        for _ in range(done, step):
            svi.step()
        if record.note_gap(done := step, elbo):
            return {"rows": record.rows}
    raise AssertionError("looks never end")


def numpyro_guide(
    name: str, posterior: Posterior, seed: int, step_size: float, **run: Any
) -> dict[str, Any]:
    """A guide of NumPyro by its own ELBO, in compiled blocks of steps."""
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    model = in_jax(posterior)
    record = Record(**run)
    guide = getattr(autoguide, name)(model)
    svi = SVI(model, guide, numpyro.optim.Adam(step_size), Trace_ELBO(NUM_PARTICLES))
    state = svi.init(jax.random.PRNGKey(seed))

    @jax.jit
    def block(state: Any) -> Any:
        return jax.lax.fori_loop(0, EVERY, lambda _, state: svi.update(state)[0], state)

    @jax.jit
    def loss(state: Any) -> Any:
        key, params = jax.random.PRNGKey(1000 + seed), svi.get_params(state)
        return Trace_ELBO(NUM_DRAWS).loss(key, params, model, guide)

    done = 0
    for step in looks():
        for _ in range(done, step, EVERY):
            state = block(state)
        jax.block_until_ready(state)
        if record.note_gap(done := step, lambda: -loss(state)):  # noqa: B023
            return {"rows": record.rows}
    raise AssertionError("looks never end")


class Enough(Exception):
    """Ends a chain of Pyro."""


def pyro_nuts(posterior: Posterior, seed: int, **run: Any) -> dict[str, Any]:
    """Pyro's NUTS, whose density is compiled; one chain of as many draws as it takes."""
    import torch
    from pyro.infer import MCMC, NUTS
    from pyro.ops.stats import effective_sample_size

    model = in_torch(posterior, seed)
    record, draws = Record(**run), []

    def ess() -> torch.Tensor:
        return effective_sample_size(torch.stack(draws)[None], 0, 1).min() if draws else 0.0

    def look(kernel: object, sample: dict[str, torch.Tensor], stage: str, number: int) -> None:
        if stage == "Sample":
            draws.append(torch.cat([value.flatten() for value in sample.values()]))
        if (number + 1) % EVERY == 0 and record.note_ess(len(draws), ess):
            raise Enough

    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=MAX_TREE)
    chain = MCMC(kernel, 1_000_000, NUM_WARM_UP, hook_fn=look, disable_progbar=True)
    try:
        chain.run()
    except Enough:
        return {"rows": record.rows}
    raise AssertionError("the chain should have been long enough")


def numpyro_nuts(posterior: Posterior, seed: int, **run: Any) -> dict[str, Any]:
    """NumPyro's NUTS, in compiled blocks of draws; one chain of as many as it takes."""
    import jax
    import numpy as np
    from numpyro.diagnostics import effective_sample_size
    from numpyro.infer import NUTS

    model = in_jax(posterior)
    record, blocks = Record(**run), []
    kernel = NUTS(model, max_tree_depth=MAX_TREE)
    state = kernel.init(jax.random.PRNGKey(seed), NUM_WARM_UP, None, (), {})

    @jax.jit
    def block(state: Any) -> Any:
        def draw(state: Any, _: None) -> tuple[Any, Any]:
            state = kernel.sample(state, (), {})
            return state, jax.flatten_util.ravel_pytree(state.z)[0]

        return jax.lax.scan(draw, state, None, EVERY)

    def ess() -> float:
        return effective_sample_size(np.concatenate(blocks)[None]).min() if blocks else 0.0

    for count in itertools.count(EVERY, EVERY):
        state, draws = block(state)
        if count > NUM_WARM_UP:
            blocks.append(np.asarray(draws))
        if record.note_ess(EVERY * len(blocks), ess):
            return {"rows": record.rows}
    raise AssertionError("counts never end")


#: each subject, and whether it has step sizes to choose from
SUBJECTS: dict[str, tuple[Callable[..., dict[str, Any]], bool]] = {
    "AutoIAF by fit": (partial(this_package, "AutoIAF"), False),
    "AutoStructuredFlow by fit": (partial(this_package, "AutoStructuredFlow"), False),
    "Pyro AutoIAFNormal": (partial(pyro_guide, "AutoIAFNormal"), True),
    "Pyro AutoMultivariateNormal": (partial(pyro_guide, "AutoMultivariateNormal"), True),
    "NumPyro AutoIAFNormal": (partial(numpyro_guide, "AutoIAFNormal"), True),
    "NumPyro AutoBNAFNormal": (partial(numpyro_guide, "AutoBNAFNormal"), True),
    "Pyro NUTS": (pyro_nuts, False),
    "NumPyro NUTS": (numpyro_nuts, False),
}
