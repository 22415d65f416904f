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
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import nodejs, page, report
from benchmarks.attacks import ATTACKS
from benchmarks.bench import QUICK, Bench, Plan
from benchmarks.client import WrongAnswerError
from benchmarks.report import CONTROL, GUARDED, NODE, STOCK
from benchmarks.scenarios import SCENARIOS
from benchmarks.servers import Redis, StartError, choose_cores
from benchmarks.targets import verdicts, verdicts_text

SPARE_FILES = 500  # beside those of the clients
PART = "benchmarks"
"""Name of the report's part in docs/benchmarks.md."""


def main() -> None:
    """Measure guarded, stock and Node's Socket.IO side by side and print their ratios."""
    options = _parse()
    plan = QUICK if options.quick else Plan()
    usual = [name for name, scenario in SCENARIOS.items() if scenario.text is None]
    names = list(dict.fromkeys(options.only or usual))
    rounds = 1 if names == ["abuse"] else plan.rounds
    plan = dataclasses.replace(
        plan, rounds=options.rounds or rounds, attacks=frozenset(options.attack or ATTACKS)
    )
    facts = report.machine()
    results = report.Results()
    if options.stock_only:
        columns = [STOCK, CONTROL]
        names = [name for name in names if SCENARIOS[name].table is None]
    else:
        columns = [STOCK, GUARDED, CONTROL]
        if any(SCENARIOS[name].table is None for name in names):
            columns += _node_column(facts, results)

    _allow_many_files(plan, names, columns)
    cores = choose_cores()
    if cores.load is None:
        _note(results, "no second core to pin to: the ratios are noisy")
    else:
        os.sched_setaffinity(0, {cores.load})  # Redis is started from here and inherits it
    started_at = time.monotonic()
    with Redis() as broker:
        facts["redis"] = broker.version
        bench = Bench(plan, columns, results, broker, cores)
        for results.round in range(plan.rounds):
            for name in names:
                begun_at = time.monotonic()
                SCENARIOS[name].run(bench)
                taken = time.monotonic() - begun_at
                _say(f"round {results.round + 1} of {plan.rounds}: {name} ({taken:.0f} s)")
                gc.collect()

    plural = "s" if plan.rounds > 1 else ""
    text = _report(plan, names, columns, results, facts)
    text += f"{plan.rounds} round{plural}, {time.monotonic() - started_at:.0f} s.\n"
    sys.stdout.write(text)
    if options.write is not None:
        page.write_part(options.write, PART, text)
    if options.json is not None:
        answer = {
            "machine": facts,
            "notes": results.notes + report.unsaturated(results),
            "samples": results.samples,
            "told": [[*of, what] for of, what in results.told.items()],
        }
        options.json.write_text(json.dumps(answer, indent=2) + "\n")


def _node_column(facts: dict[str, Any], results: report.Results) -> list[report.Column]:
    """Return the column of Node in a list; an empty one where Node is missing."""
    try:
        facts["node versions"] = nodejs.prepare()
    except nodejs.MissingError as exc:
        _note(results, f"no column of Node's Socket.IO: {exc}")
        return []
    return [NODE]


def _report(
    plan: Plan,
    names: list[str],
    columns: list[report.Column],
    results: report.Results,
    facts: dict[str, Any],
) -> str:
    out = StringIO()
    out.write(report.header(facts))
    rows = _metrics(plan, names)
    if rows:
        comparisons = [(GUARDED, STOCK), (CONTROL, STOCK), (GUARDED, NODE)]
        out.write(f"{report.table(results, rows, columns, comparisons)}\n")
    for name in names:
        scenario = SCENARIOS[name]
        if scenario.text is not None:
            out.write(scenario.text(results))
        elif scenario.table is not None:
            out.write(f"{report.table(results, scenario.metrics(plan), *scenario.table)}\n")
    if any(SCENARIOS[name].text is None for name in names):
        out.write(
            "Columns: medians of all samples. Ratios: min - **median** - max over the rounds;\n"
        )
        out.write("above 1 is better where more is better, below 1 where less is better.\n\n")
    if any(key.endswith(":busy") for key in results.samples):
        out.write("Shares of the server's core, and of the load generator's (echo-100x50: 100 B,\n")
        out.write("50 clients; broadcast-500: to 500):\n\n")
        out.write(f"{report.busy_table(results)}\n")
    for note in results.notes + report.unsaturated(results):
        out.write(f"Note: {note}.\n\n")
    if GUARDED in columns:
        tables = [SCENARIOS[name] for name in names if SCENARIOS[name].table is not None]
        others = [metric for scenario in tables for metric in scenario.metrics(plan)]
        found = verdicts(results, [*rows, *others])
        if found:
            out.write(f"{verdicts_text(found)}\n")
    return out.getvalue()


def _metrics(plan: Plan, names: list[str]) -> list[report.Metric]:
    """Return the rows of the table that has all columns."""
    chosen = [SCENARIOS[name] for name in names if SCENARIOS[name].table is None]
    return [metric for scenario in chosen for metric in scenario.metrics(plan)]


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
    parser.add_argument(
        "--attack",
        action="append",
        choices=list(ATTACKS),
        metavar="NAME",
        help=f"with --only abuse: one of {', '.join(ATTACKS)}; may be repeated",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 3, or 1 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="PAGE",
        help="write the report into docs/benchmarks.md as well",
    )
    parser.add_argument(
        "--stock-only", action="store_true", help="stock and stock again: shows the noise alone"
    )
    options = parser.parse_args()
    if options.write is not None:
        page.read_part(options.write, PART)  # raises now instead of after ten minutes
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.attack and options.only != ["abuse"]:
        parser.error("--attack needs --only abuse")
    if options.stock_only and options.only and all(SCENARIOS[n].table for n in options.only):
        parser.error(f"nothing is left of {', '.join(options.only)} without the guard")
    return options


def _allow_many_files(plan: Plan, names: list[str], columns: list[report.Column]) -> None:
    """Raise the limit of open files to the maximum; the servers inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    columns_at_once = len(columns) if "broadcast" in names else 2
    needed = columns_at_once * max(*plan.broadcast_clients, plan.idle_clients) + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        sys.exit(f"this user may open {hard} files, {needed} are needed: see ulimit -Hn")


def _note(results: report.Results, what: str) -> None:
    """Print *what* now, and again in the report."""
    _say(what)
    results.notes.append(what)


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except StartError as exc:
        sys.exit(str(exc))
    except WrongAnswerError as exc:
        sys.exit(f"the run ends here, its numbers would be worth nothing: {exc}")
