# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit to draws returns."""

from dataclasses import dataclass


@dataclass(frozen=True, eq=False, repr=False)
class DrawsResult:
    """How probable draws are that neither the steps nor their end depended on.

    :param log_likelihood: the mean log-density of these draws, in nats; of a guide on the constrained
        space, as ``guide.log_prob`` has it.
    :param log_likelihood_se: its standard error, for independent draws.
    :param num_held_out: the number of these draws.
    :param history: the mean log-density of the draws that said when to stop, at the start and at
        each look.
    :param num_steps: the number of steps.
    :param num_skipped: how many of them were skipped, since the log-density or its gradient was
        not finite.
    :param seconds: wall time of all of it.
    :param stopped_because: why the steps ended.
    :param start: where they began.
    """

    log_likelihood: float
    log_likelihood_se: float
    num_held_out: int
    history: list[float]
    num_steps: int
    num_skipped: int
    seconds: float
    stopped_because: str
    start: str

    def __repr__(self) -> str:
        held_out = f"{self.log_likelihood:.3f} ± {self.log_likelihood_se:.3f} nats a draw"
        lines = [
            f"DrawsResult: {held_out}, of {self.num_held_out} that were held out",
            f"  steps    {self.num_steps} in {self.seconds:.1f} s: {self.stopped_because}",
            f"  start    {self.start}",
        ]
        if self.num_skipped:
            lines.append(f"  skipped  {self.num_skipped} steps that were not finite")
        return "\n".join(lines)
