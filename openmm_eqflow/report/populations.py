"""Basin populations and mean observables of every ensemble, with errors and differences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import find_peaks

from openmm_eqflow.analysis.chains import (
    autocorrelation_ess,
    mean_with_error,
    population,
    weighted_mean_with_error,
)
from openmm_eqflow.analysis.observables import (
    TwoStates,
    pair_distances,
    squared_radius_of_gyration,
    two_states,
)
from openmm_eqflow.analysis.weights import Estimate, kish_ess
from openmm_eqflow.report.data import Ensemble, RunData, Shown
from openmm_eqflow.targets.model_systems import harmonic_log_z

__all__ = [
    "Quantity",
    "States",
    "compare_ensembles",
    "coordinate_sizes",
    "define_states",
]

FloatArray = NDArray[np.float64]
_FEW_PAIRS = 10


@dataclass(frozen=True)
class Quantity:
    """One row of the table.

    Attributes
    ----------
    name, definition, unit
        How to read it.
    estimates
        Ensemble label -> (value, standard error, effective samples).
    exact
        Known value, where there is one.
    state
        Whether it is the population of a state (else a mean).
    """

    name: str
    definition: str
    unit: str
    state: bool
    estimates: dict[str, tuple[Estimate, float]]
    exact: float | None = None
    versus: str | None = field(default=None)

    def z(self, a: str, b: str) -> float | None:
        """Return (a - b) over the combined standard error; None if either is unknown."""
        if a not in self.estimates or b not in self.estimates:
            return None
        first, second = self.estimates[a][0], self.estimates[b][0]
        error = math.hypot(float(first.error), float(second.error))
        if not (math.isfinite(error) and error > 0.0):
            return None
        return float(first.value - second.value) / error

    def to_json(self) -> dict[str, Any]:
        """For metrics.json; infinities become null."""

        def number(value: float) -> float | None:
            return float(value) if math.isfinite(value) else None

        return {
            "name": self.name,
            "definition": self.definition,
            "unit": self.unit,
            "kind": "population" if self.state else "mean",
            "exact": self.exact,
            "estimates": {
                label: {
                    "value": number(float(estimate.value)),
                    "error": number(float(estimate.error)),
                    "effective_samples": number(ess),
                }
                for label, (estimate, ess) in self.estimates.items()
            },
            "compared_with": self.versus,
            "z": None if self.versus is None else self.z("Markov chain", self.versus),
        }


def _mean(ensemble: Ensemble, values: FloatArray) -> tuple[Estimate, float]:
    """Mean, error and effective samples of one value per frame."""
    if ensemble.log_weight is not None:
        finite = np.where(np.isfinite(values), values, 0.0)
        return (
            weighted_mean_with_error(finite, ensemble.log_weight, n_bootstrap=200),
            kish_ess(ensemble.log_weight),
        )
    chains = ensemble.by_chain(values)
    if chains.shape[1] >= 4:
        return mean_with_error(chains), autocorrelation_ess(chains)
    m = len(chains)
    means = chains.mean(axis=1)
    error = float(means.std(ddof=1)) / math.sqrt(m) if m > 1 else math.inf
    return Estimate(float(means.mean()), error), float(m)


def _share(ensemble: Ensemble, inside: NDArray[np.bool_]) -> tuple[Estimate, float]:
    return population(inside, log_weights=ensemble.log_weight, chain=ensemble.chain)


@dataclass(frozen=True)
class States:
    """Where states are cut: arcs of torsions by name, and the distance of a close pair (nm)."""

    arcs: dict[str, TwoStates]
    close: float | None


def define_states(run: Shown) -> States:
    """Cut at the barriers of all ensembles together; phi of a peptide always at 0.

    States that differ in labels only (turns of a methyl or a phenyl, the chairs of cyclohexane)
    are one. Of a ring the torsion whose smaller state is largest is taken.
    """
    arcs: dict[str, TwoStates] = {}
    rings: dict[int, tuple[float, str]] = {}
    weights = np.concatenate([e.weights / len(run.ensembles) for e in run.ensembles])
    for column, torsion in enumerate(run.chain.torsions):
        if torsion.even:
            continue
        if torsion.name.startswith("φ"):
            arcs[torsion.name] = TwoStates(0.0, np.pi)
            continue
        # Folded torsions on a full circle: what is left of their states is real.
        pooled = torsion.fold * np.concatenate([e.angles[:, column] for e in run.ensembles])
        found = two_states(pooled, weights)
        if found is None:
            continue
        if torsion.ring >= 0:
            share = float(weights[found.contains(pooled)].sum())
            best, name = rings.get(torsion.ring, (-1.0, ""))
            if share <= best:
                continue
            arcs.pop(name, None)
            rings[torsion.ring] = share, torsion.name
        arcs[torsion.name] = found
    close = None
    if run.kind == "cluster":
        x = run.ensembles[0].x
        close = _first_gap(pair_distances(x[:: max(1, len(x) // 4000)]))
    return States(arcs, close)


def compare_ensembles(run: RunData, states: States | None = None) -> list[Quantity]:
    """Estimate every quantity of the run's kind in every ensemble.

    ``states`` of another run make the rows of two runs comparable.
    """
    versus = run.reference.label if run.reference is not None else run.flow.label
    states = states or define_states(run)
    rows = _molecule(run, states, versus) if states.arcs else _close_pairs(run, states, versus)
    energy = {e.label: _mean(e, e.u) for e in run.ensembles}
    size = {
        e.label: _mean(e, np.sqrt(squared_radius_of_gyration(e.x))) for e in run.ensembles
    }
    exact = (
        0.5 * (run.system.n_particles - 1) * run.system.n_dims if run.kind == "harmonic" else None
    )
    rows.append(
        Quantity("mean energy", "mean reduced potential", "kT", False, energy, exact, versus)
    )
    rows.append(
        Quantity(
            "radius of gyration",
            "mean of the geometric radius of gyration",
            "nm",
            False,
            size,
            None,
            versus,
        )
    )
    if run.kind == "harmonic" and run.metrics.get("log_z") is not None:
        estimate = Estimate(run.metrics["log_z"], run.metrics["log_z_error"] or math.inf)
        rows.append(
            Quantity(
                "log Z",
                "absolute, on the mean-free subspace",
                "",
                False,
                {run.flow.label: (estimate, kish_ess(run.log_weight))},
                harmonic_log_z(run.system.n_particles, run.system.n_dims),
            )
        )
    return rows


def _molecule(run: RunData, states: States, versus: str) -> list[Quantity]:
    rows = []
    for column, torsion in enumerate(run.chain.torsions):
        arc = states.arcs.get(torsion.name)
        if arc is None:
            continue
        if torsion.name.startswith("φ"):
            label = f"{torsion.name} > 0"
            text = f"share with {torsion.name} between 0° and 180°"
        else:
            low, high = (np.degrees(end) / torsion.fold for end in (arc.start, arc.stop))
            label = f"{torsion.name}, minor state"
            text = f"share with {torsion.name} from {low:.0f}° up to {high:.0f}°" + (
                "" if low < high else f" through {180 / torsion.fold:.0f}°"
            )
        estimates = {
            e.label: _share(e, arc.contains(torsion.fold * e.angles[:, column]))
            for e in run.ensembles
        }
        rows.append(Quantity(label, text, "", True, estimates, None, versus))
    return rows


def _first_gap(distances: FloatArray) -> float | None:
    """Deepest minimum between the first peak of the pair distances and what follows."""
    high = float(np.quantile(distances, 0.999))
    counts, edges = np.histogram(distances, bins=80, range=(0.0, high))
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
    density = np.convolve(counts, kernel / kernel.sum(), mode="same")
    # Prominent ones only: the noise of a histogram has peaks of its own.
    peaks, _ = find_peaks(np.pad(density, 1), prominence=0.15 * density.max())
    peaks = peaks - 1
    if len(peaks) < 2:
        return None
    between = density[peaks[0] : peaks[1] + 1]
    k = int(peaks[0] + np.argmin(between))
    return float(0.5 * (edges[k] + edges[k + 1]))


def _count_close(x: NDArray[np.float32], cut: float) -> NDArray[np.int64]:
    parts = np.array_split(x, max(1, len(x) // 1000))
    return np.concatenate([(pair_distances(part) < cut).sum(axis=1) for part in parts])


def _close_pairs(run: RunData, states: States, versus: str) -> list[Quantity]:
    cut = states.close
    if cut is None:
        return []
    close = {e.label: _count_close(e.x, cut) for e in run.ensembles}
    rows = [
        Quantity(
            "close pairs",
            f"mean number of pairs closer than {cut:.3g} nm",
            "",
            False,
            {e.label: _mean(e, close[e.label].astype(np.float64)) for e in run.ensembles},
            None,
            versus,
        )
    ]
    n_pairs = run.system.n_particles * (run.system.n_particles - 1) // 2
    if n_pairs <= _FEW_PAIRS:
        for k in range(n_pairs + 1):
            shares = {e.label: _share(e, close[e.label] == k) for e in run.ensembles}
            if any(0.01 < float(estimate.value) < 0.99 for estimate, _ in shares.values()):
                text = f"exactly {k} pairs closer than {cut:.3g} nm"
                rows.append(Quantity(f"{k} close pairs", text, "", True, shares, None, versus))
    return rows


def coordinate_sizes(run: RunData, ensemble: Ensemble) -> dict[str, float]:
    """Effective samples of every coordinate of an ensemble of chains; constants are left out."""
    sizes = {}
    for name, values in ensemble.coordinates.items():
        chains = ensemble.by_chain(values)
        if chains.shape[1] >= 4:
            size = autocorrelation_ess(chains)
            if size > 0.0:
                sizes[name] = size
    return sizes
