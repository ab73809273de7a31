"""What a report needs of a run directory, read once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mdtraj
import numpy as np
import yaml
from numpy.typing import NDArray

from openmm_eqflow.analysis.observables import (
    Torsion,
    seen_once,
    slow_coordinates,
    squared_radius_of_gyration,
    torsion_angles,
)
from openmm_eqflow.errors import CheckpointError
from openmm_eqflow.files import read_dcd
from openmm_eqflow.moves.chains import load_chains
from openmm_eqflow.runs.directory import RunDirectory
from openmm_eqflow.runs.reference.data import ReferenceData, load_reference
from openmm_eqflow.runs.reference.plan import SamplingPlan
from openmm_eqflow.runs.reference.tempering import chunk_paths
from openmm_eqflow.targets.isomers import Isomers, find_isomers
from openmm_eqflow.targets.library import MolecularSystem
from openmm_eqflow.targets.symmetry import Symmetry, find_symmetry
from openmm_eqflow.units import positions_in_nm

__all__ = [
    "Ensemble",
    "RunData",
    "Shown",
    "load_run",
    "read_json",
    "read_npz",
    "reference_ensemble",
]

FloatArray = NDArray[np.float64]
_MAX_FRAMES = 20_000


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Frames with weights, and which chain (or walker) made each.

    Attributes
    ----------
    label
        How figures and tables call it.
    x
        ``(n, N, D)`` nm.
    u
        Reduced potential ``(n,)``.
    log_weight
        ``(n,)`` of independent weighted samples, None for equal weights.
    chain
        ``(n,)`` labels of correlated frames, None for independent ones.
    """

    label: str
    x: NDArray[np.float32]
    u: FloatArray
    log_weight: FloatArray | None
    chain: NDArray[np.int64] | None
    topology: mdtraj.Topology
    torsions: tuple[Torsion, ...]

    @cached_property
    def trajectory(self) -> mdtraj.Trajectory:
        """The frames in mdtraj (z = 0 for planar systems)."""
        x = self.x
        if x.shape[2] == 2:
            x = np.concatenate([x, np.zeros_like(x[..., :1])], axis=2)
        return mdtraj.Trajectory(x, self.topology)

    @cached_property
    def angles(self) -> FloatArray:
        """Torsions ``(n, n_torsions)``, radians."""
        return torsion_angles(self.x, self.torsions)

    @cached_property
    def weights(self) -> FloatArray:
        """Normalised weights ``(n,)``."""
        if self.log_weight is None:
            return np.full(len(self.x), 1.0 / len(self.x))
        top = self.log_weight.max()
        if top == -np.inf:
            return np.zeros(len(self.x))
        w = np.exp(self.log_weight - top)
        normalised: FloatArray = w / w.sum()
        return normalised

    @cached_property
    def coordinates(self) -> dict[str, FloatArray]:
        """Coordinates whose mixing is judged, each ``(n,)``."""
        if self.x.shape[2] == 2:
            return {
                "energy": self.u,
                "squared radius of gyration": squared_radius_of_gyration(self.x),
            }
        return {"energy": self.u, **slow_coordinates(self.x, self.angles, self.torsions)}

    def by_chain(self, values: FloatArray) -> FloatArray:
        """Values as ``(n_chains, n_steps)``; longer chains lose their ends."""
        if self.chain is None:
            return np.atleast_2d(values)
        parts = [values[self.chain == label] for label in np.unique(self.chain)]
        shortest = min(len(part) for part in parts)
        return np.stack([part[:shortest] for part in parts])


class Shown(Protocol):
    """What views, maps and histograms need: the ensemble on show, and others beside it."""

    @property
    def system(self) -> MolecularSystem:
        """The molecule."""
        ...

    @property
    def kind(self) -> str:
        """Of the system."""
        ...

    @property
    def temperature(self) -> float:
        """Kelvin."""
        ...

    @property
    def reference(self) -> Ensemble | None:
        """Dynamics, if there are any."""
        ...

    @property
    def chain(self) -> Ensemble:
        """What is shown."""
        ...

    @property
    def flow(self) -> Ensemble | None:
        """Another way to the same, if there is one."""
        ...

    @property
    def ensembles(self) -> list[Ensemble]:
        """All that have any weight."""
        ...


