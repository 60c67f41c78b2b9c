# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A random attack: properties that no transform, model, fit or file may break in silence.

Each property has two tests: few derandomized examples, which the default suite runs, and many random
ones, marked slow. The environment sets the latter: ``ATTACK_EXAMPLES``, how many of each property
(100 by default), ``ATTACK_SEED`` (0 by default), and ``ATTACK_REPORT``, a file for the counts as JSON.
An hour of it is ``ATTACK_EXAMPLES=1000 pytest tests/attack -m slow``; the counts by kind are printed.
"""
