"""What a run leaves for other programs: trajectory, topology, weights, chain statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch
from numpy.typing import NDArray
from openmm import app

from openmm_eqflow import thermo
from openmm_eqflow.atomic import atomic_path, write_npz
from openmm_eqflow.diagnostics import autocorrelation_ess, longest_stuck
from openmm_eqflow.geometry import align_rotations, rotate
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
    if system.kind == "molecule":
        frames = _superposed(frames)
    trajectory = mdtraj.Trajectory(frames, mdtraj.Topology.from_openmm(system.topology))
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


def _superposed(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn every centred frame onto the first.

    Not by mdtraj: its quaternion iteration does not converge for some small molecules, and says so
    on stderr once per frame.
    """
    x = torch.from_numpy(frames).double()
    return rotate(x, align_rotations(x, x[:1])).float().numpy()


def chain_metrics(chains: ChainSamples) -> dict[str, Any]:
    """Summarise acceptance, stuck stretches and effective samples of the Markov chains."""
    u = chains.reduced_potential.T
    return {
        "n_samples": chains.n_samples,
        "n_chains": int(u.shape[0]),
        "n_steps": int(u.shape[1]),
        "acceptance": float(chains.accepted.mean()),
        "local_acceptance": float(chains.local_acceptance.mean())
        if np.isfinite(chains.local_acceptance).all()
        else None,
        "longest_stuck": longest_stuck(chains.accepted.T),
        "energy_ess": autocorrelation_ess(u),
        "mean_reduced_potential": float(u.mean()),
        "max_log_weight_gap": float(
            chains.log_weight.max()
            - chains.proposal_log_weight[np.isfinite(chains.proposal_log_weight)].max()
        ),
    }
