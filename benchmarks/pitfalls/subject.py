# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a case may ask of the package that it examines."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

SaveAndLoad = tuple[Callable[[Any, Path], None], Callable[[Path, Callable], Any]]


class NotApplicable(Exception):
    """The package has nothing of the kind that the case is about."""


class Subject:
    """
    A package under examination. A method that is not overridden does not apply to it.

    Flows are what the package itself calls so, of vectors of ``dim`` numbers; T is the direction
    that costs one evaluation of the network. Guides take any Pyro model.

    :param folder: an empty folder for its files.
    """

    name = ""
    #: The univariate transforms that ``flow`` knows.
    families: tuple[str, ...] = ()
    #: Further ones, for the cases about the transform itself.
    more_families: tuple[str, ...] = ()
    #: How large the package lets the log-scale of one affine layer get, where it says so.
    log_scale_bound: float | None = None
    #: The folders and files to look through for tensors made without a dtype and a device.
    sources: tuple[Path, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # Flows

    def flow(self, dim: int, family: str = "affine", *, layers: int = 1, context_dim: int = 0):
        """A new flow."""
        raise NotApplicable("no flows of its own")

    def call_and_ladj(self, flow, x: Tensor, context: Tensor | None = None):
        """T(x) and the log-determinant of its Jacobian."""
        t = flow if context is None else flow.condition(context)
        y = t(x)
        return y, t.log_abs_det_jacobian(x, y)

    def inverse(self, flow, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The x with T(x) = y."""
        return (flow if context is None else flow.condition(context)).inv(y)

    def inverse_and_ladj(self, flow, y: Tensor) -> tuple[Tensor, Tensor]:
        """The x with T(x) = y and the log-determinant of the inverse there."""
        x = flow.inv(y)
        return x, flow.inv.log_abs_det_jacobian(y, x)

    def distribution(self, flow, dim: int, inverse: bool = False):
        """T, or its inverse, of a standard Normal: has ``sample``, ``rsample`` and ``log_prob``."""
        zero = next(flow.parameters()).new_zeros(dim)
        base = dist.Normal(zero, zero + 1).to_event(1)
        return dist.TransformedDistribution(base, [flow.inv if inverse else flow])

    def inverse_module(self, flow):
        """The inverse of a flow as the package offers it."""
        return flow.inv

    def apply_inverse(self, inverse, y: Tensor) -> Tensor:
        """The value of what ``inverse_module`` returned."""
        return inverse(y)

    def scramble(self, flow, gain: float = 1.0):
        """Re-draws every linear layer as PyTorch does, then multiplies all weights."""
        for module in flow.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        with torch.no_grad():
            for parameter in flow.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(gain)
        return flow

    def graph_flow(self, adjacency: Tensor, passes: int):
        """A flow whose i-th coordinate reads the j-th where ``adjacency[i, j]``."""
        raise NotApplicable("no number of passes to choose")

    def reordered_flows(self, dim: int) -> list:
        """Flows of one size that differ in the order or the graph of the coordinates."""
        return []

    def hidden_flows(self, dim: int) -> dict[str, tuple[Any, list[Tensor]]]:
        """Flows that cannot know some of their parameters (they are in a closure), and those."""
        return {}

    def log_scale(self, raw: Tensor) -> Tensor:
        """The log-scale of the affine transform as a function of the network's output."""
        raise NotApplicable("no affine transform apart from the flow")

    def spline(self, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float):
        """A spline as two functions of shape ``(D,)``: forward and inverse, each with its ladj."""
        raise NotApplicable("no spline")

    def univariates(self) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """Each univariate transform at zero parameters, as a function with its ladj."""
        return {}

    def needs_flows(self) -> None:
        """Ends a case about flows for a package without any."""
        if not self.families:
            raise NotApplicable("no flows of its own")

    # Guides

    def guide(self, model: Callable, **options: Any):
        """A new flow guide; ``options`` are ``init_loc_fn`` and ``init_scale``."""
        raise NotApplicable("no guides")

    def sparse_guide(self, model: Callable):
        """A new guide with the conditional independences of the posterior."""
        raise NotApplicable("no guide with the graph of the posterior")

    def prior_guide(self, model: Callable):
        """A guide that is a standard Normal on the unconstrained space."""
        raise NotApplicable("no guides")

    def constructions(self) -> dict[str, Callable[[Callable], Any]]:
        """Ways of making a guide from composed and inverted flows, each taking the model."""
        raise NotApplicable("no guides")

    def save_paths(self) -> dict[str, SaveAndLoad]:
        """The documented ways to save a guide and to get it back for a model."""
        return {"state dict": (save_state, self._load_state), "pickle": (save_whole, load_whole)}

    def tensor_files(self) -> dict[str, Callable[[Any, Path], None]]:
        """Those of them that promise a file of tensors."""
        return {"state dict": save_state}

    def sample_without_data(self, guide) -> dict[str, Tensor]:
        """Draws from a guide that was never called."""
        return guide()

    # Fits

    def fit(
        self,
        model: Callable,
        guide,
        steps: int,
        callback: Callable[[int, float], Any] | None = None,
    ) -> Any:
        """Trains a guide; returns what the package says of it, if it says anything."""
        for step in range(1, steps + 1):
            (loss,) = train(guide, model, 1)
            if callback is not None:
                callback(step, -loss)

    def trusts(self, model: Callable, guide, steps: int) -> bool:
        """Trains a guide; whether the package calls it good."""
        raise NotApplicable("no verdict")

    def chains(self, model: Callable, n: int) -> tuple[dict[str, Tensor], bool]:
        """Draws of the posterior by chains, and whether the package trusts them."""
        raise NotApplicable("no chains")

    def draws(self, model: Callable, n: int, seed: int) -> tuple[dict[str, Tensor], bool]:
        """The same by a fit, of a guide that the package chooses, if it takes one."""
        raise NotApplicable("no draws by a fit")

    def trusts_batches(self, model: Callable, guide, batches, steps: int) -> bool:
        """The same of a guide that is trained on mini-batches."""
        raise NotApplicable("no verdict on mini-batches")

    def elbo(self, model: Callable, guide) -> tuple[float, float]:
        """The ELBO and its standard error, in nats."""
        elbo = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
        with torch.no_grad():
            found = -torch.tensor([elbo.loss(model, guide) for _ in range(50)])
        return found.mean().item(), found.std().item() / 50**0.5

    def _load_state(self, path: Path, model: Callable):
        guide = self.guide(model)
        guide()
        guide.load_state_dict(torch.load(path), strict=True)
        return guide


def save_state(guide, path: Path) -> None:
    torch.save(guide.state_dict(), path)


def save_whole(guide, path: Path) -> None:
    torch.save(guide, path)


def load_whole(path: Path, model: Callable):
    return torch.load(path, weights_only=False)


def prepare(seed: int = 0) -> None:
    """The state that each case starts from."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    pyro.enable_validation(True)


def parameters(module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def unmoved(module, before: dict[str, Tensor]) -> list[str]:
    """The parameters that are as they were, or are not there any more."""
    now = dict(module.named_parameters())
    moved = {n for n in before if n in now and not torch.equal(before[n], now[n])}
    return sorted(set(before) - moved)


def train(guide, model: Callable, steps: int, *args: Any, lr: float = 0.02, elbo=None) -> list:
    """Plain SVI; the losses."""
    optimizer = pyro.optim.Adam({"lr": lr})
    svi = SVI(model, guide, optimizer, elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(steps)]


def mean_loss(guide, model: Callable) -> float:
    """The negative ELBO, always from the same random numbers."""
    elbo = Trace_ELBO(num_particles=2_000, vectorize_particles=True, max_plate_nesting=1)
    with pyro_seed(7), torch.no_grad():
        return elbo.loss(model, guide)


@contextmanager
def pyro_seed(seed: int) -> Iterator[None]:
    """Fixes the seed inside and puts the random state back after."""
    state = pyro.util.get_rng_state()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)


def in_fresh_process(subject: Subject, function: Callable, seed: int) -> None:
    """Runs ``function(subject)`` in a new interpreter, with another seed."""
    kind = type(subject)
    code = (
        "import importlib as i, pathlib, sys; m, c, g, f, p, seed, folder = sys.argv[1:];"
        "i.import_module(p).prepare(int(seed));"
        "getattr(i.import_module(g), f)(getattr(i.import_module(m), c)(pathlib.Path(folder)))"
    )
    names = [kind.__module__, kind.__qualname__, function.__module__, function.__qualname__]
    result = subprocess.run(
        [sys.executable, "-c", code, *names, __name__, str(seed), str(subject.folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    assert result.returncode == 0, f"in a fresh process: {last}"
