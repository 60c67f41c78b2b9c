# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""Runs of a benchmark: lines of JSON in a file, so that it goes on where the last one ended.

A run is a dictionary of what it is, to which its process adds what it found. Delete the file after a
change, or name another one with --results.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from measuring import pages

Row = dict[str, Any]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
#: wall seconds after which a process is given up, which a peer reaches in compiling only
PATIENCE = 1800


class Parser(argparse.ArgumentParser):
    """The command line of a benchmark, whose page and file of runs have the name of its script."""

    def __init__(self, doc: str, script: str) -> None:
        super().__init__(description=doc.splitlines()[0])
        self.script, self.page = script, Path(script).with_suffix(".md")
        results = self.page.with_suffix(".jsonl")
        self.add_argument("--results", type=Path, default=results, help="the file of runs")
        self.add_argument("--write", action="store_true", help="put the tables into the page")
        self.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)

    def add_names(self, name: str, known: Iterable[str]) -> None:
        """Some of the known names, by default all of them."""
        known = list(known)
        self.add_argument(
            name, nargs="*", metavar=name.upper(), default=known, type=known_as(known)
        )

    def show(self, text: str, options: argparse.Namespace) -> None:
        """Prints tables, or puts them into the page."""
        print(text)
        if options.write:
            pages.write(text, self.page)


def known_as(known: list[str]) -> Callable[[str], str]:
    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"expected one of {known}, got {text}")
        return text

    return name


def known(rows: Iterable[Row], run: Row) -> list[Row]:
    """The rows of a run, or of all runs that it is a part of."""
    return [row for row in rows if run.items() <= row.items()]


def collect(path: Path, runs: Iterable[Row], found: Callable[[Row], Row]) -> list[Row]:
    """The rows of a file and of the runs that it lacks, each of which is written as it ends."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for run in runs:
        if known(rows, run):
            continue
        rows.append(run | found(run))
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def in_processes(script: str, *arguments: str) -> Callable[[Row], Row]:
    """A run by `script --one`, which prints what it found, or why there is nothing."""

    def found(run: Row) -> Row:
        command = [sys.executable, script, "--one", json.dumps(run), *arguments]
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE}
        try:
            done = subprocess.run(command, env=os.environ | ONE_THREAD, **options)
        except subprocess.TimeoutExpired:
            return {"rows": [], "error": "too long"}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
            return {"rows": [], "error": lines[-1][:200]}
        return json.loads(done.stdout.splitlines()[-1])

    return found
