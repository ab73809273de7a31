"""MCMC of many chains: Hamiltonian and flow moves, stored in resumable chunks."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openmm_eqflow.errors import CheckpointError, EnergyError
from openmm_eqflow.files import write_npz
from openmm_eqflow.flows.audit import require_passed_audit
from openmm_eqflow.flows.kernels import (
    Bridge,
    HamiltonianInfo,
    chart_step,
    hamiltonian_step,
    tune_step_size,
)
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.moves.steps import (
    ProposalBuffer,
    Proposals,
    StateMemory,
    StoredProposals,
    flow_step,
)
from openmm_eqflow.parallel import one_torch_thread
from openmm_eqflow.priors.base import check_space
from openmm_eqflow.seeds import child
from openmm_eqflow.targets.target import BoltzmannTarget

__all__ = [
    "ChainSamples",
    "load_chains",
    "local_move",
    "run_chains",
]

_BURN_IN = 10


@dataclass(frozen=True, eq=False)
class ChainSamples:
    """Samples of all chains, step by step.

    Attributes
    ----------
    positions
        (n_steps, n_chains, N, D) float32, nm, centroid removed.
    reduced_potential, log_q, log_weight
        (n_steps, n_chains).
    accepted
        (n_steps, n_chains): the flow step replaced the state.
    local_acceptance
        (n_steps,): mean acceptance of the Hamiltonian trajectories, nan without any.
    proposal_log_weight
        (n_steps, n_chains, n_proposals): every flow proposal, none dropped.
    """

    positions: NDArray[np.float32]
    reduced_potential: NDArray[np.float64]
    log_q: NDArray[np.float64]
    log_weight: NDArray[np.float64]
    accepted: NDArray[np.bool_]
    local_acceptance: NDArray[np.float64]
    proposal_log_weight: NDArray[np.float64]

    @property
    def n_samples(self) -> int:
        """Steps times chains."""
        return int(self.accepted.size)


_ARRAYS = (
    "positions",
    "reduced_potential",
    "log_q",
    "log_weight",
    "accepted",
    "local_acceptance",
    "proposal_log_weight",
)


def _chunk_paths(folder: Path) -> list[Path]:
    """Finished chunks in order; stops at the first gap, so later files cannot be misread."""
    paths: list[Path] = []
    while (path := folder / f"chunk-{len(paths):05d}.npz").is_file():
        paths.append(path)
    return paths


def _read(path: Path) -> dict[str, NDArray[np.float64]]:
    try:
        # Opened here: numpy leaves the file open when it is not a whole archive.
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete it to continue from the one before"
        ) from error


def load_chains(folder: Path) -> ChainSamples:
    """All finished chunks of a folder."""
    chunks = [_read(path) for path in _chunk_paths(folder)]
    if not chunks:
        raise CheckpointError(f"{folder} has no finished chunk; run the sample stage first")
    return ChainSamples(*(np.concatenate([c[key] for c in chunks]) for key in _ARRAYS))


def run_chains(
    flow: FlowPath,
    target: BoltzmannTarget,
    start: Tensor,
    folder: Path,
    *,
    n_steps: int,
    n_proposals: int,
    n_local_steps: int,
    seed: int,
    chunk_steps: int = 10,
    stored: Proposals | None = None,
    start_log_q: Tensor | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> ChainSamples:
    """Run (or continue) chains of local and flow moves; exact for exp(-u) whatever the flow.

    Parameters
    ----------
    flow
        Audited flow.
    target
        Where the chains go.
    start
        One configuration per chain, (n_chains, N, D) nm.
    folder
        Receives the chunks.
    n_steps
        Steps per chain; each is one Hamiltonian trajectory followed by one flow step.
    n_proposals
        Flow samples offered to each chain and step.
    n_local_steps
        Leapfrog steps of a trajectory; 0 for flow steps alone.
    seed
        With it the chains are reproducible; a resumed run continues the stored random stream.
    chunk_steps
        Steps between chunks on disk.
    stored
        Independent flow samples drawn earlier, used (once each) before fresh ones are drawn.
    start_log_q
        Log q of ``start`` (n_chains,) where it is known: that of the path by which a sample was
        drawn is kept, as chains over pairs of a configuration and a path may.

    Raises
    ------
    AuditError
        The flow's log q is not accurate enough.
    """
    with one_torch_thread():
        return _run_chains(
            flow,
            target,
            start,
            folder,
            n_steps,
            n_proposals,
            n_local_steps,
            seed,
            chunk_steps,
            stored,
            start_log_q,
            progress,
        )


def _run_chains(
    flow: FlowPath,
    target: BoltzmannTarget,
    start: Tensor,
    folder: Path,
    n_steps: int,
    n_proposals: int,
    n_local_steps: int,
    seed: int,
    chunk_steps: int,
    stored: Proposals | None,
    start_log_q: Tensor | None,
    progress: Callable[[float, str], None] | None,
) -> ChainSamples:
    require_passed_audit(flow)
    generator = child(seed, "chains")
    check_space(flow.prior, target)
    local_step = local_move(flow, target, start, n_local_steps, generator)
    memory = StateMemory(capacity=4 * len(start))
    done, x, size = _resume(folder, generator, (len(start), n_proposals), memory)
    if x is None:
        x = start.double() - start.double().mean(1, keepdim=True)
        size = 0.0
        if start_log_q is not None and not n_local_steps:  # else the states move at once
            energy = target.reduced_potential(x) * target.kT
            _remember(memory, x, start_log_q.numpy(), energy.numpy())
        if n_local_steps:
            size, x = tune_step_size(local_step, x)
    buffer = ProposalBuffer(
        flow,
        target,
        n_proposals=n_proposals,
        n_predraw=max(flow.chunk_size, len(x) * n_proposals),
        generator=generator,
    )
    per_step = len(x) * n_proposals
    earlier = None if stored is None else StoredProposals(stored, n_proposals=n_proposals)
    rows: dict[str, list[Any]] = {key: [] for key in _ARRAYS}
    index = len(_chunk_paths(folder))
    # Steps before the first chunk are burn-in; chains restarted from a chunk have had theirs.
    first = -_BURN_IN if done == 0 else done
    if earlier is not None:
        earlier.skip((first + _BURN_IN) * per_step)
    for step in range(first, n_steps):
        local_acceptance = math.nan
        if n_local_steps:
            x, local = local_step(x, step_size=size)
            local_acceptance = float(local.acceptance.mean())
        # Both moves keep the centroid, and a state that stays keeps every bit: the memory of its
        # log q depends on it.
        enough = earlier is not None and earlier.n_left >= per_step
        source = earlier if earlier is not None and enough else buffer
        x, info = flow_step(flow, target, x, source, generator, memory=memory)
        if step >= 0:
            u = target.reduced_potential(x)
            if not bool(torch.isfinite(u).all()):
                raise EnergyError(
                    "a chain has an infinite energy: its starting structure overlaps; minimise it"
                )
            row = (
                (x - x.mean(1, keepdim=True)).float().numpy(),
                u.numpy(),
                (-u - info.log_weight).numpy(),
                info.log_weight.numpy(),
                info.accepted.numpy(),
                np.float64(local_acceptance),
                info.log_weight_proposals.numpy(),
            )
            for key, value in zip(_ARRAYS, row, strict=True):
                rows[key].append(value)
        last = step == n_steps - 1
        if rows["accepted"] and (last or (step + 1) % chunk_steps == 0):
            arrays: dict[str, Any] = {key: np.stack(values) for key, values in rows.items()}
            state: dict[str, Any] = {"state_x": x.numpy(), "state_size": np.float64(size)}
            state["state_generator"] = generator.get_state().numpy()
            known = np.array([memory.get(one) for one in x])
            state["state_log_q"], state["state_energy"] = known.T
            write_npz(folder / f"chunk-{index:05d}.npz", arrays | state)
            index += 1
            rows = {key: [] for key in _ARRAYS}
            # A restart forgets unused draws: drop them here too, so that a resumed chain is the
            # uninterrupted one bit for bit.
            buffer.discard()
        if progress is not None:
            rate = float(info.accepted.double().mean())
            progress((step + 1) / n_steps if step >= 0 else 0.0, f"acceptance {rate:.0%}")
    return load_chains(folder)


def local_move(
    flow: FlowPath,
    target: BoltzmannTarget,
    start: Tensor,
    n_steps: int,
    generator: torch.Generator,
) -> Callable[..., tuple[Tensor, HamiltonianInfo]]:
    """Step of (x, step_size): in positions, or, with constraints to keep, in the flow's chart."""
    if getattr(target, "constraints", None) is None:
        return partial(hamiltonian_step, target, n_steps=n_steps, generator=generator)
    bridge = Bridge(flow.prior, target)
    y, _ = flow.prior.from_cartesian(start.double())
    state = bridge.at(y)
    scales = bridge.median_scales(state.score_prior, state.score_target)
    return partial(chart_step, bridge, scales=scales, n_steps=n_steps, generator=generator)


