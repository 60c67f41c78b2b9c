# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""How long a fit goes on, and what it averages over: by what is noisy in its steps."""

from typing import NamedTuple

from .schedule import MIN_DECAY

# the longest constant phase in steps, with the path gradient and without
_MAX_CONSTANT = {True: 2000, False: 4000}
_MAX_CONSTANT_EPOCHS = 20
_AVERAGED = 100
_AVERAGED_EPOCHS = 2
_AVERAGED_SHARE = 1 / 3
# the noise of mini-batches has to average out too
_MIN_NOISY_DECAY = 1000


class Pace(NamedTuple):
    """What the noise of the steps asks for.

    :param max_constant: the longest constant phase, where the fit finds its end itself.
    :param has_tail_steps: whether the last steps are for the tails of the posterior.
    :param epoch: the steps after which the noise of mini-batches has cancelled; 1 without a loader.
    :param averaged: the steps that the running average of the parameters reaches back, at least.
    :param averaged_share: the same as a share of the steps so far.
    :param min_decay: the shortest time for the step size to go down.
    """

    max_constant: int
    has_tail_steps: bool = False
    epoch: int = 1
    averaged: int = _AVERAGED
    averaged_share: float = 0.0
    min_decay: int = MIN_DECAY

    def average_weight(self, step: int) -> float:
        """The weight of the newest parameters in their running average.

        A young average forgets its start faster. With a share it is that of polynomial decay.

        :param step: the number of steps so far.

        **References**

        1. Stochastic Gradient Descent for Non-smooth Optimization: Convergence Results and Optimal
           Averaging Schemes (Shamir, Zhang, 2013), https://arxiv.org/abs/1212.1824
        """
        reach = max(self.averaged, self.averaged_share * step)
        return 1 / min(reach, step + 1)


def pace_of(by_protocol: bool, num_batches: int | None, is_subsampled: bool) -> Pace:
    """The pace of a fit.

    :param by_protocol: whether the gradient is the path gradient of a guide of the protocol.
    :param num_batches: mini-batches in an epoch; ``None`` without a loader, or where its only batch
        is all data.
    :param is_subsampled: whether a step sees a part of the data.
    """
    longest = _MAX_CONSTANT[by_protocol]
    if num_batches is not None:
        return Pace(
            max_constant=max(longest, _MAX_CONSTANT_EPOCHS * num_batches),
            epoch=num_batches,
            averaged=max(_AVERAGED, _AVERAGED_EPOCHS * num_batches),
            averaged_share=_AVERAGED_SHARE,
            min_decay=_MIN_NOISY_DECAY,
        )
    if is_subsampled:
        return Pace(
            longest,
            has_tail_steps=by_protocol,
            averaged_share=_AVERAGED_SHARE,
            min_decay=_MIN_NOISY_DECAY,
        )
    return Pace(longest, has_tail_steps=by_protocol)
