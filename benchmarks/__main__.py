"""Command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bench import QUICK, Bench, Plan
from benchmarks.echo import LIMITS_COLUMNS
from benchmarks.report import CONTROL, GUARDED, STOCK
from benchmarks.scenarios import SCENARIOS
from benchmarks.servers import Redis, choose_cores


def main() -> None:
    """Measure guarded and stock side by side and print their ratios."""
    options = _parse()
    plan = QUICK if options.quick else Plan()
    if options.rounds is not None:
        plan = dataclasses.replace(plan, rounds=options.rounds)
    columns = [STOCK, GUARDED, CONTROL]
    names = options.only or list(SCENARIOS)
    if options.stock_only:
        columns.remove(GUARDED)
        names = [name for name in names if not SCENARIOS[name].is_of_guard]
    facts = report.machine()
    results = report.Results()

    _allow_many_files()
    cores = choose_cores()
    if cores.load is None:
        _say("no second core to pin to: the ratios will be noisy")
    else:
        os.sched_setaffinity(0, {cores.load})  # Redis is started from here and inherits it
    started_at = time.monotonic()
    with Redis() as broker:
        bench = Bench(plan, columns, results, broker, cores)
        for results.round in range(plan.rounds):
            for name in names:
                begun_at = time.monotonic()
                SCENARIOS[name].run(bench)
                taken = time.monotonic() - begun_at
                _say(f"round {results.round + 1} of {plan.rounds}: {name} ({taken:.0f} s)")
                gc.collect()

    _print(plan, names, columns, results, facts)
    sys.stdout.write(f"{plan.rounds} rounds, {time.monotonic() - started_at:.0f} s.\n")
    if options.json is not None:
        answer = {
            "machine": facts,
            "notes": results.notes + report.unsaturated(results),
            "samples": results.samples,
        }
        options.json.write_text(json.dumps(answer, indent=2) + "\n")


def _print(
    plan: Plan,
    names: list[str],
    columns: list[report.Column],
    results: report.Results,
    facts: dict[str, Any],
) -> None:
    out = sys.stdout
    out.write(f"{report.header(facts)}\n")
    for is_of_guard, variants in ((False, columns), (True, LIMITS_COLUMNS)):
        chosen = [name for name in names if SCENARIOS[name].is_of_guard is is_of_guard]
        if chosen:
            rows = [row for name in chosen for row in SCENARIOS[name].metrics(plan)]
            out.write(f"{report.table(results, rows, variants)}\n")
    out.write("Columns: medians of all samples. Ratios: min - **median** - max over the rounds;\n")
    out.write("above 1 is better where more is better, below 1 where less is better.\n\n")
    out.write("Shares of the server's core, and of the load generator's:\n\n")
    out.write(f"{report.busy_table(results)}\n")
    for note in results.notes + report.unsaturated(results):
        out.write(f"Note: {note}.\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter slices: indicative numbers")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(SCENARIOS),
        metavar="NAME",
        help=f"one of {', '.join(SCENARIOS)}; may be repeated",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument(
        "--stock-only", action="store_true", help="leave the guard out: shows the noise alone"
    )
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.stock_only and options.only and all(SCENARIOS[n].is_of_guard for n in options.only):
        parser.error(f"nothing is left of {', '.join(options.only)} without the guard")
    return options


def _allow_many_files() -> None:
    """Raise the limit of open files as far as it goes; the servers inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


if __name__ == "__main__":
    main()
