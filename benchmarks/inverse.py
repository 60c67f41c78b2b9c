# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""What a direction and its gradient cost, beside Pyro, Zuko and nflows, in one process.

    python benchmarks/inverse.py [--quick] [--out FOLDER]

One layer with two hidden layers of the same widths everywhere, ReLU, float32, one thread, all weights at
PyTorch's default scale, the last layer's too. The libraries take turns of 20 ms or one call, so that a slow
moment of the machine hits all of them; figures are medians of single calls. Writes inverse.md (tables) and
inverse.png.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import nflows.transforms
import pyro.distributions.transforms as pyro_transforms
import torch
import zuko
from pyro.nn import AutoRegressiveNN
from torch.profiler import ProfilerActivity, profile

import pyro_artransform as pa
from pyro_artransform.testing import redraw

SIZES = {8: 64, 32: 128, 128: 256, 512: 1024}
BATCHES = (1, 64, 1024)
OPERATIONS = ("forward", "inverse", "gradient")
SECONDS = 1.0  # of each operation of each library, about
TURN = 0.02
SLOW = 4.0  # what takes longer is timed once
MEMORY = 8e9  # bytes; a gradient that keeps more copies of the weights than this is not started
LIMIT = 30.0  # what is expected to take longer, from the batch before, is not started
TRAINED = """Our layer after 500 steps of Adam on the likelihood of 2,000 rows: of an autoregression with
skewed innovations (skewed), and of a random walk to which the square of its previous value is added
(curved)."""


