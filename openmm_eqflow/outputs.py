"""What a run leaves for other programs: trajectory, topology, weights, chain statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
from openmm import app

from openmm_eqflow import thermo
from openmm_eqflow.atomic import atomic_path, write_npz
from openmm_eqflow.diagnostics import autocorrelation_ess, longest_stuck
from openmm_eqflow.library import MolecularSystem
from openmm_eqflow.sampling import ChainSamples

__all__ = ["chain_metrics", "write_trajectory"]


def write_trajectory(path: Path, system: MolecularSystem, chains: ChainSamples) -> None:
    """Write samples.dcd + topology.pdb (chain after chain, superposed) and samples.npz."""
    x = chains.positions.swapaxes(0, 1)
    n_chains, n_steps = x.shape[:2]
    frames = x.reshape(-1, *x.shape[2:])
    if frames.shape[2] == 2:
        frames = np.concatenate([frames, np.zeros_like(frames[..., :1])], axis=2)
    topology = mdtraj.Topology.from_openmm(system.topology)
    trajectory = mdtraj.Trajectory(frames, topology)
    if system.kind == "molecule":
        trajectory.superpose(trajectory, 0)
    with atomic_path(path / "samples.dcd") as temporary:
        trajectory.save_dcd(str(temporary))
    with atomic_path(path / "topology.pdb") as temporary, temporary.open("w") as handle:
        app.PDBFile.writeFile(
            system.topology, thermo.positions_quantity(frames[0]), handle, keepIds=True
        )

    def flat(values: np.ndarray) -> np.ndarray:
        return values.swapaxes(0, 1).reshape(-1)

    write_npz(
        path / "samples.npz",
        {
            "u": flat(chains.reduced_potential),
            "log_q": flat(chains.log_q),
            "log_weight": flat(chains.log_weight),
            "accepted": flat(chains.accepted),
            "chain": np.repeat(np.arange(n_chains), n_steps),
            "local_acceptance": chains.local_acceptance,
        },
    )


def chain_metrics(chains: ChainSamples) -> dict[str, Any]:
    """Summarise acceptance, stuck stretches and effective samples of the Markov chains."""
    u = chains.reduced_potential.T
    return {
        "n_samples": chains.n_samples,
        "n_chains": int(u.shape[0]),
        "n_steps": int(u.shape[1]),
        "acceptance": float(chains.accepted.mean()),
        "local_acceptance": float(chains.local_acceptance.mean()),
        "longest_stuck": longest_stuck(chains.accepted.T),
        "energy_ess": autocorrelation_ess(u),
        "mean_reduced_potential": float(u.mean()),
        "max_log_weight_gap": float(
            chains.log_weight.max()
            - chains.proposal_log_weight[np.isfinite(chains.proposal_log_weight)].max()
        ),
    }