def _remember(
    memory: StateMemory, x: Tensor, log_q: NDArray[np.float64], energy: NDArray[np.float64]
) -> None:
    for one, *known in zip(x, log_q, energy, strict=True):
        memory.put(one, *map(float, known))


def _resume(
    folder: Path, generator: torch.Generator, shape: tuple[int, int], memory: StateMemory
) -> tuple[int, Tensor | None, float]:
    """Read steps done, positions, step size; the generator is put where the last chunk left it.

    ``memory`` receives what is known of the states; chunks of version 0.1 do not say it.
    """
    paths = _chunk_paths(folder)
    if not paths:
        return 0, None, 0.0
    done = sum(len(_read(path)["accepted"]) for path in paths)
    last = _read(paths[-1])
    try:
        found = last["proposal_log_weight"].shape[1:]
        if found != shape:
            raise CheckpointError(
                f"{folder} holds {found[0]} chains with {found[1]} proposals, expected {shape[0]} "
                f"with {shape[1]}; delete it to start anew"
            )
        generator.set_state(torch.from_numpy(last["state_generator"]))
        x = torch.from_numpy(last["state_x"])
        if "state_log_q" in last:
            _remember(memory, x, last["state_log_q"], last["state_energy"])
        return done, x, float(last["state_size"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{paths[-1]} is damaged ({error}); delete it to continue from the one before"
        ) from error
