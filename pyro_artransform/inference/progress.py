# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""The progress bar of a fit."""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

_SHOWN = 50


class ProgressBar:
    """A bar of ``tqdm`` with the mean ELBO of the last steps; none where ``tqdm`` is not installed.

    :param shown: whether there is to be one.
    """

    def __init__(self, shown: bool) -> None:
        self._bar: Any = _new_bar() if shown else None

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, what: str) -> None:
        """Shows what is being done."""
        if self._bar is not None:
            self._bar.set_description(what)

    def update(
        self, losses: Sequence[float], total: int | None, epoch: str = "", batch: str = ""
    ) -> None:
        """Goes on to the number of losses, of so many in all if that is known.

        :param losses: one for each step.
        :param total: the number of steps in all.
        :param epoch: which epoch that is, in words.
        :param batch: where in it, in words.
        """
        if self._bar is None:
            return
        if total is not None:
            self._bar.total = total
        if epoch:
            self._bar.set_description(epoch, refresh=False)
        recent = [loss for loss in losses[-_SHOWN:] if math.isfinite(loss)]
        elbo = f"ELBO {-math.fsum(recent) / len(recent):.3f}" if recent else ""
        shown = ", ".join(filter(None, (batch, elbo)))
        if shown:
            self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(len(losses) - self._bar.n)


def _new_bar() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(unit="step", dynamic_ncols=True)
