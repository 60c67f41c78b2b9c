# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a step costs: one of plain SVI beside Pyro's AutoIAFNormal, by Pyro and by PyTorch, and one of `fit`.

    python benchmarks/steps.py [--dims 10 50 200] [--particles 1 16 64] [--steps 200] [--base FOLDER]

Subjects take turns step by step in one process. Prints medians of CPU milliseconds, and the median of
ratios of neighbouring steps. The folder is a checkout of another version, to compare with.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal
from torch.profiler import ProfilerActivity, profile

import pyro_artransform

Step = Callable[[], object]
_WARM_UP = 20


def import_from(folder: Path) -> ModuleType:
    """The package of another checkout under another name, which its relative imports allow."""
    name, place = "other_version", folder / "pyro_artransform"
    spec = importlib.util.spec_from_file_location(
        name, place / "__init__.py", submodule_search_locations=[str(place)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def standard_normal(dim: int) -> None:
    """A model that costs next to nothing."""
    pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def pyro_guide(model: partial[None]) -> AutoIAFNormal:
    """Pyro's guide, whose hidden layers may not be narrower than its input."""
    return AutoIAFNormal(model, num_transforms=3, hidden_dim=[max(64, *model.args)] * 2)


def narrow_guide(model: partial[None]) -> pyro_artransform.AutoIAF:
    """This package's guide with a layer as wide as one of Pyro's: two thirds of the weights."""
    return pyro_artransform.AutoIAF(model, hidden_dims=max(64, *model.args))


def svi_step(make_guide: Callable[..., object], dim: int, num_particles: int) -> Step:
    model = partial(standard_normal, dim)
    options = {"max_plate_nesting": 0, "vectorize_particles": True}
    loss = Trace_ELBO(num_particles=num_particles, **options)
    guide = make_guide(model)
    guide()
    return SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss).step


def torch_step(make_guide: Callable[..., object], dim: int, num_particles: int) -> Step:
    """The same with one optimizer of PyTorch, where Pyro's has one for each parameter."""
    model = partial(standard_normal, dim)
    options = {"max_plate_nesting": 0, "vectorize_particles": True}
    loss = Trace_ELBO(num_particles=num_particles, **options)(model, make_guide(model))
    loss()  # makes the parameters
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def fit_step(package: ModuleType, dim: int, num_particles: int) -> Step:
    """A step as `fit` takes it, for a density without Pyro."""
    inner = {}
    names = ("config", *(f"optimization.{name}" for name in ("objective", "schedule", "training")))
    for name in names:
        inner[name] = importlib.import_module(f"{package.__name__}.inference.{name}")
    # under a name of its own in Pyro's store
    guide = type(package.__name__, (package.AutoIAF,), {})(partial(standard_normal, dim))
    guide()
    config = inner["config"].FitConfig().optimization
    density = FreeDensity(dim)
    objective = inner["optimization.objective"].PathObjective(density, guide)
    schedule = inner["optimization.schedule"].Schedule(config).of_length(1_000_000)
    training = inner["optimization.training"].Training
    step: Step = training(objective, schedule, num_particles, None, guide).step
    return step


class FreeDensity:
    """The standard Normal, as the log joint density of a model."""

    def __init__(self, dim: int) -> None:
        self.start = torch.zeros(dim)
        self.latents = SimpleNamespace(latent_dim=dim)
        self.strategy = "loop"  # so that no step is captured

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return -0.5 * z.square().sum(-1)


def interleaved(subjects: dict[str, Step], num_steps: int) -> dict[str, list[float]]:
    """CPU milliseconds of each step of each subject."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(_WARM_UP + num_steps):
        for name, step in subjects.items():
            begin = time.process_time()
            step()
            times[name].append(1e3 * (time.process_time() - begin))
    return {name: found[_WARM_UP:] for name, found in times.items()}


def compare(label: str, subjects: dict[str, Step], num_steps: int) -> None:
    """Prints a row: medians, and how many times as long the others are as the first."""
    times = interleaved(subjects, num_steps)
    first, *others = times
    cells = [f"{statistics.median(found):.2f}" for found in times.values()]
    for name in others:
        ratios = [b / a for a, b in zip(times[first], times[name])]
        cells.append(f"{statistics.median(ratios):.2f}")
    print(f"| {label} | {' | '.join(cells)} |", flush=True)


def header(label: str, names: list[str]) -> None:
    columns = [label, *names, *(f"{name} / {names[0]}" for name in names[1:])]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def count_operations(step: Step) -> int:
    """How many operations of PyTorch one step is, the inner ones included."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return sum(event.count for event in found.key_averages() if event.key.startswith("aten::"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base", type=Path)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    packages = {"AutoIAF": pyro_artransform}
    if args.base is not None:
        packages["before"] = import_from(args.base)

    guides: dict[str, Callable[..., object]] = {"AutoIAFNormal": pyro_guide}
    for name, package in packages.items():
        # under names of their own in Pyro's store
        guides[name] = type(f"Guide{len(guides)}", (package.AutoIAF,), {})
    guides["narrow"] = narrow_guide
    header("SVI: D, particles", list(guides))
    for dim in args.dims:
        for count in args.particles:
            pyro.clear_param_store()
            steps = {name: svi_step(guide, dim, count) for name, guide in guides.items()}
            compare(f"{dim}, {count}", steps, args.steps)

    header("one optimizer: D, particles", ["AutoIAFNormal by SVI", "AutoIAFNormal", "AutoIAF"])
    for dim in args.dims:
        for count in args.particles:
            pyro.clear_param_store()
            steps = {"SVI": svi_step(pyro_guide, dim, count)}
            pyro.clear_param_store()
            steps["AutoIAFNormal"] = torch_step(pyro_guide, dim, count)
            steps["AutoIAF"] = torch_step(pyro_artransform.AutoIAF, dim, count)
            compare(f"{dim}, {count}", steps, args.steps)

    header("fit: D, draws", list(packages))
    pyro.clear_param_store()
    for dim, count in [(4, 64), *((dim, 64) for dim in args.dims)]:
        fits = {name: fit_step(package, dim, count) for name, package in packages.items()}
        compare(f"{dim}, {count}", fits, args.steps)
        operations = ", ".join(f"{name} {count_operations(step)}" for name, step in fits.items())
        print(f"operations: {operations}", file=sys.stderr)


if __name__ == "__main__":
    main()
