# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Passes over ratings of users and items by several processes, and by the first alone.

    torchrun --nproc-per-node 2 benchmarks/processes.py [--sizes 1000 1500 100000] [--batch 1000]

Prints seconds (CPU seconds of the first process) of the pass that finds which elements rows read, of the
Gaussian at which the guide starts, and of the verdict's 400 draws; and the largest differences between both:
of means and precisions in posterior sds, and of log densities in nats.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from models.crossed import Crossed
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_artransform._base.processes import Processes, open_processes
from pyro_artransform.inference.all_batches import full_data_density
from pyro_artransform.inference.initialization.natural_gradient import fit_gaussian
from pyro_artransform.inference.loader import BatchStream
from pyro_artransform.model import LogJoint
from pyro_artransform.model.elements import ElementTerms

_NUM_DRAWS = 400


def timed(function: Callable[[], Any]) -> tuple[str, Any]:
    """Wall and CPU seconds, and what the function returns."""
    began, began_cpu = time.perf_counter(), time.process_time()
    found = function()
    cpu = time.process_time() - began_cpu
    return f"{time.perf_counter() - began:.2f} ({cpu:.2f})", found


def first_pass(log_joint: LogJoint, stream: BatchStream, processes: Any) -> tuple[Any, Any]:
    """The density of all data, and which elements its rows read."""
    density = full_data_density(log_joint, stream, processes)
    parts = (part for _, part in density.parts())
    return density, ElementTerms.of(density, parts, processes)


def passes(density: Any, terms: Any) -> tuple[list[str], list[Tensor]]:
    """Seconds, and the mean, the product of the precision with scaled sds, and log densities of draws."""
    of_gaussian, (gaussian, *_) = timed(partial(fit_gaussian, density, terms))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_NUM_DRAWS, len(gaussian.loc), generator=generator, dtype=torch.float64)
    draws = gaussian.loc + gaussian.conditional_sd * noise
    with torch.no_grad():
        of_verdict, values = timed(partial(density, draws.to(density.start)))
    sd = gaussian.conditional_sd
    product = sd * gaussian.precision.times(sd[:, None])[:, 0]
    return [of_gaussian, of_verdict], [gaussian.loc / sd, product, values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=3, default=[1000, 1500, 100_000])
    parser.add_argument("--batch", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = Crossed(*args.sizes)
    data = model.data()._replace(y=model.data().y.double())
    with open_processes() as parallel:
        pyro.set_rng_seed(0)
        whole = BatchStream(DataLoader(TensorDataset(*data), args.batch, shuffle=True))
        log_joint, rows = LogJoint(model, *next(whole.one_pass(1))), []
        own = whole.share(parallel, 0) if parallel.size > 1 else whole
        for stream, processes in ((whole, Processes()), (own, parallel)):
            seconds, found = "", (None, None)
            if processes is parallel or parallel.rank == 0:
                seconds, found = timed(partial(first_pass, log_joint, stream, processes))
            parallel.any(False)  # the others wait
            more, numbers = parallel.first("passes", partial(passes, *found))
            rows.append(([seconds, *more], numbers))
        if parallel.rank == 0:
            print("| processes | first pass, s | Gaussian, s | verdict, s |\n|---|---|---|---|")
            for count, (times, _) in zip((1, parallel.size), rows):
                print(f"| {count} | {' | '.join(times)} |")
            pairs = zip(rows[0][1], rows[1][1])
            print("differences", *(f"{float((a - b).abs().max()):.1e}" for a, b in pairs))


if __name__ == "__main__":
    main()
