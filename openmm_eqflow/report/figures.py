"""Figures every run has: energies, weights, acceptance, autocorrelation, training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.report.data import Ensemble, RunData
from openmm_eqflow.report.theme import COLOURS, INK, Panel, new_figure, to_svg

__all__ = [
    "acceptance_panel",
    "autocorrelation",
    "autocorrelation_panel",
    "energy_panel",
    "log_weight_panel",
    "streak_panel",
    "training_panels",
    "weight_share_panel",
]

FloatArray = NDArray[np.float64]


def _quantile_range(
    values: list[FloatArray], low: float, high: float, pad: float
) -> tuple[float, float]:
    finite = [v[np.isfinite(v)] for v in values]
    finite = [v for v in finite if v.size]
    a = min(float(np.quantile(v, low)) for v in finite)
    b = max(float(np.quantile(v, high)) for v in finite)
    margin = pad * max(b - a, 1e-6)
    return a - margin, b + margin


def energy_panel(run: RunData) -> Panel:
    """Histogram of the reduced potential of reference, raw flow, reweighted flow and chain."""
    figure, axes = new_figure()
    exact = [e.u for e in run.ensembles]
    low, high = _quantile_range(exact, 0.0005, 0.9995, 0.15)
    raw = run.flow_u[np.isfinite(run.flow_u)]
    if raw.size:
        high = max(high, min(float(np.quantile(raw, 0.98)), high + 1.0 * (high - low)))
    edges = np.linspace(low, high, 61)
    axes.hist(
        raw,
        edges,
        weights=_shares(raw, run.flow_u.size, edges),
        color=COLOURS["raw"],
        alpha=0.35,
        label="flow, unweighted",
    )
    for ensemble, key, dash in (
        (run.reference, "reference", "-"),
        (run.chain, "chain", "-"),
        (run.flow, "flow", (0, (4, 1.5))),
    ):
        if ensemble is None:
            continue
        u = np.where(np.isfinite(ensemble.u), ensemble.u, np.inf)
        density, _ = np.histogram(u[np.isfinite(u)], edges, weights=ensemble.weights[np.isfinite(u)])
        axes.stairs(
            density / np.diff(edges),
            edges,
            color=COLOURS[key],
            linestyle=dash,
            linewidth=1.4,
            label=ensemble.label,
        )
    axes.set_xlabel("reduced potential u = U/kT (kT)")
    axes.set_ylabel("probability density (1/kT)")
    axes.set_xlim(low, high)
    axes.legend(loc="upper right")
    beyond = float(np.mean(~(run.flow_u <= high)))
    note = f" {beyond:.1%} of the unweighted flow samples lie right of the axis." if beyond > 0.001 else ""
    return Panel(
        "energy",
        "Energy overlap",
        to_svg(figure, "energy", "Histograms of the reduced potential"),
        "The chain and the reweighted flow should fall on the reference; the filled histogram is "
        "what the flow proposes before any weight or rejection." + note,
    )


def _shares(values: FloatArray, n: int, edges: FloatArray) -> FloatArray:
    return np.full(values.size, 1.0 / n / float(edges[1] - edges[0]))


def _centred(log_weight: FloatArray) -> FloatArray:
    """Log of w / mean(w); the mean includes zero weights."""
    top = log_weight.max()
    if not np.isfinite(top):
        return log_weight
    return log_weight - top - np.log(np.exp(log_weight - top).mean())


def log_weight_panel(run: RunData) -> Panel:
    """Distribution of the log weights of flow and prior, with the chain's largest."""
    figure, axes = new_figure()
    flow, prior = _centred(run.log_weight), _centred(run.prior_log_weight)
    shift = float(flow.max() - run.log_weight.max()) if np.isfinite(flow.max()) else 0.0
    chain_top = float(run.chain_log_weight.max()) + shift
    shown = [v for v in (flow, prior) if np.isfinite(v).any()]
    low = max(-25.0, _quantile_range(shown, 0.01, 1.0, 0.0)[0]) if shown else -1.0
    high = max([float(v.max()) for v in shown] + [chain_top, 1.0]) + 0.8
    edges = np.linspace(low, high, 71)
    for values, key, label in ((prior, "prior", "prior alone"), (flow, "flow", "flow")):
        counts, _ = np.histogram(np.clip(values[np.isfinite(values)], low, high), edges)
        axes.stairs(
            counts / max(values.size, 1) / np.diff(edges),
            edges,
            color=COLOURS[key],
            fill=key == "prior",
            alpha=0.4 if key == "prior" else 1.0,
            linewidth=1.4,
            label=f"{label} (n = {values.size:,})",
        )
    axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=":")
    gap = run.metrics["chain"].get("max_log_weight_gap")
    if np.isfinite(chain_top):
        axes.axvline(
            chain_top,
            color=COLOURS["alert"],
            linewidth=1.2,
            linestyle="--",
            label="largest in the chain",
        )
    axes.set_yscale("log")
    axes.set_xlabel("log(w / mean w)")
    axes.set_ylabel("probability density")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 1.22), ncols=1, borderaxespad=0.0)
    text = "" if gap is None else f" The chain met a weight e^{gap:.1f} times the largest proposed in it." if gap > 0 else ""
    return Panel(
        "log-weights",
        "Importance weights",
        to_svg(figure, "log-weights", "Distribution of log weights"),
        "A perfect flow is a spike at 0. The upper tail decides: configurations that the flow "
        "proposes too rarely have large weights, and a chain sticks in them." + text,
    )


