# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

"""Steps: objectives, the training loop with its optimizer, and the schedule of step sizes."""
