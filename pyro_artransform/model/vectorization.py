# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Vectorized evaluation of a model or guide at many draws, equal to evaluation one at a time.

There are three strategies, the fastest first:

- ``"plate"``: one run with all draws in an additional :class:`pyro.plate`, left of the model's plates;
- ``"vmap"``: one run under ``torch.vmap``;
- ``"loop"``: one run per draw.

Only the loop works for every model. A matrix-vector product and indexing by groups take no batch dimension on
the left; under vmap no branch depends on a draw, and no batched value is written into a tensor of zeros;
a sum over everything mixes draws without an error. So a strategy is accepted if it agrees with the loop
(:func:`equals_single_runs`): at points near the start and far away (:func:`choose_strategy`), and again at
draws that are used (:func:`vectorized`), since a branch such as ``if (z > 2).any()`` mixes draws only where
one takes it.

The evaluated function takes draws by name and their number, ``None`` for a single draw. It returns terms by
name: log densities by datum, or their sum.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._base.comparison import agree, round_off, tolerance
from .._base.time_limit import check_time
from .enumeration import ScaleError

Draws = Mapping[str, Tensor]
Terms = dict[str, Tensor]
Evaluate = Callable[[Draws, int | None], Terms]
Found = TypeVar("Found")

#: errors of a model at an impossible draw, such as one without a Cholesky factor
ModelFailures = (torch.linalg.LinAlgError, ValueError)
MIXED = "the log density of many draws at once differs from that of one at a time"
# code in these folders is not the user's
_LIBRARIES = (Path(__file__).parents[1], *(Path(str(m.__file__)).parent for m in (torch, pyro)))
# maximum number of entries of a tensor, draws included: five such tensors take 170 MB in float32
_MAX_VALUES = 2**23
# chunk size when a draw fails: only chunks with such a draw are looped over
_FEW = 32
#: number of draws at which strategies are compared, reached by repeating draws if there are fewer
NUM_COMPARED = 3
# relative to the usual tolerance; in float32 0.01 nats for a log density of 1e4, the round-off of its sum
_TIGHT = 0.01
# what torch.vmap says of a model, and what that means
_MEANING = {
    "data-dependent control flow": "A branch or a loop depends on the values of latents.",
    ".item()": "A Python number is made of the values of latents.",
    "inplace arithmetic": "Values of latents are written into a tensor.",
}
_DATA = vars(torch._C.TensorBase)["data"].__get__


#: how the terms ``(n, ...)`` of draws ``(n, ...)`` are evaluated, the fastest first
STRATEGIES = ("plate", "vmap", "loop")


def fastest(
    evaluate: Callable[[str], Found], agrees: Callable[[Found], bool], first: str = "plate"
) -> tuple[str, Found, str]:
    """The fastest strategy, what it gives, and why the next faster one fails; empty if it is the first.

    :param agrees: whether what a strategy gives agrees with single runs.
    :param first: the fastest strategy to try.
    """
    obstacle = ""
    for strategy in STRATEGIES[STRATEGIES.index(first) : -1]:
        try:
            found = evaluate(strategy)
            if agrees(found):
                return strategy, found, obstacle
        except Exception as error:  # any error means that the strategy does not work for the model
            obstacle = describe(error)
        else:
            obstacle = MIXED
    return "loop", evaluate("loop"), obstacle


def evaluate_many(
    evaluate: Evaluate,
    draws: Draws,
    strategy: str,
    at_failure: Callable[[Draws], Terms] | None = None,
    chunk_size: int | None = None,
) -> Terms:
    """The terms ``(n, ...)`` of many draws ``(n, ...)``.

    :param at_failure: returns the terms of a draw at which the model fails; by default the error is raised.
    :param chunk_size: the number of draws evaluated at once; by default all.
    """
    num_draws = _num_draws(draws)
    if chunk_size is not None and num_draws > chunk_size:
        parts = zip(*(value.split(chunk_size) for value in draws.values()))
        found = [evaluate_many(evaluate, dict(zip(draws, v)), strategy, at_failure) for v in parts]
        return {name: torch.cat([terms[name] for terms in found]) for name in found[0]}
    if strategy != "loop":
        # a single run works for every model
        run = _single if num_draws == 1 else _in_plate if strategy == "plate" else _under_vmap
        try:
            return run(evaluate, draws)
        except ModelFailures:
            if at_failure is None:
                raise
            with suppress(*ModelFailures), CholeskyOrNan():
                return run(evaluate, draws)
            if num_draws > _FEW:
                return evaluate_many(evaluate, draws, strategy, at_failure, _FEW)
    return _loop(evaluate, draws, at_failure)


