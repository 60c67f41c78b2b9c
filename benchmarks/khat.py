# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""How many draws k-hat needs: weights whose index is known, and those of a funnel's guide.

    python benchmarks/khat.py [POSTERIOR ...] [--seeds 3]

Prints the mean and the standard deviation of k-hat by 10,000 and by 100,000 draws, and how often it is
on the wrong side of 0.7; then, for posteriors of benchmarks/flows.py (by default `centred`), what a
verdict says of a fit, and the quantiles of k-hat by many times as many draws of its guide.
"""

import pyro
import torch
from flows import POSTERIORS, set_up
from torch import Tensor

from pyro_artransform import AutoIAF, fit
from pyro_artransform.diagnostics import fit_tail
from pyro_artransform.diagnostics.importance_weights import log_weights

_LIMIT = 0.7
_REPEATS = {10_000: 400, 100_000: 200}
_KHATS = 0.5, 0.6, 0.65, 0.75, 0.8, 0.9
_DRAWS = 400_000


def khats(weights: Tensor, size: int) -> Tensor:
    """k-hat of each part of so many of the weights."""
    return torch.tensor([fit_tail(part).khat for part in weights.split(size)])


def too_narrow(khat: float, size: int) -> Tensor:
    """Log weights of a standard Normal, seen by a Normal of variance 1 - khat, which is their index."""
    return 0.5 * khat * torch.randn(size).square()


def known_index() -> None:
    print("| index | draws | k-hat | sd | wrong side of 0.7 (%) |\n|---|---|---|---|---|")
    for index in _KHATS:
        for size, repeats in _REPEATS.items():
            found = khats(too_narrow(index, size * repeats), size)
            is_wrong = (found > _LIMIT) != (index > _LIMIT)
            share = 100 * is_wrong.double().mean()
            print(f"| {index} | {size:,} | {found.mean():.2f} | {found.std():.2f} | {share:.0f} |")


def of_a_fit(posterior: str, seed: int) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = POSTERIORS[posterior]
    guide = AutoIAF(model)
    result = fit(model, guide, progress=False)
    _, weights = log_weights(model, guide, _DRAWS)
    said = f"{result.khat:.2f} by {result.num_samples:,}"
    cells = []
    for size in (10_000, 100_000):
        low, median, high = khats(weights, size).quantile(torch.tensor([0.1, 0.5, 0.9]))
        cells.append(f"{low:.2f}, {median:.2f}, {high:.2f}")
    whole = khats(weights, _DRAWS).item()
    print(f"| {posterior} | {seed} | {said} | {' | '.join(cells)} | {whole:.2f} |", flush=True)


def main() -> None:
    args = set_up(__doc__.splitlines()[0], num_seeds=3)
    posteriors = ["centred"] if args.posteriors == [*POSTERIORS] else args.posteriors
    torch.manual_seed(0)
    known_index()
    print(
        "\n| posterior | seed | verdict | by 10,000 | by 100,000 | by 400,000 |\n|---|---|---|---|---|---|"
    )
    for posterior in posteriors:
        for seed in range(args.seeds):
            of_a_fit(posterior, seed)


if __name__ == "__main__":
    main()
