# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Vectorized evaluation of a model or guide at many draws, equal to evaluation one at a time.

There are four strategies, the fastest first:

- ``"plate"``: one run with all draws in an additional :class:`pyro.plate`, left of the model's plates;
- ``"vmap"``: one run under ``torch.vmap``, or one for each path that draws take through the branches of a
  model (see ``model.paths``);
- ``"copies"``: like ``"vmap"``, but each draw has its own copy of each tensor that the model makes;
- ``"loop"``: one run per draw.

Only the loop works for every model. A matrix-vector product and indexing by groups take no batch dimension on
the left; under vmap no batched value can be written into a tensor of zeros, as Pyro's ``OrderedLogistic``
does; a sum over everything mixes draws without an error. So each strategy is compared with the loop
(:func:`choose_strategy`, ``LogJoint.checked``).

The evaluated function takes draws by name and their number, ``None`` for a single draw. It returns terms by
name: log densities by datum, or their sum.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._base.time_limit import check_time
from .enumeration import ScaleError
from .graphs.dependencies import ROUND_OFF
from .handlers import SiteLogProbs, hidden_sites
from .paths import Draws, Evaluate, ManyPathsError, Terms, evaluate_by_path
from .traces import latent_nodes, plate_nesting, runs_model

STRATEGIES = ("plate", "vmap", "copies", "loop")
#: errors of a model at an impossible draw, such as one without a Cholesky factor
ModelFailures = (torch.linalg.LinAlgError, ValueError)
DRAWS = "_draws"  #: name of the plate of draws
MIXED = "the log density of many draws at once differs from that of one at a time"
_LOG_PROB = "_log_prob"
# code in these folders is not the user's
_LIBRARIES = (Path(__file__).parents[1], *(Path(str(m.__file__)).parent for m in (torch, pyro)))
# maximum number of entries of a tensor, draws included: five such tensors take 170 MB in float32
_MAX_VALUES = 2**23
# chunk size when a draw fails: only chunks with such a draw are looped over
_FEW = 32
#: number of draws at which strategies are compared, reached by repeating draws if there are fewer
NUM_COMPARED = 3


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
    try:
        if strategy != "loop":
            return _at_once(evaluate, draws, strategy)
    except ManyPathsError:
        pass
    except ModelFailures:
        if at_failure is None:
            raise
        with suppress(ManyPathsError, *ModelFailures), CholeskyOrNan():
            return _at_once(evaluate, draws, strategy)
        if num_draws > _FEW:
            return evaluate_many(evaluate, draws, strategy, at_failure, _FEW)
    # each run starts from the same random state, so that a model uses one mini-batch for all draws
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


def _at_once(evaluate: Evaluate, draws: Draws, strategy: str) -> Terms:
    num_draws = _num_draws(draws)
    if num_draws == 1:  # a single run works for every model
        return stack([evaluate({name: value[0] for name, value in draws.items()}, None)])
    if strategy == "plate":
        return evaluate(draws, num_draws)
    return evaluate_by_path(evaluate, draws, has_copies=strategy == "copies")


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


def draws_at_a_time(num_values: float) -> int:
    """The number of draws that fit into memory, by the entries of one."""
    return max(int(_MAX_VALUES / num_values), 1)


def stack(rows: list[Terms]) -> Terms:
    """Stacks the terms that all single draws have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: torch.stack([row[name] for row in rows]) for name in names}


class Choice(NamedTuple):
    """The chosen strategy, with by-products of the comparison."""

    strategy: str
    obstacle: str  #: why the next faster strategy fails
    is_random: bool  #: whether terms depend on random numbers
    num_values: float  #: entries of the largest tensor, per draw


def choose_strategy(evaluate: Evaluate, draws: Draws, num_single: int | None = None) -> Choice:
    """Chooses the fastest strategy that agrees with single runs at some draws.

    :param num_single: the number of leading draws to compare, by default all; more until two are finite.
    """
    state, obstacle = torch.get_rng_state(), ""
    # another random state than in single runs, so that the comparison also shows whether terms are random
    other = torch.Generator().manual_seed(0).get_state()

    def run(strategy: str, rows: Sequence[int], state: Tensor) -> Terms:
        torch.set_rng_state(state)
        return evaluate_many(evaluate, {k: v[list(rows)] for k, v in draws.items()}, strategy)

    single, failures, num_finite = dict[int, Terms](), list[Exception](), 0
    for i in range(_num_draws(draws)):
        if num_single is not None and i >= num_single and num_finite > 1:
            break
        try:
            single[i] = run("loop", [i], state)
            num_finite += all(bool(term.isfinite().all()) for term in single[i].values())
        except Exception as error:  # the model fails at this draw
            failures.append(error)
    if not single:
        raise failures[0]
    rows = [*islice(cycle(single), max(len(single), NUM_COMPARED))]
    is_random, num_values = False, 1.0
    for strategy in STRATEGIES:
        rows = rows[:1] if strategy == "loop" else rows
        wanted = {k: torch.cat([single[i][k] for i in rows]) for k in single[rows[0]]}
        try:
            with LargestTensor() as largest:
                found = run(strategy, rows, other)
            num_values = largest.num_values / len(rows)
            if is_random := not agree(found, wanted, slack=None):
                found, before = run(strategy, rows, state), found
                is_random = not agree(found, before, slack=None)
        except Exception as error:  # any error means that the strategy does not work for the model
            obstacle = describe(error)
            continue
        if strategy == "loop" or agree(found, wanted):
            break
        obstacle = MIXED
    return Choice(strategy, obstacle, is_random, num_values)


def _num_draws(draws: Draws) -> int:
    return len(next(iter(draws.values())))


def nonfinite_sites(run: Callable[[], object], values: Draws) -> list[str]:
    """The sites whose log density is not finite at some of the values ``(n,) + site shape``."""
    found = list[str]()
    for row in zip(*values.values()):
        scored = SiteLogProbs(dict(zip(values, row)))
        try:
            with pyro.validation_enabled(False), hidden_sites(), scored:
                run()
        except ModelFailures as error:
            found.append(f"the model itself ({error})")
        else:
            found += [k for k, v in scored.log_probs.items() if not v.sum().isfinite()]
    return list(dict.fromkeys(found))


def describe(error: Exception) -> str:
    """Describes an error in one line, with the line of the user's code that raised it."""
    words, *_ = f"{type(error).__name__}: {error}".splitlines()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.line and not any(path.is_relative_to(library) for library in _LIBRARIES):
            return f"{words} At {path.name}, line {frame.lineno}: {frame.line}"
    return words