@dataclass(frozen=True, eq=False)
class RunData:
    """A run directory in memory.

    Attributes
    ----------
    reference, chain, flow
        Ensembles of reference MD (None for an adopted flow), Markov chains, independent flow
        samples with their weights (positions of the first few thousand only).
    log_weight, prior_log_weight, flow_u
        All independent samples ``(n,)``.
    accepted, streaks
        ``(n_chains, n_steps)``: flow step accepted; rejections in a row so far.
    """

    path: Path
    run: RunDirectory
    system: MolecularSystem
    symmetry: Symmetry
    isomers: Isomers
    metrics: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    versions: dict[str, str]
    reference: Ensemble | None
    chain: Ensemble
    flow: Ensemble
    flow_u: FloatArray
    log_weight: FloatArray
    prior_log_weight: FloatArray
    accepted: NDArray[np.bool_]
    local_acceptance: FloatArray
    proposal_log_weight: FloatArray | None
    chain_log_weight: FloatArray
    plan: SamplingPlan | None
    flow_record: dict[str, Any]

    @property
    def kind(self) -> str:
        """Kind of the system: molecule, cluster or harmonic."""
        return self.system.kind

    @property
    def temperature(self) -> float:
        """Kelvin."""
        return self.run.config.temperature_kelvin

    @cached_property
    def one_state(self) -> list[str]:
        """Torsions and rings that no ensemble shows in a second state.

        Not those whose every state a path from chemistry proposes: what it does not show is rare.
        """
        seen = [e.angles[e.weights > 0.0] for e in self.ensembles]
        found = seen_once(self.isomers.torsions, np.concatenate(seen))
        proposed = set(self.metrics.get("proposed", ()))
        return [
            self.isomers.label(members)
            for members in found
            if not proposed.issuperset(t.name for t in members)
        ]

    @cached_property
    def audit(self) -> dict[str, Any] | None:
        """Audit of log q, stored with the flow."""
        report = self.flow_record.get("audit") or self.stages.get("train", {}).get("audit")
        return dict(report) if report else None

    @property
    def history(self) -> list[dict[str, float]]:
        """Rows of the training."""
        return list(self.stages.get("train", {}).get("history") or [])

    @property
    def prior_kept(self) -> dict[str, float] | None:
        """Relative ESS of flow and prior, where the flow lost and the prior is used alone."""
        kept = self.stages.get("train", {}).get("prior_kept")
        return dict(kept) if kept and not self.ways else None

    @property
    def energies_per_sample(self) -> int:
        """Of an independent sample of the flow."""
        return int(self.metrics.get("energies_per_sample", 1))

    @property
    def energies_per_step(self) -> int:
        """Of every chain in a step: its trajectory and its proposals."""
        recipe, flow = self.run.config.recipe, self.energies_per_sample
        # Where log q is that of a path, a state that has moved needs a path of its own.
        own = 1 if flow > 1 and recipe.n_local_steps else 0
        return recipe.n_local_steps + flow * (recipe.n_proposals + own)

    @property
    def dynamics(self) -> dict[str, Any]:
        """Facts of the reference dynamics, also of those beside a path."""
        facts = self.stages.get("reference", {})
        return dict(facts.get("check", facts))

    @property
    def ways(self) -> list[dict[str, Any]]:
        """ESS and cost of prior, levels, field and both, of an annealed run."""
        return list(self.stages.get("train", {}).get("ways") or [])

    @cached_property
    def streaks(self) -> NDArray[np.int64]:
        """Rejections in a row up to each step."""
        result = np.zeros(self.accepted.shape, dtype=np.int64)
        running = np.zeros(len(self.accepted), dtype=np.int64)
        for step in range(self.accepted.shape[1]):
            running = np.where(self.accepted[:, step], 0, running + 1)
            result[:, step] = running
        return result

    @cached_property
    def ensembles(self) -> list[Ensemble]:
        """Reference (if any), chain, reweighted flow (if any weight is positive)."""
        flow = self.flow if self.flow.weights.any() else None
        return [e for e in (self.reference, self.chain, flow) if e is not None]


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that a stage wrote, or say which stage to run again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} can't be read ({error}); run the stage that writes it again"
        ) from error
    return dict(content)


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Read arrays that a stage wrote, or say which stage to run again."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path} can't be read ({error}); run the sample stage again"
        ) from error


