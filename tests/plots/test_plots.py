# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys
from pathlib import Path

WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
import pyro_artransform
try:
    import pyro_artransform.plots
except ImportError as error:
    print(error)
"""


def test_without_matplotlib():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "plots need matplotlib: pip install matplotlib"
