"""The criteria behind the verdict, and the verdict in one sentence.

The criteria behind the verdict: what is measured, its thresholds, what it means.

Is the sampling converged, and why: one sentence from the checks.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.analysis.chains import split_r_hat
from openmm_eqflow.analysis.weights import TAME, kish_ess, relative_ess_with_error
from openmm_eqflow.report.data import RunData
from openmm_eqflow.report.populations import Quantity, coordinate_sizes

__all__ = [
    "ORDER",
    "Check",
    "Grade",
    "Verdict",
    "agreement_checks",
    "audit_check",
    "chain_checks",
    "coverage_checks",
    "flow_checks",
    "isomer_check",
    "judge",
    "pm",
    "training_trend",
    "worst",
]

Grade = Literal["good", "fair", "poor"]
_POOR_START = 0.01  # relative ESS of a prior
_ENOUGH = 400.0  # independent samples by weight: populations to two digits
_OUTSIDE = "largest weight in the chain against proposals"
_ISOMERS = "torsions and rings seen in one state only"
ORDER: dict[Grade, int] = {"good": 0, "fair": 1, "poor": 2}


@dataclass(frozen=True)
class Check:
    """One criterion: what was measured, what it means, which part of the verdict it touches."""

    name: str
    value: str
    grade: Grade
    meaning: str
    about: Literal["sampling", "flow", "chains"]
    reason: str


def _graded(value: float, good: float, fair: float, *, high: bool) -> Grade:
    """Grade by two thresholds; ``high``: larger is better. NaN is poor."""
    if math.isnan(value):
        return "poor"
    if high:
        return "good" if value >= good else "fair" if value >= fair else "poor"
    return "good" if value <= good else "fair" if value <= fair else "poor"


def worst(grades: list[Grade]) -> Grade:
    """Return the worst of some grades; good if there are none."""
    return max(grades, key=lambda grade: ORDER[grade], default="good")


def audit_check(run: RunData) -> Check:
    """Judge the accuracy of log q."""
    report = run.audit
    if report is None:
        return Check(
            "audit of log q",
            "none",
            "poor",
            "without it acceptance ratios can't be trusted",
            "sampling",
            "log q was never audited",
        )
    error, tolerance = float(report["log_q_error_p99"]), float(report["tolerance"])
    passed = bool(report["passed"])
    return Check(
        "audit of log q",
        f"{error:.1e} kT",
        "good" if passed else "poor",
        f"99th percentile of the error of log q; at most {tolerance:g} kT",
        "sampling",
        f"log q was audited (error {error:.0e} kT)"
        if passed
        else f"log q is off by {error:.1e} kT",
    )


def flow_checks(run: RunData) -> list[Check]:
    """Judge the flow by its independent samples."""
    metrics = run.metrics
    ess, n = float(metrics["relative_ess"]), int(metrics["n_samples"])
    kish = kish_ess(run.log_weight)
    grade = worst(
        [_graded(ess, 0.2, 0.03, high=True), _graded(kish, 200.0, 50.0, high=True)]
    )
    k = metrics.get("pareto_k")
    k_value = math.inf if k is None else float(k)
    tame = n * float(metrics.get("max_weight_share") or 1.0) < TAME
    prior = float(metrics["prior_relative_ess"])
    invalid = int(metrics.get("n_invalid", 0))
    checks = [
        Check(
            "raw relative ESS of the flow",
            f"{ess:.3f} (n = {n:,})",
            grade,
            f"{kish:,.0f} effective of {n:,} independent samples, no weight clipped; good from "
            "0.2, poor below 0.03",
            "flow",
            f"raw relative ESS {ess:.2g}, n = {n:,}",
        ),
        Check(
            "Pareto k of the weights",
            "∞" if math.isinf(k_value) else f"{k_value:.2f}",
            "good" if tame else _graded(k_value, 0.5, 0.7, high=False),
            "tail of the weights; above 0.7 weighted averages and their errors can't be trusted, "
            f"unless no weight is above {TAME:g} times the mean",
            "flow",
            "Pareto k " + ("∞" if math.isinf(k_value) else f"{k_value:.2f}"),
        ),
        _prior_check(run, ess, prior),
    ]
    if n:
        checks.append(
            Check(
                "invalid proposals",
                f"{invalid:,} of {n:,}",
                _graded(invalid / n, 0.01, 0.2, high=False),
                "energy not finite or wrong chirality; they have weight zero and count in n",
                "flow",
                f"{invalid / n:.0%} of the proposals are invalid",
            )
        )
    return checks


def _prior_check(run: RunData, ess: float, prior: float) -> Check:
    if kept := run.prior_kept:
        ess, prior = kept["flow"], kept["prior"]
        reason = f"training made the flow worse than its prior ({ess:.2g} against {prior:.2g})"
        reason += ", which is used alone"
    else:
        reason = f"the flow is not better than its prior ({ess:.2g} against {prior:.2g})"
    error = float(relative_ess_with_error(run.prior_log_weight).error)
    error = math.hypot(error, float(run.metrics.get("relative_ess_error") or 0.0))
    worse = ess < prior - 2.0 * (error if math.isfinite(error) else 0.0)
    return Check(
        "flow against its prior",
        f"{ess:.3f} against {prior:.3f}" + ("; prior kept" if kept else ""),
        "fair" if worse or kept else "good",
        "relative ESS of the prior alone on as many samples; below it by more than two standard "
        "errors is worse",
        "flow",
        reason,
    )


def chain_checks(
    run: RunData, sizes: dict[str, float], slowest: str | None
) -> list[Check]:
    """Judge the mixing of the chains."""
    chain = run.metrics["chain"]
    n_chains, n_steps = run.accepted.shape
    checks = []
    if slowest is not None:
        size = sizes[slowest]
        checks.append(
            Check(
                "effective samples of the slowest coordinate",
                f"{size:,.0f} ({slowest})",
                _graded(size, 400.0, 100.0, high=True),
                f"of {run.accepted.size:,} in {n_chains} chains; chains that disagree lower it; "
                "good from 400, poor below 100",
                "sampling",
                f"{slowest} has {size:,.0f} effective samples",
            )
        )
        hats = {
            name: split_r_hat(run.chain.by_chain(run.chain.coordinates[name])) for name in sizes
        }
        widest = max(hats, key=lambda name: hats[name])
        checks.append(
            Check(
                "agreement between chains",
                f"split R̂ {hats[widest]:.3f} ({widest})",
                # Many short chains: R-hat is 1 + tau / (2 n) even when they agree.
                _graded(hats[widest], 1.05, 1.2, high=False),
                "spread between half-chains over spread within; 1 is agreement, poor above 1.2",
                "sampling",
                f"chains disagree in {widest} (R̂ {hats[widest]:.2f})",
            )
        )
    else:
        checks.append(
            Check(
                "effective samples of the slowest coordinate",
                f"unknown: {n_steps} steps",
                "poor",
                "chains of fewer than four steps, or nothing moved",
                "sampling",
                f"chains of {n_steps} step(s) are too short to judge",
            )
        )
    checks.append(_stuck_check(run.streaks))
    gap = chain.get("max_log_weight_gap")
    if gap is not None:
        grade = _graded(float(gap), 2.0, 6.0, high=False)
        checks.append(
            Check(
                _OUTSIDE,
                f"{gap:+.1f} in log w",
                grade,
                "above 2 the chain found configurations that the flow hardly ever proposes; poor "
                "above 6",
                # A moderate gap is the flow's fault; the checks above tell whether chains suffer.
                "sampling" if grade == "poor" else "flow",
                f"the chain met weights e^{gap:.1f} times the largest ever proposed",
            )
        )
    return checks


def _stuck_check(streaks: NDArray[np.int64]) -> Check:
    """Judge how much of all chains was spent in long runs of rejections, not the worst chain.

    Among hundreds of chains one is always unlucky, and weighs no more than any other.
    """
    n_chains, n_steps = streaks.shape
    longest = streaks.max(axis=1)
    # A handful of rejections in a row is chance, unless it is the whole of a short run.
    long = longest > max(0.25 * n_steps, min(4, n_steps - 1))
    share = float(np.where(long, longest, 0).sum()) / (n_chains * n_steps)
    worst = f"worst chain: {int(longest.max())} of {n_steps}"
    return Check(
        "flow moves in long stuck stretches",
        f"{share:.1%}; {worst}",
        _graded(share, 0.02, 0.3, high=False) if n_steps >= 4 else "fair",
        "share of all flow moves that lie in a stretch of rejections longer than a quarter of the "
        "run; poor above 30 %",
        "sampling",
        f"{share:.0%} of all flow moves lie in long stretches of rejections ({worst} in a row)",
    )


def agreement_checks(run: RunData, quantities: list[Quantity]) -> list[Check]:
    """Compare populations and means with the reference, or with what is known exactly."""
    checks = []
    for row in quantities:
        if row.versus is None:
            continue
        z = row.z(run.chain.label, row.versus)
        if z is None:
            continue
        ours, theirs = row.estimates[run.chain.label][0], row.estimates[row.versus][0]
        text = f"{pm(ours.value, ours.error)} against {pm(theirs.value, theirs.error)}"
        unit = f" {row.unit}" if row.unit else ""
        checks.append(
            Check(
                f"{row.name}: chain against {row.versus}",
                f"z = {z:+.1f}",
                _graded(abs(z), 3.0, 4.0, high=False),
                f"{text}{unit}; combined standard errors, poor above 4",
                "sampling",
                f"{row.name} is {text}{unit} in the {row.versus} (z = {z:+.1f})",
            )
        )
    for row in quantities:
        if row.exact is None:
            continue
        label = run.chain.label if run.chain.label in row.estimates else run.flow.label
        estimate = row.estimates[label][0]
        if not (math.isfinite(float(estimate.error)) and estimate.error > 0.0):
            continue
        z = float((estimate.value - row.exact) / estimate.error)
        checks.append(
            Check(
                f"{row.name}: {label} against the exact value",
                f"z = {z:+.1f}",
                _graded(abs(z), 3.0, 4.0, high=False),
                f"{pm(estimate.value, estimate.error)} against {row.exact:.4f}",
                "sampling",
                f"{row.name} misses its exact value (z = {z:+.1f})",
            )
        )
    reference = run.dynamics.get("convergence")
    mixed = not reference or reference.get("mixed", reference.get("converged", True))
    if run.reference is not None and reference and not mixed:
        checks.append(
            Check(
                "reference data",
                f"{reference.get('effective_samples', 0.0):.0f} effective samples",
                "fair",
                "the reference run itself is short, so agreement with it proves little",
                "sampling",
                "the reference itself is not converged",
            )
        )
    if run.reference is None:
        checks.append(
            Check(
                "reference data",
                "none",
                "good",
                (
                    "an annealed path needs none (check_with_md: 1 makes some): "
                    if run.run.config.recipe.method == "annealing"
                    else "the flow was adopted: "
                )
                + "chains are compared with the reweighted flow, which is not independent of them",
                "sampling",
                "no reference",
            )
        )
    return checks


def isomer_check(run: RunData) -> Check:
    """Judge whether every torsion and ring was seen in more than one state."""
    once = run.one_state
    return Check(
        _ISOMERS,
        ", ".join(once) or "none",
        "fair" if once else "good",
        "what neither reference, flow nor chains visited is missing from every number here, and "
        "no other check can tell",
        "sampling",
        f"{_several(once)} {'was' if len(once) == 1 else 'were'} seen in one state only"
        if once
        else "every torsion and ring was seen in more than one state",
    )


def _several(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def pm(value: Any, error: Any) -> str:
    """Value ± error, digits by the error."""
    value, error = float(value), float(error)
    if not math.isfinite(error) or error <= 0.0:
        return f"{value:.3g}"
    digits = max(0, min(6, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"



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
        """One or two words; Confined: all else is converged, but states may be missing."""
        return _word(self.sampling, self.flow, self.checks)

    def to_json(self) -> dict[str, Any]:
        """For metrics.json."""
        return {**asdict(self), "word": self.word}


def _word(sampling: Grade, flow: Grade, checks: list[Check]) -> str:
    doubts = [c.name for c in checks if c.about == "sampling" and c.grade != "good"]
    if doubts == [_ISOMERS] and flow != "poor":
        return "Confined"
    return {"good": "Converged", "fair": "Doubtful", "poor": "Not converged"}[sampling]


def coverage_checks(run: RunData) -> list[Check]:
    """Judge what a path from chemistry may have missed, by its own warnings."""
    told = run.metrics.get("warnings")
    if told is None:
        return []
    return [
        Check(
            "what the path may have missed",
            f"{len(told)} warning{'s' if len(told) != 1 else ''}" if told else "nothing found",
            "fair" if told else "good",
            "; ".join(told) or "second population of points, rings, dynamics where there are any",
            "sampling",
            "; ".join(told) or "no sign of a missing state",
        )
    ]


def judge(run: RunData, quantities: list[Quantity]) -> Verdict:
    """Apply every check that the run's data allow.

    Independent samples with weights come first: where they are enough, and nothing is wrong with
    their weights, short or stuck chains are told but decide nothing.
    """
    sizes = coordinate_sizes(run, run.chain)
    slowest = min(sizes, key=lambda name: sizes[name]) if sizes else None
    mixing, flow_says = chain_checks(run, sizes, slowest), flow_checks(run)
    audited = audit_check(run)
    if kish_ess(run.log_weight) >= _ENOUGH and worst(
        [audited.grade, *(c.grade for c in flow_says)]
    ) != "poor":
        # Not what a chain found outside the flow: the weighted samples lack it, too.
        mixing = [c if c.name == _OUTSIDE else replace(c, about="chains") for c in mixing]
    checks = [
        audited,
        *flow_says,
        *mixing,
        *agreement_checks(run, quantities),
        *coverage_checks(run),
        *([isomer_check(run)] if run.kind == "molecule" else []),
    ]
    sampling = worst([c.grade for c in checks if c.about == "sampling"])
    flow = worst([c.grade for c in checks if c.about == "flow"])
    if flow == "poor" and sampling == "good":
        # Chains that agree while the flow hardly moves them may all have missed a state.
        sampling = "fair"
    return Verdict(
        sampling,
        flow,
        _sentence(run, checks, _word(sampling, flow, checks), quantities, slowest, sizes),
        _advice(run, checks, flow),
        checks,
        slowest,
        sizes[slowest] if slowest is not None else None,
    )


def _sentence(
    run: RunData,
    checks: list[Check],
    word: str,
    quantities: list[Quantity],
    slowest: str | None,
    sizes: dict[str, float],
) -> str:
    if word not in ("Converged", "Confined"):
        grade: Grade = "poor" if word == "Not converged" else "fair"
        return f"{word}: " + "; ".join(_reasons(checks, grade)) + "."
    named = {c.name: c.reason for c in checks}
    poor_chains = any(c.about == "chains" and c.grade != "good" for c in checks)
    parts = [
        f"{len(run.log_weight):,} independent weighted samples are worth "
        f"{kish_ess(run.log_weight):,.0f}"
        if poor_chains
        else f"{len(run.accepted)} chains agree ({sizes[slowest]:,.0f} effective samples of the "
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
    told = [c for c in checks if c.grade == "fair" or (c.about == "chains" and c.grade == "poor")]
    warnings = [c.reason for c in told if c.name != _ISOMERS]
    warning = f" Warning: {'; '.join(warnings[:2])}." if warnings else ""
    start = f"{word}: " + (f"{named[_ISOMERS]}; otherwise " if word == "Confined" else "")
    return start + ", ".join(p for p in parts[:-1] if p) + f", and {parts[-1]}.{warning}"


def _reasons(checks: list[Check], sampling: Grade) -> list[str]:
    """Say what is wrong with the samples, worst first, then what is wrong with the flow."""
    ours = [c for c in checks if c.about == "sampling" and c.grade != "good"]
    reasons = [c.reason for c in sorted(ours, key=lambda c: -ORDER[c.grade])]
    if sampling == "poor":
        reasons = [c.reason for c in ours if c.grade == "poor"]
    flow = [c.reason for c in checks if c.about == "flow" and c.grade == "poor"]
    return reasons[:4] + ([f"the flow is poor ({', '.join(flow[:2])})"] if flow else [])


def _advice(run: RunData, checks: list[Check], flow: Grade) -> str:
    """Say what to do about each cause that the checks point to; nothing if there is none."""
    wrong = {c.name for c in checks if c.grade != "good"}
    parts = []
    if _ISOMERS in wrong:
        parts.append(
            f"Run again from structures that differ in {_several(run.one_state)}, and compare: "
            "more of the same does not sample other isomers"
        )
    if "reference data" in wrong:
        parts.append(f"The reference is short: {_setting(run, 'reference_seconds')}")
    if flow != "good" or run.prior_kept:
        parts.append(_flow_advice(run))
    if "audit of log q" in wrong:
        parts.append(f"Integrate the flow more finely: {_setting(run, 'grid_tolerance')}")
    chains = {"effective samples of the slowest coordinate", "agreement between chains"}
    if flow == "good" and wrong & chains:
        parts.append(f"The flow is good, the chains are short: {_setting(run, 'n_samples')}")
    told = [c for c in checks if c.about == "sampling" and c.grade != "good"]
    if not told and parts:
        parts.append("Averages over the weighted samples (flow_samples.npz) stand")
    if any(": chain against" in name or "exact value" in name for name in wrong):
        parts.append(
            "Two answers differ, so one of them misses a state: compare with a run of another "
            "--seed before trusting either"
        )
    if not parts:
        return ""
    said = ". ".join(part[0].upper() + part[1:] for part in parts)
    return f"{said}." + (" Until then treat averages as provisional." if told else "")


def _setting(run: RunData, key: str) -> str:
    """Say where an entry of the recipe is changed."""
    config = run.run.config
    return (
        f"change {key} (now {getattr(config.recipe, key):g}) in system.yaml (settings: "
        f"{config.budget})"
    )


def _flow_advice(run: RunData) -> str:
    """Say what would make the flow better, by how its training went."""
    recipe, budget = run.run.config.recipe, run.run.config.budget
    if recipe.method == "annealing":
        return (
            f"Ask more of the path: --ess (now {recipe.ess:g}) in a new --out, or "
            + _setting(run, "n_points")
        )
    if run.reference is None:
        return "This run used a flow that ships: train one of your own with openmm-eqflow run"
    if recipe.stochastic is not None:
        return (
            f"Raise n_levels in system.yaml (settings: {budget}: stochastic): weights spread less "
            "the shorter a step of the path is"
        )
    kept = "The prior alone is in use: " if run.prior_kept else ""
    trend = training_trend(run.history)
    if trend == "rising":
        longer = {"quick": "standard", "standard": "thorough"}.get(budget)
        how = f"--budget {longer}" if longer else _setting(run, "train_seconds")
        return f"{kept}training was still gaining when its time was over: more training, {how}"
    n_frames = run.stages.get("reference", {}).get("n_frames", 0)
    if trend == "falling":
        less = "take contacts out of" if "contacts" in (recipe.field or {}) else "set a smaller"
        return (
            f"{kept}training got worse while it went on, so the field is too flexible for "
            f"{n_frames:,} frames: more reference data ({_setting(run, 'reference_seconds')}), "
            f"{less} field, or end in time with patience; more training makes it worse"
        )
    prior = run.prior_kept["prior"] if run.prior_kept else run.metrics["prior_relative_ess"]
    if prior < _POOR_START:
        return (
            f"{kept}training no longer gains and starts from a poor prior (relative ESS "
            f"{prior:.2g}): a better start, that is more reference data "
            f"({_setting(run, 'reference_seconds')}); more training does not help"
        )
    if recipe.prior == "internal" and "contacts" not in (recipe.field or {}):
        return (
            f"{kept}training no longer gains: a more flexible field (settings: {budget}: field: "
            "{contacts: 64}), not more training"
        )
    return f"{kept}training no longer gains: more samples, {_setting(run, 'n_samples')}"


def training_trend(history: list[dict[str, float]]) -> Literal["rising", "flat", "falling"]:
    """Whether a training was still gaining, had settled, or got worse again.

    By the monitored ESS of the last training, last third against the one before; worse again also
    if the validation loss has left its minimum while the training loss went on falling. Too few
    rows to tell count as settled.
    """
    last = max((row.get("training", 0.0) for row in history), default=0.0)
    rows = [
        row for row in history if row.get("training", 0.0) == last and "relative_ess" in row
    ]
    if len(rows) < 3:
        return "flat"
    third = len(rows) // 3
    ess = np.array([row["relative_ess"] for row in rows])
    before, after = float(ess[-2 * third : -third].mean()), float(ess[-third:].mean())
    loss = np.array([row.get("loss", math.nan) for row in rows])
    held = np.array([row.get("validation_loss", math.nan) for row in rows])
    if np.isfinite(held).all() and held.min() > 0.0:
        best = int(held.argmin())
        if held[-third:].mean() > 1.1 * held[best] and loss[-third:].mean() < loss[best]:
            return "falling"
    if after < 0.8 * before and len(rows) >= 6:
        return "falling"
    return "rising" if after > 1.1 * before and len(rows) >= 6 else "flat"
