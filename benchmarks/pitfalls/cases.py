# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""
How flow guides fail elsewhere: one function for each failure, which raises if it happens.

``test_pitfalls.py`` runs them on this package, ``benchmarks/peers.py`` on all. A number in a
name is that of the failure, and stays. A part of 24 and 25 is not here: local latents of a minibatch
are refused by the guides of these cases, not fitted.

A case that no package fails may be one that cannot fail: where no peer does, the docstring says
what was broken by hand to see it fail.
"""

from collections.abc import Callable

from pitfalls import fit_cases, flow_cases, guide_cases, saving_cases, tensor_cases
from pitfalls.subject import Subject

CASES: dict[str, Callable[[Subject], None]] = {
    name: case
    for module in (fit_cases, flow_cases, guide_cases, saving_cases, tensor_cases)
    for name, case in vars(module).items()
    if name[:1] == "f" and name[1:3].isdigit()
}
CASES = dict(sorted(CASES.items()))
