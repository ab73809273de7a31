"""Is the sampling converged, and why: one sentence from the checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from openmm_eqflow.report.checks import (
    ORDER,
    Check,
    Grade,
    agreement_checks,
    audit_check,
    chain_checks,
    flow_checks,
    pm,
    worst,
)
from openmm_eqflow.report.data import RunData
from openmm_eqflow.report.populations import Quantity, coordinate_sizes

__all__ = ["Verdict", "judge"]



@dataclass(frozen=True)
class Verdict:
    """Grades of the sampling and of the flow, one sentence, the checks behind them."""

    sampling: Grade
    flow: Grade
    sentence: str
    advice: str
    checks: list[Check]
    slowest: str | None
    slowest_ess: float | None

    @property
    def word(self) -> str:
        """One or two words."""
        return {"good": "Converged", "fair": "Doubtful", "poor": "Not converged"}[self.sampling]

    def to_json(self) -> dict[str, Any]:
        """For metrics.json."""
        return {**asdict(self), "word": self.word}


def judge(run: RunData, quantities: list[Quantity]) -> Verdict:
    """Apply every check that the run's data allow."""
    sizes = coordinate_sizes(run, run.chain)
    slowest = min(sizes, key=lambda name: sizes[name]) if sizes else None
    checks = [
        audit_check(run),
        *flow_checks(run),
        *chain_checks(run, sizes, slowest),
        *agreement_checks(run, quantities),
    ]
    sampling = worst([c.grade for c in checks if c.about == "sampling"])
    flow = worst([c.grade for c in checks if c.about == "flow"])
    if flow == "poor" and sampling == "good":
        # Chains that agree while the flow hardly moves them may all have missed a state.
        sampling = "fair"
    return Verdict(
        sampling,
        flow,
        _sentence(run, checks, sampling, quantities, slowest, sizes),
        _advice(run, sampling, flow),
        checks,
        slowest,
        sizes[slowest] if slowest is not None else None,
    )


def _sentence(
    run: RunData,
    checks: list[Check],
    sampling: Grade,
    quantities: list[Quantity],
    slowest: str | None,
    sizes: dict[str, float],
) -> str:
    if sampling != "good":
        start = "Not converged" if sampling == "poor" else "Doubtful"
        return f"{start}: " + "; ".join(_reasons(checks, sampling)) + "."
    named = {c.name: c.reason for c in checks}
    parts = [
        f"{len(run.accepted)} chains agree ({sizes[slowest]:,.0f} effective samples of the "
        f"slowest coordinate, {slowest})"
        if slowest is not None
        else "",
        f"the flow covers the target ({named['raw relative ESS of the flow']}, "
        f"{named['Pareto k of the weights']})",
    ]
    states = [q for q in quantities if q.versus is not None and q.state] or [
        q for q in quantities if q.versus is not None
    ]
    if states:
        row = states[0]
        ours, theirs = row.estimates[run.chain.label][0], row.estimates[str(row.versus)][0]
        noun = "the population of " if row.state else ""
        parts.append(
            f"{noun}{row.name} is {pm(ours.value, ours.error)} against "
            f"{pm(theirs.value, theirs.error)} in the {row.versus}"
        )
    parts.append(named["audit of log q"])
    warnings = [c.reason for c in checks if c.grade == "fair"]
    warning = f" Warning: {'; '.join(warnings[:2])}." if warnings else ""
    return "Converged: " + ", ".join(p for p in parts[:-1] if p) + f", and {parts[-1]}.{warning}"


def _reasons(checks: list[Check], sampling: Grade) -> list[str]:
    """Say what is wrong with the samples, worst first, then what is wrong with the flow."""
    ours = [c for c in checks if c.about == "sampling" and c.grade != "good"]
    reasons = [c.reason for c in sorted(ours, key=lambda c: -ORDER[c.grade])]
    if sampling == "poor":
        reasons = [c.reason for c in ours if c.grade == "poor"]
    flow = [c.reason for c in checks if c.about == "flow" and c.grade == "poor"]
    return reasons[:4] + ([f"the flow is poor ({', '.join(flow[:2])})"] if flow else [])


def _advice(run: RunData, sampling: Grade, flow: Grade) -> str:
    budget = run.run.config.budget
    longer = {"quick": "standard", "standard": "thorough"}.get(budget)
    more = (
        f"--budget {longer} trains longer and samples more"
        if longer
        else "raise n_levels in system.yaml (settings: thorough: stochastic) for a better flow, "
        "n_samples for longer chains"
        if run.run.config.recipe.stochastic is not None
        else "raise train_seconds in system.yaml (settings: thorough)"
    )
    if sampling == "good" and flow == "good":
        return ""
    if sampling == "good":
        return f"The flow is only {flow}; {more}."
    start = (
        f"This was a {budget} run"
        if run.reference is not None
        else "This run used a flow that ships"
    )
    return f"{start}: {more}. Until then treat averages as provisional."