def tolerance(terms: Tensor) -> float:
    """Relative and absolute tolerance for the round-off of terms, also of ill-conditioned ones."""
    return 1e-4 if terms.dtype == torch.float32 else 1e-8


def agree(found: Terms, expected: Terms, slack: float | None = 1.0) -> bool:
    """Whether terms agree up to round-off times a slack, with NaN in the same places.

    :param slack: a factor for ``tolerance``; ``None`` allows only the round-off of a sum.
    """
    if found.keys() != expected.keys():
        return False
    for name, wanted in expected.items():
        round_off = ROUND_OFF * torch.finfo(wanted.dtype).eps
        tol = round_off if slack is None else slack * tolerance(wanted)
        same_shape = found[name].shape == wanted.shape
        if not (same_shape and torch.allclose(found[name], wanted, tol, tol, equal_nan=True)):
            return False
    return True


class DrawPlate(NamedTuple):
    """The plate of draws, left of all plates of a model."""

    size: int | None  #: the number of draws, or ``None`` for a single draw, without this plate
    num_plates: int  #: the number of dimensions that the plates of the model take

    def place(self, values: Draws, event_dims: Mapping[str, int]) -> Terms:
        """Reshapes values ``(n,) + site shape`` so that draws are left of all plates."""
        placed = dict(values)
        if self.size is None:
            return placed
        for name, value in values.items():
            padding = (1,) * (self.num_plates + 1 + event_dims[name] - value.dim())
            placed[name] = value.reshape(value.shape[:1] + padding + value.shape[1:])
        return placed

    def run(self, model: Callable[[], object]) -> None:
        """Runs a model in the plate."""
        plate = self.size and pyro.plate(DRAWS, self.size, dim=-1 - self.num_plates)
        with plate or nullcontext():
            model()

    def total(self, log_probs: Mapping[str, Tensor], initial: Tensor) -> Tensor:
        """Sums log densities of sites over all dimensions but the draws, and adds ``initial``."""
        for log_prob in log_probs.values():
            if self.size is None:
                initial = initial + log_prob.sum()
            elif log_prob.dim() == 1 + self.num_plates:
                initial = initial + log_prob.reshape(log_prob.shape[0], -1).sum(-1)
            else:
                raise ValueError(
                    f"expected {1 + self.num_plates} batch dimensions, got {log_prob.dim()}"
                )
        return initial


class GuideSampler:
    """Draws from a guide, with log densities; vectorized by a plate if that agrees with single runs."""

    def __init__(self, run: Callable[[], object], num_plates: int = 0) -> None:
        with poutine.block():
            trace = poutine.trace(run).get_trace()
        self._run, self._num_plates = run, max(num_plates, plate_nesting(trace))
        #: shapes by latent, auxiliary ones included
        self.shapes = {node["name"]: node["value"].shape for node in latent_nodes(trace)}
        self._runs_model, self._indices = runs_model(trace), Terms()
        self.is_vectorized = False
        with suppress(Exception):  # any error means that the guide does not vectorize
            drawn = self._evaluate({}, NUM_COMPARED)
            self.is_vectorized = agree(drawn, evaluate_many(self._evaluate, drawn, "loop"))

    def __call__(self, n: int) -> tuple[Terms, Tensor]:
        """Draws by site, ``(n,) + site shape``, and their log densities ``(n,)``."""
        if self.is_vectorized:
            drawn = self._evaluate({}, n)
        else:
            drawn = stack([self._evaluate({}, None) for _ in range(n)])
        return drawn, drawn.pop(_LOG_PROB)

    def _evaluate(self, given: Draws, size: int | None) -> Terms:
        """Values of all sites and their log density; draws sites that are not in ``given``."""
        scored = SiteLogProbs({**self._indices, **given} if given else {})
        plate = DrawPlate(size, self._num_plates)
        with poutine.block(), scored:
            plate.run(self._run)
        batch = () if size is None else (size,)
        found = {k: scored.values[k].reshape(batch + shape) for k, shape in self.shapes.items()}
        # single runs at these draws see the same subsamples
        self._indices = {k: v for k, v in scored.values.items() if k not in scored.log_probs}
        zero = next(iter(found.values())).new_zeros(batch)
        names = self.shapes if self._runs_model else scored.log_probs  # without the model's data
        counted = {name: scored.log_probs[name] for name in names}
        return {**found, _LOG_PROB: plate.total(counted, zero)}