class Ours:
    name = "pyro_artransform"

    def __init__(self, family: str, dim: int, width: int) -> None:
        build = {"affine": pa.affine_autoregressive, "spline": pa.spline_autoregressive}[family]
        self.module = redraw(build(dim, [width, width], nonlinearity=torch.nn.ReLU()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.call_and_ladj(x)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self.module.inverse_and_ladj(y)[0]


class Pyro:
    name = "Pyro"

    def __init__(self, family: str, dim: int, width: int) -> None:
        if family == "affine":
            network = AutoRegressiveNN(dim, [width, width])
            self.module = pyro_transforms.AffineAutoregressive(network)
        else:
            network = AutoRegressiveNN(dim, [width, width], param_dims=[8, 8, 7])
            self.module = pyro_transforms.SplineAutoregressive(
                dim, network, count_bins=8, bound=5.0, order="quadratic"
            )
        redraw(self.module)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.view(x.shape)  # another object, which its cache does not know
        y = self.module(x)
        return y, self.module.log_abs_det_jacobian(x, y)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self.module._inverse(y)


class Zuko:
    name = "Zuko"

    def __init__(self, family: str, dim: int, width: int) -> None:
        hidden = {"hidden_features": (width, width)}
        if family == "spline":
            shapes = [(8,), (8,), (7,)]
            hidden |= {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": shapes}
        self.module = zuko.flows.MaskedAutoregressiveTransform(dim, **hidden)
        redraw(self.module)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module().call_and_ladj(x)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self.module().inv(y)


class NFlows:
    name = "nflows"

    def __init__(self, family: str, dim: int, width: int) -> None:
        if family != "affine":
            raise NotImplementedError
        self.module = nflows.transforms.MaskedAffineAutoregressiveTransform(
            dim, width, num_blocks=1, use_residual_blocks=False, activation=torch.nn.functional.relu
        )
        redraw(self.module)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.module.forward(x)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return self.module.inverse(y)[0]


PEERS = {"affine": (Ours, Pyro, Zuko, NFlows), "spline": (Ours, Pyro, Zuko)}


def operation(library, name: str, x: torch.Tensor) -> Callable[[], object]:
    """One operation, as a function of nothing."""
    parameters = list(library.module.parameters())

    def gradient() -> object:
        y = x.clone().requires_grad_()
        loss = library.inverse(y).square().sum()
        return torch.autograd.grad(loss, [y, *parameters], allow_unused=True)

    def without_graph(function: Callable[[torch.Tensor], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return function(x)

        return run

    if name == "gradient":
        return gradient
    return without_graph(library.forward if name == "forward" else library.inverse)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, the libraries taking turns of at least TURN seconds."""
    times = {name: [seconds(function)] for name, function in functions.items()}
    quick = [name for name in functions if times[name][0] < SLOW]
    for name in quick:
        times[name] = [seconds(functions[name])]  # the first call also allocates
    calls = {name: max(1, int(TURN / times[name][0])) for name in quick}
    longest = max((max(times[name][0], TURN) for name in quick), default=SECONDS)
    for _ in range(max(4, min(40, int(SECONDS / longest)))):
        for name in quick:
            times[name] += [seconds(functions[name]) for _ in range(calls[name])]
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(function: Callable[[], object]) -> int:
    """The largest number of bytes held at once during a call, by torch.profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def exact_error(ours: Ours, y: torch.Tensor) -> float:
    """The largest difference of the float32 inverse and the float64 one, which inverts exactly."""
    double = copy.deepcopy(ours.module).double()
    with torch.no_grad():
        x = double.inverse_and_ladj(y.double())[0]
        residual = (double.call_and_ladj(x)[0] - y).abs().max().item()
        if residual > 1e-9:
            raise RuntimeError(f"the float64 inverse is off by {residual}")
        return (ours.inverse(y) - x).abs().max().item()


def measure(family: str, dim: int, batch: int, before: dict[str, float]) -> list[dict]:
    """A row for each operation; ``before`` holds the seconds that the batch before took, by name."""
    torch.manual_seed(0)
    libraries = [make(family, dim, SIZES[dim]) for make in PEERS[family]]
    x = torch.randn(batch, dim)
    rows = []
    for name in OPERATIONS:
        keys = {library.name: f"{family} {name} {library.name} {dim}" for library in libraries}
        functions = {
            library.name: operation(library, name, x)
            for library in libraries
            # each batch is at most 64 times the one before and takes at most some 16 times as long
            if before.get(keys[library.name], 0.0) * 16 <= LIMIT and fits(library, name, dim)
        }
        found = medians(functions)
        before |= {keys[n]: t for n, t in found.items()}
        before |= {key: LIMIT for n, key in keys.items() if n not in found}
        row = {"family": family, "D": dim, "batch": batch, "operation": name}
        row["ms"] = {n: 1e3 * t for n, t in found.items()}
        row["peak MB"] = {n: peak_memory(f) / 1e6 for n, f in functions.items() if found[n] < SLOW}
        rows.append(row)
    rows[1]["error"] = exact_error(libraries[0], x)
    graph = operation_forward_backward(libraries[0], x)
    rows[2]["own forward and backward"] = {
        "ms": 1e3 * statistics.median(seconds(graph) for _ in range(5)),
        "peak MB": peak_memory(graph) / 1e6,
    }
    return rows


def operation_forward_backward(library: Ours, x: torch.Tensor) -> Callable[[], object]:
    parameters = list(library.module.parameters())

    def run() -> object:
        given = x.clone().requires_grad_()
        y, ladj = library.forward(given)
        return torch.autograd.grad(y.square().sum() + ladj.sum(), [given, *parameters])

    return run


def fits(library, name: str, dim: int) -> bool:
    """Whether D passes, each of which keeps its masked weights for the gradient, fit in memory."""
    size = 4 * sum(p.numel() for p in library.module.parameters())
    return isinstance(library, Ours) or name != "gradient" or size * dim < MEMORY


def table(rows: list[dict], family: str, name: str) -> str:
    """Milliseconds of each library, and how many times faster ours is than the fastest peer."""
    names = [make.name for make in PEERS[family]]
    head = f"| D, hidden, batch | {' | '.join(names)} | fastest peer / ours |"
    lines = [head, "|" + "---|" * (len(names) + 2)]
    for row in rows:
        if row["family"] != family or row["operation"] != name:
            continue
        ms = row["ms"]
        peers = [ms[n] for n in names[1:] if n in ms]
        ratio = f"{min(peers) / ms[names[0]]:.1f}" if peers else ""
        cells = " | ".join(f"{ms[n]:.3g}" if n in ms else "not run" for n in names)
        lines.append(f"| {row['D']}, {SIZES[row['D']]}, {row['batch']} | {cells} | {ratio} |")
    return "\n".join(lines)


def memory_table(rows: list[dict]) -> str:
    names = [make.name for make in PEERS["affine"]]
    lines = [f"| D, hidden, batch | {' | '.join(names)} | ours / own forward and backward |"]
    lines.append("|" + "---|" * (len(names) + 2))
    for row in rows:
        if row["operation"] != "gradient" or row["family"] != "affine":
            continue
        peak, own = row["peak MB"], row["own forward and backward"]
        cells = " | ".join(f"{peak[n]:.3g}" if n in peak else "" for n in names)
        ratio = peak[names[0]] / own["peak MB"]
        lines.append(f"| {row['D']}, {SIZES[row['D']]}, {row['batch']} | {cells} | {ratio:.2f} |")
    return "\n".join(lines)


def skewed(count: int, dim: int) -> torch.Tensor:
    """An autoregression of order one with a correlation of 0.8, and skewed innovations."""
    x = torch.zeros(count, dim)
    for i in range(dim):
        x[:, i] = 0.8 * x[:, i - 1] + 0.6 * torch.distributions.Gumbel(0.0, 1.0).sample((count,))
    return (x - x.mean(0)) / x.std(0)


def curved(count: int, dim: int) -> torch.Tensor:
    """A random walk, to which the square of its previous value is added."""
    x = torch.randn(count, dim).cumsum(-1) / dim**0.5
    x[:, 1:] += x[:, :-1].clone() ** 2
    return (x - x.mean(0)) / x.std(0)


def trained_table() -> str:
    """How long the inverse takes after a layer was fitted to data, in evaluations of its network."""
    lines = [
        "| data | D, hidden | forward, ms | inverse, ms | inverse / forward |",
        "|---|---|---|---|---|",
    ]
    for make in (skewed, curved):
        for dim, width in list(SIZES.items())[:3]:
            torch.manual_seed(0)
            ours, data = Ours("affine", dim, width), make(2000, dim)
            optimizer = torch.optim.Adam(ours.module.parameters(), lr=3e-3)
            for _ in range(500):
                optimizer.zero_grad()
                noise, ladj = ours.forward(data)
                (0.5 * noise.square().sum(-1) - ladj).mean().backward()
                optimizer.step()
            noise = ours.forward(data[:64])[0].detach()
            ways = {"forward": data[:64], "inverse": noise}
            ms = medians({name: operation(ours, name, x) for name, x in ways.items()})
            forward, inverse = 1e3 * ms["forward"], 1e3 * ms["inverse"]
            row = f"{dim}, {width} | {forward:.3g} | {inverse:.3g} | {inverse / forward:.0f}"
            lines.append(f"| {make.__name__} | {row} |")
    return "\n".join(lines)


def report(rows: list[dict], trained: str) -> str:
    parts = ["# Forward, inverse and gradient, in milliseconds", __doc__.split("\n\n")[2]]
    for family in PEERS:
        for name in OPERATIONS:
            title = "gradient through the inverse" if name == "gradient" else name
            parts += [f"## {family}, {title}", table(rows, family, name)]
    parts += [
        "## affine, peak memory of the gradient through the inverse, in MB",
        memory_table(rows),
    ]
    worst = max(row["error"] for row in rows if "error" in row)
    parts.append(f"Largest difference of our float32 inverse from the float64 one: {worst:.2g}.")
    parts += ["## affine, trained, 64 rows", TRAINED, trained]
    return "\n\n".join(parts) + "\n"


def picture(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    colors = {"pyro_artransform": "tab:blue", "Pyro": "tab:orange", "Zuko": "tab:green"}
    colors["nflows"] = "tab:red"
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharey=True, layout="constrained")
    panels = [(f, by) for f in PEERS for by in ("D", "batch")]
    for ax, (family, by) in zip(axes.flat, panels):
        fixed, value = ("batch", 64) if by == "D" else ("D", 128)
        for make in PEERS[family]:
            for name, style in (("forward", ":"), ("inverse", "-")):
                chosen = [
                    row
                    for row in rows
                    if (row["family"], row["operation"], row[fixed]) == (family, name, value)
                    and make.name in row["ms"]
                ]
                ax.loglog(
                    [row[by] for row in chosen],
                    [row["ms"][make.name] for row in chosen],
                    style,
                    marker="o",
                    color=colors[make.name],
                    label=f"{make.name}, {name}",
                )
        ax.set_title(f"{family}, {fixed} = {value}")
        ax.set_xlabel("dimension D" if by == "D" else "batch size")
        ax.grid(alpha=0.3)
    for ax in axes[:, 0]:
        ax.set_ylabel("milliseconds")
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="D of 8 and 32 only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, before, trained = [], {}, trained_table()
    for family in PEERS:
        for dim in list(SIZES)[: 2 if args.quick else None]:
            for batch in BATCHES:
                rows += measure(family, dim, batch, before)
                for row in rows[-len(OPERATIONS) :]:
                    times = ", ".join(f"{n} {t:.3g}" for n, t in row["ms"].items())
                    print(f"{family} D={dim} batch={batch} {row['operation']}: {times}", flush=True)
                (args.out / "inverse.md").write_text(report(rows, trained))
    picture(rows, args.out / "inverse.png")


if __name__ == "__main__":
    main()
