"""What the guard promises, and whether this run kept it."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.report import GUARDED, NODE, STOCK, ratio_text, rows_text, spread_text

if TYPE_CHECKING:
    from benchmarks.report import Metric, Results


class Verdict(NamedTuple):
    """One target and what became of it.

    Attributes:
        row: Of the table of :func:`verdicts_text`.
        is_met: None where the run has no samples of it.
    """

    row: list[str]
    is_met: bool | None


def verdicts(results: Results, metrics: list[Metric]) -> list[Verdict]:
    """Hold the ratios of *metrics* against their targets.

    It is the median of the rounds that counts, as it is printed: after rounding.
    """
    found = []
    for metric in metrics:
        for bound, reference in ((metric.target, STOCK), (metric.node_target, NODE)):
            if bound is None:
                continue
            sign = "<=" if metric.is_less_better else ">="
            row = [metric.title, metric.unit, f"guarded / {reference.name}", f"{sign} {bound:.1f}"]
            ratios = results.ratios(metric.key, GUARDED, reference)
            if not ratios:
                found.append(Verdict([*row, "", "not measured"], None))
                continue
            median = float(ratio_text(statistics.median(ratios)))
            is_met = median <= bound if metric.is_less_better else median >= bound
            found.append(
                Verdict([*row, spread_text(ratios), "yes" if is_met else "**no**"], is_met)
            )
    return found


def verdicts_text(found: list[Verdict]) -> str:
    """Return *found* as a Markdown table and a sentence."""
    head = ["target for", "unit", "ratio", "must be", "in this run", "met"]
    rules = ["---"] * 3 + ["---:"] * 2 + ["---"]
    measured = [verdict.is_met for verdict in found if verdict.is_met is not None]
    kept = f"{sum(measured)} of {len(measured)} targets met in this run"
    missing = len(found) - len(measured)
    if missing:
        kept += f", {missing} not measured"
    return f"{rows_text([head, rules, *(verdict.row for verdict in found)])}\n{kept}.\n"