def _in_plate(evaluate: Evaluate, draws: Draws) -> Terms:
    return evaluate(draws, _num_draws(draws))


def _under_vmap(evaluate: Evaluate, draws: Draws) -> Terms:
    def one(row: Draws) -> Terms:
        with OfSingleDraw():
            return evaluate(row, None)

    terms: Terms = torch.vmap(one, randomness="same")(draws)  # the same numbers for all draws
    return terms


def _single(evaluate: Evaluate, draws: Draws) -> Terms:
    return stack([evaluate({name: value[0] for name, value in draws.items()}, None)])


def _loop(evaluate: Evaluate, draws: Draws, at_failure: Callable[[Draws], Terms] | None) -> Terms:
    """One run per draw, each from the same random state: a model uses one mini-batch for all draws."""
    state, rows = torch.get_rng_state(), list[Terms]()
    for values in zip(*draws.values()):
        check_time()
        row = dict(zip(draws, values))
        torch.set_rng_state(state)
        try:
            rows.append(evaluate(row, None))
        except ModelFailures as error:
            if at_failure is None or isinstance(error, ScaleError):
                raise
            rows.append(at_failure(row))
    return stack(rows)


def stack(rows: list[Terms]) -> Terms:
    """Stacks the terms that all single draws have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def draws_at_a_time(num_values: float) -> int:
    """The number of draws that fit into memory, by the entries of one."""
    return max(int(_MAX_VALUES / num_values), 1)


def _num_draws(draws: Draws) -> int:
    return len(next(iter(draws.values())))


class OfSingleDraw(TorchFunctionMode):
    """Under ``torch.vmap``, permits ``torch.tensor`` of latents, and ``.data``, which Pyro reads."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and (first := _first_batched(args[0])) is not None:
            return _stacked(args[0], kwargs.get("dtype") or first.dtype, first.device)
        return args[0].detach() if func == _DATA else func(*args, **kwargs)


def _first_batched(value: Any) -> Tensor | None:
    """The first batched number in nested lists of numbers."""
    if isinstance(value, (list, tuple)):
        return next((found for v in value if (found := _first_batched(v)) is not None), None)
    return value if isinstance(value, Tensor) and is_batchedtensor(value) else None


