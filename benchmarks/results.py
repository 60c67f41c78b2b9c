# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Files of results, a line of JSON each, and runs in processes of their own that print one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
#: wall seconds after which a process is given up, which a peer reaches in compiling only
PATIENCE = 1800


def load(path: Path) -> list[Row]:
    """The results of a file, none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def collect(path: Path, runs: Callable[[list[Row]], Iterable[Row]]) -> list[Row]:
    """The results of a file and of the runs that it lacks, each of which is written as it ends."""
    rows = load(path)
    for row in runs(rows):
        rows.append(row)
        append(path, row)
        print(row, file=sys.stderr, flush=True)
    return rows


def in_a_process(script: str, *arguments: str) -> Row:
    """What a script prints at its end, in a process of its own on one thread, or why there is nothing."""
    command, environment = [sys.executable, script, *arguments], os.environ | ONE_THREAD
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"rows": [], "error": "too long"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"rows": [], "error": lines[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])
