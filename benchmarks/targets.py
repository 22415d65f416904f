"""The targets of the guard, and whether this run met them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.report import GUARDED, NODE, STOCK, ratio_text, rows_text, spread_text

if TYPE_CHECKING:
    from benchmarks.report import Column, Metric, Results


class Verdict(NamedTuple):
    """One target, and whether it was met.

    Attributes:
        row: Its row of the table of :func:`verdicts_text`.
        is_met: None if the run has no samples for it.
    """

    row: list[str]
    is_met: bool | None


def verdicts(results: Results, metrics: list[Metric]) -> list[Verdict]:
    """Compare the ratios of *metrics* with their targets.

    The median of the rounds counts, after rounding, as it is printed.
    """
    found = []
    for metric in metrics:
        bounds = [(GUARDED, STOCK, metric.target), (GUARDED, NODE, metric.node_target)]
        for column, reference, bound in (*bounds, *metric.bounds):
            if bound is not None:
                found.append(_verdict(results, metric, column, reference, bound))
    return found


def _verdict(
    results: Results, metric: Metric, column: Column, reference: Column | None, bound: float
) -> Verdict:
    if reference is None:
        what, limit = column.name, f"{bound:,.0f}"
        values, show = results.medians(metric.key, column), _range_text
    else:
        what, limit = f"{column.name} / {reference.name}", f"{bound:.1f}"
        values, show = results.ratios(metric.key, column, reference), spread_text
    sign = "<=" if metric.is_less_better else ">="
    row = [metric.title, metric.unit, what, f"{sign} {limit}"]
    if not values:
        return Verdict([*row, "", "not measured"], None)
    median = statistics.median(values)
    if reference is not None:
        median = float(ratio_text(median))
    is_met = median <= bound if metric.is_less_better else median >= bound
    return Verdict([*row, show(values), "yes" if is_met else "**no**"], is_met)


def _range_text(ratios: list[float]) -> str:
    return f"{min(ratios):,.0f} - **{statistics.median(ratios):,.0f}** - {max(ratios):,.0f}"


def verdicts_text(found: list[Verdict]) -> str:
    """Return *found* as a Markdown table and a sentence."""
    head = ["target for", "unit", "of", "must be", "in this run", "met"]
    rules = ["---"] * 3 + ["---:"] * 2 + ["---"]
    measured = [verdict.is_met for verdict in found if verdict.is_met is not None]
    kept = f"{sum(measured)} of {len(measured)} targets met in this run"
    missing = len(found) - len(measured)
    if missing:
        kept += f", {missing} not measured"
    return f"{rows_text([head, rules, *(verdict.row for verdict in found)])}\n{kept}.\n"