def weight_share_panel(run: RunData) -> Panel:
    """Share of the total weight carried by the largest weights."""
    figure, axes = new_figure()
    for values, key, label in (
        (run.prior_log_weight, "prior", "prior alone"),
        (run.log_weight, "flow", "flow"),
    ):
        top = values.max()
        if not np.isfinite(top):
            continue
        w = np.sort(np.exp(values - top))[::-1]
        axes.plot(
            np.arange(1, w.size + 1) / w.size,
            np.cumsum(w) / w.sum(),
            color=COLOURS[key],
            label=label,
        )
    x = np.geomspace(1.0 / run.log_weight.size, 1.0, 100)
    axes.plot(x, x, color=INK, linestyle=":", linewidth=0.9, label="equal weights")
    axes.set_xscale("log")
    axes.set_xlabel("share of the samples, largest weights first")
    axes.set_ylabel("share of the total weight")
    axes.set_ylim(0.0, 1.02)
    axes.legend(loc="upper left")
    return Panel(
        "weight-share",
        "How few samples carry the weight",
        to_svg(figure, "weight-share", "Cumulated share of the weight"),
        "Close to the dotted line is good. A curve that starts high on the left means that a few "
        "samples decide every average.",
    )


def acceptance_panel(run: RunData) -> Panel:
    """Acceptance of flow and local moves along the chains."""
    figure, axes = new_figure()
    steps = np.arange(1, run.accepted.shape[1] + 1)
    rate = run.accepted.mean(axis=0)
    width = max(1, len(steps) // 20)
    axes.plot(
        steps,
        rate,
        color=COLOURS["flow"],
        alpha=0.35,
        linewidth=0.9,
        marker="." if len(steps) < 5 else None,
    )
    axes.plot(steps, _smooth(rate, width), color=COLOURS["flow"], label="flow move")
    local = run.local_acceptance[: len(steps)]
    axes.plot(
        steps[: len(local)],
        _smooth(local, width),
        color=COLOURS["chain"],
        linestyle=(0, (4, 1.5)),
        label="local (Hamiltonian) move",
    )
    axes.set_ylim(0.0, 1.05)
    axes.set_xlabel("chain step")
    axes.set_ylabel("acceptance")
    axes.legend(loc="lower right")
    return Panel(
        "acceptance",
        "Acceptance along the chain",
        to_svg(figure, "acceptance", "Acceptance against chain step"),
        f"Mean over {run.accepted.shape[0]} chains at every step (thin) and its running mean "
        "(thick). A trend means that the chains have not reached equilibrium.",
    )


def _smooth(values: FloatArray, width: int) -> FloatArray:
    if width < 2 or values.size < width:
        return values
    kernel = np.ones(width)
    # Divided by the number of values in the window, so the ends are not pulled down.
    norm = np.convolve(np.ones(values.size), kernel, mode="same")
    result: FloatArray = np.convolve(values, kernel, mode="same") / norm
    return result


def streak_panel(run: RunData) -> Panel:
    """Longest current run of rejections at every step."""
    figure, axes = new_figure()
    streaks = run.streaks
    steps = np.arange(1, streaks.shape[1] + 1)
    mark = "." if len(steps) < 5 else None
    axes.plot(steps, streaks.max(axis=0), color=COLOURS["alert"], marker=mark, label="worst chain")
    axes.plot(
        steps,
        np.quantile(streaks, 0.9, axis=0),
        color=COLOURS["sky"],
        marker=mark,
        linestyle=(0, (4, 1.5)),
        label="90th percentile of chains",
    )
    axes.set_ylim(0.0, max(3.0, 1.12 * float(streaks.max())))
    axes.set_xlabel("chain step")
    axes.set_ylabel("flow rejections in a row")
    axes.legend(loc="upper left")
    stuck = int(streaks.max())
    share = float((streaks.max(axis=1) > 0.25 * len(steps)).mean())
    return Panel(
        "streaks",
        "Stuck stretches",
        to_svg(figure, "streaks", "Consecutive rejections against chain step"),
        f"Longest: {stuck} of {len(steps)} steps. {share:.0%} of the chains were stuck for more "
        "than a quarter of the run. Local moves go on in a stuck chain.",
    )


def autocorrelation(chains: FloatArray, n_lags: int) -> FloatArray:
    """Autocorrelation of ``(n_chains, n_steps)`` about the common mean, lags 0 to ``n_lags``."""
    centred = chains - chains.mean()
    n = chains.shape[1]
    variance = float(np.square(centred).mean())
    if variance <= 0.0:
        return np.ones(n_lags + 1)
    return np.array(
        [
            float((centred[:, : n - lag] * centred[:, lag:]).mean()) / variance
            for lag in range(n_lags + 1)
        ]
    )


def autocorrelation_panel(run: RunData, name: str) -> Panel | None:
    """Autocorrelation of one coordinate against energy evaluations, chain beside reference."""
    recipe = run.run.config.recipe
    rows: list[tuple[Ensemble, str, float, str]] = [
        (run.chain, "chain", float(recipe.n_local_steps + recipe.n_proposals), "Markov chain")
    ]
    if run.reference is not None and run.plan is not None:
        steps = run.plan.steps_per_swap * run.plan.swaps_per_frame
        rows.append(
            (
                run.reference,
                "reference",
                float(steps * len(run.plan.temperatures)),
                f"reference MD ({len(run.plan.temperatures)} temperature"
                + ("s)" if len(run.plan.temperatures) > 1 else ")"),
            )
        )
    figure, axes = new_figure()
    drawn = False
    for ensemble, key, cost, label in rows:
        values = ensemble.by_chain(ensemble.coordinates[name])
        n_lags = min(values.shape[1] // 3, 400)
        if n_lags < 1:
            continue
        rho = autocorrelation(values, n_lags)
        axes.plot(
            cost * np.arange(1, n_lags + 1),
            rho[1:],
            color=COLOURS[key],
            label=label,
            marker=".",
            markersize=3,
        )
        drawn = True
    if not drawn:
        return None
    axes.axhline(0.0, color=INK, linewidth=0.7)
    axes.set_xscale("log")
    axes.set_ylim(-0.25, 1.05)
    axes.set_xlabel("lag (energy or force evaluations)")
    axes.set_ylabel("autocorrelation")
    axes.legend(loc="upper right")
    return Panel(
        "autocorrelation",
        f"Autocorrelation of {name}",
        to_svg(figure, "autocorrelation", f"Autocorrelation of {name}"),
        f"The slowest coordinate of the chain. One chain step costs {rows[0][2]:.0f} energy "
        "evaluations (the flow's own time is not in them); reference frames count every "
        "temperature of the ladder.",
    )


def training_panels(run: RunData) -> list[Panel]:
    """Loss and ESS during training; nothing for an adopted flow."""
    history: list[dict[str, Any]] = run.stages.get("train", {}).get("history") or []
    if not history:
        return []
    panels = []
    minutes = np.array([row.get("seconds", 0.0) for row in history]) / 60.0
    mark = "." if len(history) < 40 else None
    figure, axes = new_figure()
    found = False
    for column, key, label, dash in (
        ("loss", "chain", "training", "-"),
        ("validation_loss", "flow", "held-out", (0, (4, 1.5))),
    ):
        y = np.array([_number(row.get(column)) for row in history])
        if np.isfinite(y).any():
            axes.plot(minutes, y, color=COLOURS[key], marker=mark, linestyle=dash, label=label)
            found = True
    if found:
        names = {"liouville": "residual variance", "flow-matching": "flow-matching loss"}
        axes.set_xlabel("training time (min)")
        axes.set_ylabel(names.get(run.run.config.recipe.objective, "loss"))
        axes.legend(loc="upper right")
        panels.append(
            Panel(
                "loss",
                "Training loss",
                to_svg(figure, "loss", "Loss against training time"),
                f"{run.stages['train'].get('n_steps', len(history)):,} steps. Held-out above "
                "training means that the pool is learnt by heart; still falling means that more "
                "time pays.",
            )
        )
    ess = np.array([_number(row.get("relative_ess")) for row in history])
    if np.isfinite(ess).any():
        figure, axes = new_figure()
        axes.plot(minutes, ess, color=COLOURS["flow"], marker=mark, label="monitor (few samples)")
        axes.axhline(
            run.metrics["relative_ess"],
            color=COLOURS["flow"],
            linewidth=1.0,
            linestyle="--",
            label=f"final, n = {run.metrics['n_samples']:,}",
        )
        axes.axhline(
            run.metrics["prior_relative_ess"],
            color=COLOURS["prior"],
            linewidth=1.2,
            linestyle=":",
            label="prior alone",
        )
        axes.set_ylim(0.0, 1.0)
        axes.set_xlabel("training time (min)")
        axes.set_ylabel("raw relative ESS")
        axes.legend(loc="upper right")
        panels.append(
            Panel(
                "training-ess",
                "ESS during training",
                to_svg(figure, "training-ess", "Relative effective sample size against time"),
                "The monitor uses a thousand samples or fewer and a coarse time grid: a trend, "
                "and too optimistic where rare large weights decide. Only the final value counts.",
            )
        )
    return panels


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
