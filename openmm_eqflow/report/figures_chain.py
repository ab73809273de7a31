"""Figures of the chains and of the training."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from openmm_eqflow.report.data import Ensemble, RunData
from openmm_eqflow.report.theme import COLOURS, INK, Panel, legend, new_figure, to_svg

__all__ = [
    "acceptance_panel",
    "autocorrelation",
    "autocorrelation_panel",
    "streak_panel",
    "training_panels",
]

FloatArray = NDArray[np.float64]
_LOSSES = {
    "liouville": "residual variance",
    "flow-matching": "flow-matching loss",
    "nll": "negative log likelihood",
    "path-forward": "negative log likelihood",
}


def acceptance_panel(run: RunData) -> Panel:
    """Draw the acceptance of flow and local moves along the chains."""
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
    if np.isfinite(local).any():
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
    legend(figure, axes)
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
    legend(figure, axes)
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
    rows: list[tuple[Ensemble, str, float, str]] = [
        (run.chain, "chain", float(run.energies_per_step), "Markov chain")
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
    legend(figure, axes)
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
    if panel := _path_panel(history):
        panels.append(panel)
    minutes = np.array([row.get("seconds", 0.0) for row in history]) / 60.0
    mark = "." if len(history) < 40 else None
    for index, recipe in enumerate(run.run.config.recipe.trainings()):
        rows = [row for row in history if row.get("training", 0.0) == index]
        if panel := _loss_panel(rows, str(recipe.objective), index):
            panels.append(panel)
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
        legend(figure, axes)
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


def _path_panel(history: list[dict[str, Any]]) -> Panel | None:
    """Draw what the field of a stochastic flow takes over; None for other flows."""
    t, spread, residual = (
        np.array([_number(row.get(key)) for row in history])
        for key in ("time", "spread", "residual")
    )
    if not np.isfinite(t).all():
        return None
    figure, axes = new_figure()
    axes.plot(t, spread, color=COLOURS["prior"], label="without the field")
    axes.plot(t, residual, color=COLOURS["flow"], label="left by the field")
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("t, from ideal gas to cluster")
    axes.set_ylabel("std of du/dt (kT)")
    legend(figure, axes)
    steps = np.diff(t)
    before, after = (float((y[:-1] * steps).sum()) for y in (spread, residual))
    return Panel(
        "path",
        "What relaxation has to do along the path",
        to_svg(figure, "path", "Fluctuation of du/dt along the path"),
        f"Areas: {before:.1f} kT without the field, {after:.1f} kT with it, the latter on "
        "configurations held out of its fit. Levels lie evenly in the latter.",
    )


def _loss_panel(history: list[dict[str, Any]], objective: str, index: int) -> Panel | None:
    """Losses of one training; None if there are none."""
    minutes = np.array([row.get("seconds", 0.0) for row in history]) / 60.0
    figure, axes = new_figure()
    found = False
    for column, key, label, dash in (
        ("loss", "chain", "training", "-"),
        ("validation_loss", "flow", "held-out", (0, (4, 1.5))),
    ):
        y = np.array([_number(row.get(column)) for row in history])
        if np.isfinite(y).any():
            mark = "." if len(history) < 40 else None
            axes.plot(minutes, y, color=COLOURS[key], marker=mark, linestyle=dash, label=label)
            found = True
    if not found:
        return None
    axes.set_xlabel("training time (min)")
    axes.set_ylabel(_LOSSES.get(objective, "loss"))
    legend(figure, axes)
    name = "fine-tuning" if index else "training"
    steps = int(history[-1].get("step", len(history)))
    return Panel(
        f"loss-{index}" if index else "loss",
        f"{name.capitalize()} loss",
        to_svg(figure, f"loss-{index}" if index else "loss", "Loss against training time"),
        f"{steps:,} steps by the end. Held-out above training means that the points are learnt "
        "by heart; still falling means that more time pays.",
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
