# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Models with enumerated latents at many draws at once, and one draw after the other; see vectorization.md.

    OMP_NUM_THREADS=1 python benchmarks/vectorization.py [MODEL ...] [--write]

Each model is a line of a file, so that a run goes on where the last one ended (delete it after a change).
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from marked_table import write
from results import Row, collect
from vectorization_models import EXAMPLES, subject

from pyro_artransform.model import LogJoint

HERE = Path(__file__).parent
NUM_DRAWS, FEW = 64, 4
# repeated until so many CPU seconds are over
_ENOUGH = 1.0


def milliseconds(log_joint: LogJoint, num_draws: int) -> float:
    """The least CPU time of the log density of draws near the start and its gradient."""
    torch.manual_seed(0)
    z = log_joint.start + 0.1 * torch.randn(num_draws, log_joint.latents.latent_dim)
    z.requires_grad_()
    found: list[float] = []
    while sum(found) < _ENOUGH:
        began = time.process_time()
        torch.autograd.grad(log_joint(z).sum(), z)
        found.append(time.process_time() - began)
    return 1000 * min(found)


def measured(name: str) -> Row:
    model, args = subject(name)
    log_joint = LogJoint(model, args)
    row: Row = {
        "model": name,
        "latents": log_joint.latents.latent_dim,
        "strategy": log_joint.strategy,
        "obstacle": log_joint.reason,
        "now": milliseconds(log_joint, NUM_DRAWS),
    }
    log_joint.strategy = "loop"
    row["loop"] = milliseconds(log_joint, FEW) * NUM_DRAWS / FEW
    return row


def table(rows: list[Row]) -> str:
    lines = [
        "| model | after | latents | strategy | ms, 64 draws | ms by loop | why by loop |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: [*EXAMPLES].index(row["model"])):
        example = EXAMPLES[row["model"]]
        lines.append(
            f"| {example.title} | {example.source} | {row['latents']:,} | {row['strategy']} "
            f"| {row['now']:,.0f} | {row['loop']:,.0f} | {row['obstacle']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *EXAMPLES], default=[])
    parser.add_argument("--results", type=Path, default=HERE / "vectorization.jsonl")
    parser.add_argument("--write", action="store_true", help="put the table into vectorization.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def runs(rows: list[Row]) -> Iterator[Row]:
        done = {row["model"] for row in rows}
        for name in options.models or EXAMPLES:
            if name not in done:
                yield measured(name)

    text = table(collect(options.results, runs))
    if options.write:
        write(text, HERE / "vectorization.md")
    else:
        print(text)


if __name__ == "__main__":
    main()
