# Copyright Contributors to the pyro_artransform project.
# SPDX-License-Identifier: Apache-2.0
"""
Runs the known failures of flow libraries on this package, Pyro, Zuko and nflows.

    python benchmarks/peers.py [case ...]

Prints a table of what fails where. A case is named by its number or the start of its name. Each
package has an interpreter of its own (importing Zuko changes PyTorch's transforms), each case a
fork of it with a time limit. A peer that is not installed says so in its column.
"""

import argparse
import importlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pitfalls.cases import CASES
from pitfalls.peers import SUBJECTS
from pitfalls.subject import NotApplicable, Subject, prepare

#: Seconds for one case.
LIMIT = 240


def version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from the source" if util.find_spec(package) else None


def run_case(case: str, make: Callable[[Path], Subject], connection: Any) -> None:
    """Runs one case in this process and sends its verdict."""
    warnings.simplefilter("ignore")
    prepare()
    try:
        with tempfile.TemporaryDirectory() as folder:
            CASES[case](make(Path(folder)))
    except NotApplicable as reason:
        verdict = f"n/a: {reason}"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        verdict = f"FAIL: {kind}{lines[0]}"
    else:
        verdict = "pass"
    connection.send(verdict)


def run_subject(name: str, cases: list[str]) -> None:
    """Runs the cases on one package, each in a fork, and prints a line of JSON for each."""
    make, packages = SUBJECTS[name]
    for package in packages:
        importlib.import_module({"pyro-ppl": "pyro"}.get(package, package))
    context = multiprocessing.get_context("fork")
    for case in cases:
        receive, send = context.Pipe(duplex=False)
        start = time.perf_counter()
        process = context.Process(target=run_case, args=(case, make, send))
        process.start()
        send.close()
        verdict = f"FAIL: no end after {LIMIT} s"
        try:
            if receive.poll(LIMIT):
                verdict = receive.recv()
        except EOFError:
            verdict = "FAIL: the process died"
        process.kill()
        process.join()
        seconds = time.perf_counter() - start
        print(json.dumps([case, verdict, round(seconds, 1)]), flush=True)


def column(name: str, cases: list[str]) -> dict[str, str]:
    """The verdicts on one package, from an interpreter of its own."""
    missing = [p for p in SUBJECTS[name][1] if version(p) is None]
    if missing:
        return dict.fromkeys(cases, f"not installed: {', '.join(missing)}")
    command = [sys.executable, __file__, "--subject", name, *cases]
    verdicts = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if not line.startswith("["):
                continue
            case, verdict, seconds = json.loads(line)
            verdicts[case] = verdict
            print(f"{name}: {case} ({seconds} s): {verdict}", file=sys.stderr, flush=True)
    return {case: verdicts.get(case, "FAIL: did not run") for case in cases}


def cell(verdict: str, notes: list[str]) -> str:
    """A short word for the table; the reason of a failure goes into a numbered note."""
    if verdict.startswith("FAIL: "):
        notes.append(verdict[6:])
        return f"FAIL [{len(notes)}]"
    return verdict.partition(":")[0]


def table(columns: dict[str, dict[str, str]], cases: list[str]) -> str:
    """The verdicts as Markdown."""
    notes: list[str] = []
    lines = [
        f"| case | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for case in cases:
        cells = [cell(verdicts[case], notes) for verdicts in columns.values()]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines += ["", *(f"[{i}] {note}" for i, note in enumerate(notes, 1))]
    return "\n".join(lines)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", help="numbers or first letters of cases; default all")
    parser.add_argument("--subject", help=argparse.SUPPRESS)
    parser.add_argument("--columns", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    options = parser.parse_args()
    prefixes = tuple(
        f"f{int(c.lstrip('fF')):02d}_" if c.lstrip("fF").isdigit() else c for c in options.cases
    )
    cases = [case for case in CASES if not prefixes or case.startswith(prefixes)]
    if options.subject:
        run_subject(options.subject, cases)
        return
    packages = ["torch", *dict.fromkeys(p for _, ps in SUBJECTS.values() for p in ps)]
    print(", ".join(f"{p} {version(p) or 'not installed'}" for p in packages), end="\n\n")
    print(table({name: column(name, cases) for name in options.columns}, cases))


if __name__ == "__main__":
    main()
