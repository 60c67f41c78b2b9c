# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""
How flow guides fail elsewhere: one function for each failure, which raises if it happens.

``test_pitfalls.py`` runs them on this package, ``benchmarks/peers.py`` on others too. A number in a
name is that of the failure, and stays. Those missing here are about fitting and its verdict, which
this package does not have yet: 8 (a floor under the scale hides tight posteriors), 11 (one NaN
gradient writes NaN into every weight), 12 (a context of large variance gives NaN in the first
step), 30 (a wrong posterior reported as good), 31 (an estimate above the evidence). So is a part of
24 and 25: local latents of a minibatch are refused here, not fitted.

A case that no package fails may be one that cannot fail: where no peer does, the docstring says
what was broken by hand to see it fail.
"""

from collections.abc import Callable

from . import flow_cases, guide_cases, saving_cases, tensor_cases
from .subject import Subject

CASES: dict[str, Callable[[Subject], None]] = {
    name: case
    for module in (flow_cases, guide_cases, saving_cases, tensor_cases)
    for name, case in vars(module).items()
    if name[:1] == "f" and name[1:3].isdigit()
}
CASES = dict(sorted(CASES.items()))
