"""The page of ``openmm-eqflow anneal``: isomers, structures, the path, and dynamics beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mdtraj

from openmm_eqflow.analysis.observables import ramachandran_pairs
from openmm_eqflow.errors import CheckpointError
from openmm_eqflow.files import write_text
from openmm_eqflow.report.build import molecule_view, render
from openmm_eqflow.report.data import Ensemble, read_json, read_npz, reference_ensemble
from openmm_eqflow.report.figures_molecule import ramachandran_panels, torsion_panels
from openmm_eqflow.report.figures_path import path_panels
from openmm_eqflow.report.isomers import coverage, isomer_rows, round_rows
from openmm_eqflow.report.populations import define_states
from openmm_eqflow.report.structures import find_basins
from openmm_eqflow.report.theme import style
from openmm_eqflow.report.verdict import pm
from openmm_eqflow.runs.reference.data import load_reference
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import MolecularSystem
from openmm_eqflow.units import kelvin, positions_in_nm

__all__ = [
    "write_annealed_report",
]

@dataclass(frozen=True, eq=False)
class _Annealed:
    """Samples of a path, and frames of dynamics if they are compared."""

    system: MolecularSystem
    chain: Ensemble
    reference: Ensemble | None
    kind: str = "molecule"
    flow: Ensemble | None = None

    @property
    def temperature(self) -> float:
        return kelvin(self.system.temperature)

    @property
    def ensembles(self) -> list[Ensemble]:
        return [self.chain] if self.reference is None else [self.reference, self.chain]


def write_annealed_report(folder: str | Path, system: MolecularSystem) -> Path:
    """Write ``folder``/report.html from what ``anneal`` left there.

    Parameters
    ----------
    folder
        Of :func:`~openmm_eqflow.runs.annealing.anneal_system`.
    system
        The molecule.

    Returns
    -------
    Path
        The page: one file, no external request.

    Raises
    ------
    CheckpointError
        A file is missing, damaged or of an earlier version.

    Examples
    --------
    >>> write_annealed_report("runs/mol-annealed", system)  # doctest: +SKIP
    """
    folder = Path(folder)
    metrics, samples = read_json(folder / "metrics.json"), read_npz(folder / "samples.npz")
    if "levels" not in metrics or "u" not in samples:
        raise CheckpointError(f"{folder} is of an earlier version; run the same anneal once more")
    start = positions_in_nm(system.positions)
    torsions = find_isomers(system.system, system.topology, start).torsions
    topology = mdtraj.Topology.from_openmm(system.topology)
    weighted = Ensemble(
        "weighted samples",
        samples["positions"],
        samples["u"],
        samples["log_weight"],
        None,
        topology,
        torsions,
    )
    reference = None
    if "dynamics" in metrics:
        data = load_reference(Path(metrics["dynamics"]["run"]))
        reference = reference_ensemble(data, system.n_dims, topology, torsions)
    shown = _Annealed(system, weighted, reference)
    states = define_states(shown)
    basins = find_basins(shown, states)
    with style():
        sections = [("The path", "path", path_panels(metrics))]
        for k, pair in enumerate(ramachandran_pairs(torsions)):
            heading = f"Backbone of {pair.residue}" if pair.residue else "Backbone"
            sections.append((heading, f"backbone-{k}", ramachandran_panels(shown, [pair], basins)))
        sections.append(("Torsions", "torsions", torsion_panels(shown, basins)))
        context = _context(metrics, shown) | molecule_view(shown, states, basins)
    html = render("annealed.html", context | {"sections": [s for s in sections if s[2]]})
    write_text(folder / "report.html", html)
    return folder / "report.html"


def _context(metrics: dict[str, Any], shown: _Annealed) -> dict[str, Any]:
    m = metrics
    effective = m["relative_ess"] * m["n_samples"]
    k = m["pareto_k"]
    value, _, error = pm(m["log_z"], m["log_z_error"]).partition(" ± ")
    return {
        "title": m["system"],
        "description": shown.system.description.rstrip(". ") + ".",
        "temperature": f"{shown.temperature:g} K",
        "grade": "poor" if m["warnings"] else "good",
        "warnings": m["warnings"],
        "tiles": [
            (
                f"{m['relative_ess']:.3f}",
                "raw relative ESS",
                f"± {m['relative_ess_error']:.3f}; of paths; n = {m['n_samples']:,}",
            ),
            (f"{effective:,.0f}", "effective samples", "independent, with weights"),
            (value, "log Z", f"± {error or 'unknown'}; mean-free, nm"),
            ("∞" if k is None else f"{k:.2f}", "Pareto k", "of the weights"),
            (str(m["n_levels"]), "levels", f"{1e3 * m['seconds_per_sample']:.2g} ms a sample"),
        ],
        "isomers": isomer_rows(m),
        "compared": m.get("dynamics", {}).get("run"),
        "coverage": coverage(m),
        "rounds": round_rows(m),
    }
