"""Figures of molecules: Ramachandran maps and torsion histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from openmm_eqflow.analysis.observables import Ramachandran
from openmm_eqflow.analysis.profiles import FreeEnergyMap, free_energy_map, weighted_histogram
from openmm_eqflow.report.data import Ensemble, Shown
from openmm_eqflow.report.structures import Basin
from openmm_eqflow.report.theme import COLOURS, EMPTY, INK, Panel, legend, new_figure, to_svg

__all__ = [
    "MAX_TORSIONS",
    "ramachandran_panels",
    "torsion_panels",
]

FloatArray = NDArray[np.float64]
_TICKS = (-180, -90, 0, 90, 180)
_CEILING = 7.0
MAX_TORSIONS = 12


def _map(run: Shown, ensemble: Ensemble, pair: Ramachandran, bins: int) -> FreeEnergyMap:
    torsions = ensemble.torsions
    phi, psi = (ensemble.angles[:, torsions.index(t)] for t in (pair.phi, pair.psi))
    return free_energy_map(
        phi, psi, log_weights=ensemble.log_weight, chain=ensemble.chain, bins=bins
    )


def _absolute(surface: FreeEnergyMap) -> FloatArray:
    """-log p, not shifted: maps of several ensembles are compared by it."""
    return np.where(surface.probability > 0.0, -np.log(surface.probability.clip(1e-300)), np.inf)


def _draw(
    values: FloatArray, cmap: str, limits: tuple[float, float], label: str, extend: str
) -> tuple[Figure, Axes]:
    figure, axes = new_figure(height=2.55)
    edges = np.degrees(np.linspace(-np.pi, np.pi, values.shape[0] + 1))
    colours = matplotlib.colormaps[cmap].with_extremes(bad=(0.0, 0.0, 0.0, 0.0))
    mesh = axes.pcolormesh(
        edges,
        edges,
        np.ma.masked_invalid(values.T),
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        rasterized=True,
    )
    bar = figure.colorbar(mesh, ax=axes, extend=extend, shrink=0.85, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    axes.set_aspect("equal")
    # Neither end of a colour map may vanish in the page, light or dark.
    axes.set_facecolor(EMPTY)
    axes.set_xticks(_TICKS)
    axes.set_yticks(_TICKS)
    axes.set_xlabel("φ (°)")
    axes.set_ylabel("ψ (°)")
    return figure, axes


def _mark(axes: Axes, basins: Sequence[Basin], columns: tuple[int, int]) -> None:
    """Put the numbers of the basins where their structures lie; the page finds them by id."""
    # The frame of the axes, so that a click can be read as angles.
    axes.patch.set_gid("torus")
    for k, basin in enumerate(basins):
        phi, psi = (float(np.degrees(basin.angles[c])) for c in columns)
        axes.plot(phi, psi, "o", color=INK, markerfacecolor=EMPTY, markersize=9, gid=f"basin-{k}")
        axes.annotate(str(k + 1), (phi, psi), ha="center", va="center_baseline", fontsize=7)


def ramachandran_panels(
    run: Shown, pairs: list[Ramachandran], basins: Sequence[Basin]
) -> list[Panel]:
    """Free-energy maps of every ensemble, then difference to the reference and its error."""
    panels = []
    for pair in pairs:
        where = f" of {pair.residue}" if pair.residue else ""
        key = f"rama-{pair.phi.atoms[1]}"
        torsions = run.chain.torsions
        fewest = min(len(e.x) for e in run.ensembles)
        bins = 36 if fewest > 3000 else 24
        maps = {e.label: _map(run, e, pair, bins) for e in run.ensembles}
        floor = -math.log(max(float(m.probability.max()) for m in maps.values()))
        for index, ensemble in enumerate(run.ensembles):
            values = _absolute(maps[ensemble.label]) - floor
            figure, axes = _draw(values, "cividis", (0.0, _CEILING), "free energy (kT)", "max")
            _mark(axes, basins, (torsions.index(pair.phi), torsions.index(pair.psi)))
            panels.append(
                Panel(
                    f"{key}-{index}",
                    f"Ramachandran map{where}: {ensemble.label}",
                    to_svg(figure, f"{key}-{index}", f"Free energy against phi and psi{where}"),
                    f"{len(ensemble.x):,} frames"
                    + (", weighted" if ensemble.log_weight is not None else "")
                    + ". Empty bins are grey; all maps share one zero.",
                )
            )
        if len(run.ensembles) < 2:
            continue
        first, second = run.ensembles[0], run.ensembles[1]
        a, b = maps[first.label], maps[second.label]
        both = (a.probability > 0.0) & (b.probability > 0.0)
        names = second.label, first.label
        difference = np.full(both.shape, np.nan)
        error = np.full(both.shape, np.nan)
        difference[both] = np.log(a.probability[both] / b.probability[both])
        error[both] = np.hypot(a.error[both], b.error[both])
        known = both & np.isfinite(error) & (error < 1.0) & (error > 0.0)
        trusted = np.where(both & (error < 1.5), difference, np.nan)
        figure, _ = _draw(trusted, "PuOr", (-1.5, 1.5), "difference (kT)", "both")
        agreement = (
            f" {float((np.abs(difference[known]) < 2.0 * error[known]).mean()):.0%} of the "
            f"{int(known.sum())} well-sampled bins agree within two standard errors."
            if known.any()
            else " No bin is sampled well enough to compare."
        )
        panels.append(
            Panel(
                f"{key}-difference",
                f"Difference{where}: {names[0]} - {names[1]}",
                to_svg(figure, f"{key}-difference", "Free-energy difference map"),
                f"Positive (purple): less populated in the {names[0]}. Bins with an error above "
                f"1.5 kT are grey.{agreement}",
            )
        )
        figure, _ = _draw(error, "cividis", (0.0, 1.5), "standard error (kT)", "max")
        panels.append(
            Panel(
                f"{key}-error",
                f"Error of the difference{where}",
                to_svg(figure, f"{key}-error", "Standard error of the difference map"),
                "Block bootstrap of both ensembles, combined; grey where either saw nothing.",
            )
        )
    return panels


def torsion_panels(run: Shown, basins: Sequence[Basin]) -> list[Panel]:
    """One histogram per rotatable bond, with error bands."""
    panels = []
    torsions = run.chain.torsions
    for column, torsion in enumerate(torsions[:MAX_TORSIONS]):
        half = 180.0 / torsion.fold
        figure, axes = new_figure()
        for ensemble, key, dash in (
            (run.reference, "reference", "-"),
            (run.chain, "chain", "-"),
            (run.flow, "flow", (0, (4, 1.5))),
        ):
            if ensemble is None:
                continue
            histogram = weighted_histogram(
                np.degrees(ensemble.angles[:, column]),
                log_weights=ensemble.log_weight,
                chain=ensemble.chain,
                bins=48 if torsion.fold == 1 else 24,
                range=(-half, half),
                n_bootstrap=100,
            )
            width = float(np.diff(histogram.edges)[0])
            axes.stairs(
                histogram.density,
                histogram.edges,
                color=COLOURS[key],
                linestyle=dash,
                linewidth=1.3,
                label=ensemble.label,
            )
            if np.isfinite(histogram.error).all():
                axes.stairs(
                    (histogram.probability + histogram.error) / width,
                    histogram.edges,
                    baseline=np.maximum(histogram.probability - histogram.error, 0.0) / width,
                    color=COLOURS[key],
                    fill=True,
                    alpha=0.22,
                )
        axes.set_xlim(-half, half)
        axes.set_xticks(np.linspace(-half, half, 5))
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel(f"torsion {torsion.name} (°)")
        axes.patch.set_gid("torus")
        for k, basin in enumerate(basins if len(basins) > 1 else ()):
            place = float(np.degrees(basin.angles[column]))
            axes.axvline(place, ymax=0.05, color=INK, linewidth=1.5, gid=f"basin-{k}")
        axes.set_ylabel("density (1/°)")
        legend(figure, axes)
        fold = "" if torsion.fold == 1 else f", modulo {360 // torsion.fold}°"
        atoms = "-".join(run.chain.topology.atom(k).name for k in torsion.atoms)
        panels.append(
            Panel(
                f"torsion-{column}",
                f"Torsion {torsion.name}",
                to_svg(figure, f"torsion-{column}", f"Histogram of torsion {torsion.name}"),
                f"Atoms {atoms}{fold}. Bands: one standard error.",
            )
        )
    return panels
