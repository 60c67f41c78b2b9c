# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""A random attack: properties that no transform may break in silence.

Each property is a test with a few derandomized examples, marked slow. The environment asks for more:
``ATTACK_TIMES``, how many times as many, and ``ATTACK_SEED``, which draws others. An hour of it is
``ATTACK_TIMES=20 ATTACK_SEED=1 pytest tests/attack -m slow``; with
``--hypothesis-show-statistics`` it says what was tried.
"""