def _thinned(n: int) -> slice:
    return slice(None, None, max(1, -(-n // _MAX_FRAMES)))


def load_run(path: Path) -> RunData:
    """Read a run directory whose sample stage is complete.

    Raises
    ------
    CheckpointError
        A file is missing or damaged (named).
    """
    path = Path(path)
    run = RunDirectory.open(path)
    system = run.load_system()
    topology = mdtraj.Topology.from_openmm(system.topology)
    start = positions_in_nm(system.positions)[:, : system.n_dims]
    symmetry = find_symmetry(system.system, system.topology, start)
    isomers = Isomers((), (), ())
    if system.kind == "molecule":
        isomers = find_isomers(system.system, system.topology, start)
    torsions = isomers.torsions
    samples, flow = read_npz(path / "samples.npz"), read_npz(path / "flow_samples.npz")
    x, proposals = _chain_positions(path, system.n_dims)
    if len(x) != len(samples["u"]):
        raise CheckpointError(
            f"{path} has {len(x)} chain frames but samples.npz {len(samples['u'])}; "
            "run the sample stage again"
        )
    n_chains = len(np.unique(samples["chain"]))
    chain = Ensemble(
        "Markov chain",
        x,
        samples["u"],
        None,
        samples["chain"].astype(np.int64),
        topology,
        torsions,
    )
    stored = len(flow["positions"])
    weighted = Ensemble(
        "reweighted flow",
        flow["positions"],
        flow["u"][:stored],
        flow["log_weight"][:stored],
        None,
        topology,
        torsions,
    )
    reference, plan = _reference(run, system, topology, torsions)
    return RunData(
        path=path,
        run=run,
        system=system,
        symmetry=symmetry,
        isomers=isomers,
        metrics=read_json(path / "metrics.json"),
        stages={
            file.stem: read_json(file) for file in sorted((path / "stages").glob("*.json"))
        },
        versions=dict(
            yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")).get("versions", {})
        ),
        reference=reference,
        chain=chain,
        flow=weighted,
        flow_u=flow["u"],
        log_weight=flow["log_weight"],
        prior_log_weight=flow["prior_log_weight"],
        accepted=samples["accepted"].reshape(n_chains, -1),
        local_acceptance=samples["local_acceptance"],
        proposal_log_weight=proposals,
        chain_log_weight=samples["log_weight"].reshape(n_chains, -1),
        plan=plan,
        flow_record=read_json(path / "flow.json"),
    )


def _chain_positions(
    path: Path, n_dims: int
) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    """Positions chain after chain, and the log weights of all proposals if chunks are there."""
    if any((path / "samples").glob("chunk-*.npz")):
        chains = load_chains(path / "samples")
        x = chains.positions.swapaxes(0, 1)
        return x.reshape(-1, *x.shape[2:]), chains.proposal_log_weight
    # Somebody kept only the trajectory.
    return read_dcd(path / "samples.dcd")[:, :, :n_dims], None


def _reference(
    run: RunDirectory,
    system: MolecularSystem,
    topology: mdtraj.Topology,
    torsions: tuple[Torsion, ...],
) -> tuple[Ensemble | None, SamplingPlan | None]:
    """Read dynamics that a run made, also beside a path; walkers play the part of chains."""
    made = run.path / "check" if run.config.recipe.method == "annealing" else run.path
    folder = made / "reference"
    if not run.is_complete("reference") or not chunk_paths(folder, 0):
        return None, None
    data = load_reference(made)
    ensemble = reference_ensemble(data, system.n_dims, topology, torsions)
    return ensemble, SamplingPlan.read(folder / "plan.json")


def reference_ensemble(
    data: ReferenceData, n_dims: int, topology: mdtraj.Topology, torsions: tuple[Torsion, ...]
) -> Ensemble:
    """Frames of reference dynamics at the target's temperature, thinned if they are many."""
    rows = _thinned(data.n_frames)
    return Ensemble(
        "reference MD",
        data.positions[rows][..., :n_dims],
        data.reduced_energies[rows],
        None,
        data.walker[rows],
        topology,
        torsions,
    )