def _stacked(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A differentiable ``torch.tensor`` of nested lists of numbers."""
    if isinstance(value, (list, tuple)):
        return torch.stack([_stacked(v, dtype, device) for v in value])
    if isinstance(value, Tensor):
        return value.reshape(()).to(dtype)
    return torch.full((), value, dtype=dtype, device=device)


class CholeskyOrNan(TorchFunctionMode):
    """Gives draws without a Cholesky factor a factor of NaN, in place of an error for all draws."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.linalg.cholesky:
            return func(*args, **(kwargs or {}))
        factor, info = torch.linalg.cholesky_ex(*args, **(kwargs or {}))
        return torch.where(info[..., None, None] == 0, factor, torch.nan)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that operations create."""

    num_values = 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # importing dynamo takes a second, and nothing here is compiled

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            sizes = [value.numel() for value in tree_leaves(found) if isinstance(value, Tensor)]
            self.num_values = max(self.num_values, max(sizes, default=0))
        return found


class Choice(NamedTuple):
    """The chosen strategy, with by-products of the comparison."""

    strategy: str
    obstacle: str  #: why the next faster strategy fails
    is_random: bool  #: whether terms depend on random numbers
    num_values: float  #: entries of the largest tensor, per draw


def choose_strategy(evaluate: Evaluate, draws: Draws) -> Choice:
    """The fastest strategy that agrees with single runs at three draws, or more until two are finite."""
    state = torch.get_rng_state()
    # another random state than in single runs, so that the comparison also shows whether terms are random
    other = torch.Generator().manual_seed(0).get_state()

    def run(strategy: str, rows: Sequence[int], state: Tensor) -> Terms:
        torch.set_rng_state(state)
        return evaluate_many(evaluate, _part(draws, list(rows)), strategy)

    single, failures, num_finite = dict[int, Terms](), list[Exception](), 0
    for i in range(_num_draws(draws)):
        if i >= NUM_COMPARED and num_finite > 1:
            break
        try:
            single[i] = run("loop", [i], state)
            num_finite += all(bool(term.isfinite().all()) for term in single[i].values())
        except Exception as error:  # the model fails at this draw
            failures.append(error)
    if not single:
        raise failures[0]
    repeated = [*islice(cycle(single), max(len(single), NUM_COMPARED))]

    def expected(rows: Sequence[int]) -> Terms:
        return {k: torch.cat([single[i][k] for i in rows]) for k in single[rows[0]]}

    def measured(strategy: str) -> tuple[Terms, bool, float]:
        rows = repeated[:1] if strategy == "loop" else repeated
        with LargestTensor() as largest:
            found = run(strategy, rows, other)
        num_values, is_random = largest.num_values / len(rows), False
        if not agree(found, expected(rows), round_off):
            found, before = run(strategy, rows, state), found
            is_random = not agree(found, before, round_off)
        return found, is_random, num_values

    def agrees(found: tuple[Terms, bool, float]) -> bool:
        return equals_single_runs(found[0], expected(repeated))

    strategy, (_, is_random, num_values), obstacle = fastest(measured, agrees)
    return Choice(strategy, obstacle, is_random, num_values)


def vectorized(
    evaluate: Evaluate,
    draws: Draws,
    scores: Callable[[Terms], Tensor],
    first: str,
    at_failure: Callable[[Draws], Terms] | None = None,
    chunk_size: int | None = None,
) -> tuple[str, Terms, str]:
    """Evaluates draws by the fastest strategy that agrees with single runs at some of them.

    These are 8 evenly spaced draws, and those with the lowest and the highest scores.

    :param scores: the scores ``(n, k)`` of draws with these terms.
    :param first: the fastest strategy to try, chosen by ``choose_strategy``.
    :return: the strategy, the terms, and why the next faster one fails.
    """
    state = torch.get_rng_state()

    def run(strategy: str, some: Draws) -> Terms:
        torch.set_rng_state(state)
        return evaluate_many(evaluate, some, strategy, at_failure, chunk_size)

    def agrees(found: tuple[str, Terms]) -> bool:
        strategy, terms = found
        rows, after = _rows_of(scores(terms)), torch.get_rng_state()
        num_copies = min(_num_draws(draws), chunk_size or _num_draws(draws))

        def of_copies(k: int) -> Terms:
            copies = {n: v[rows[k]].expand(num_copies, *v.shape[1:]) for n, v in draws.items()}
            return {name: term[0] for name, term in run(strategy, copies).items()}

        is_same = equals_single_runs(_part(terms, rows), run("loop", _part(draws, rows)), of_copies)
        torch.set_rng_state(after)
        return is_same

    def found_by(strategy: str) -> tuple[str, Terms]:
        return strategy, run(strategy, draws)

    strategy, (_, terms), obstacle = fastest(found_by, agrees, first)
    return strategy, terms, obstacle


def equals_single_runs(
    found: Terms, single: Terms, of_copies: Callable[[int], Terms] | None = None
) -> bool:
    """Whether the terms of draws that were evaluated together are those of single runs.

    :param of_copies: the terms of a draw in a batch of copies of it, for a strategy that was chosen before.
        They tell draws that are mixed, by however little, from an ill-conditioned density.
    """
    if of_copies is None or found.keys() != single.keys():
        return agree(found, single)
    gaps = list[Tensor]()
    for name, term in single.items():
        tol = _TIGHT * tolerance(term)
        # NaN in place of a number counts as the largest difference
        differs = (found[name] - term).abs().nan_to_num(torch.inf)
        differs[torch.isclose(found[name], term, tol, tol, equal_nan=True)] = 0.0
        gaps.append(differs.reshape(len(term), -1).amax(1).double())
    worst = torch.stack(gaps).amax(0)
    return all(
        agree(_part(found, k), of_copies(k), lambda term: _TIGHT * tolerance(term))
        for k in worst.argsort(descending=True)[:2].tolist()
        if worst[k] > 0
    )


def _rows_of(scores: Tensor) -> list[int]:
    n, k = scores.shape
    order, few = scores.argsort(0), max(4 // k, 1)
    extreme = torch.cat([order[:few], order[-few:]]).flatten().tolist()
    return sorted({*range(0, n, -(-n // 8)), *extreme})


def _part(terms: Draws, rows: Any) -> Terms:
    return {name: term[rows] for name, term in terms.items()}


def describe(error: Exception) -> str:
    """Describes an error in one line, with the line of the user's code that raised it."""
    words, *_ = f"{type(error).__name__}: {error}".splitlines()
    if words.startswith("RuntimeError: vmap"):
        words = next((meaning for said, meaning in _MEANING.items() if said in words), words)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.line and not any(path.is_relative_to(library) for library in _LIBRARIES):
            return f"{words} At {path.name}, line {frame.lineno}: {frame.line}"
    return words
