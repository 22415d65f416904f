"""Command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import sys
import time
from pathlib import Path

from benchmarks import report, scenarios
from benchmarks.servers import Redis, choose_cores


def main() -> None:
    """Measure guarded and stock side by side and print their ratios."""
    options = _parse()
    columns = [report.STOCK, report.GUARDED, report.CONTROL]
    if options.stock_only:
        columns.remove(report.GUARDED)
    plan = scenarios.QUICK if options.quick else scenarios.Plan(rounds=options.rounds)
    names = options.only or list(scenarios.SCENARIOS)
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
        bench = scenarios.Bench(plan, columns, results, broker, cores)
        for results.round in range(plan.rounds):
            for name in names:
                _say(f"round {results.round + 1} of {plan.rounds}: {name}")
                asyncio.run(scenarios.SCENARIOS[name](bench))
                gc.collect()

    rows = scenarios.metrics(plan, names)
    out = sys.stdout
    out.write(f"{report.header(facts)}\n")
    out.write(f"{report.table(results, rows, columns)}\n")
    out.write("Columns: medians. Ratios: min - **median** - max over the rounds.\n\n")
    out.write(f"{report.busy_line(results, columns)}\n\n" if "echo" in names else "")
    out.write(f"{plan.rounds} rounds, {time.monotonic() - started_at:.0f} s.\n")
    if options.json is not None:
        answer = {"machine": facts, "samples": results.samples}
        options.json.write_text(json.dumps(answer, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke run: do they work at all?")
    parser.add_argument(
        "--only",
        action="append",
        choices=list(scenarios.SCENARIOS),
        metavar="NAME",
        help=f"one of {', '.join(scenarios.SCENARIOS)}; may be repeated",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument(
        "--stock-only", action="store_true", help="leave the guard out: shows the noise alone"
    )
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _allow_many_files() -> None:
    """Raise the limit of open files as far as it goes; the servers inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


if __name__ == "__main__":
    main()
