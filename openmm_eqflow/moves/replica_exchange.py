r"""A flow as an endless reservoir in replica exchange.

Replica exchange with a reservoir (Okur et al. 2007; Roitberg et al. 2007) feeds one end of the
ladder with stored, decorrelated structures. Here the reservoir is a flow, so it never runs out,
and its error is corrected exactly: the replica at a chosen state is offered fresh flow samples by
an independence move, and exchanges carry them to all other states.

* openmmtools: :func:`reservoir_moves` makes the list of moves, one per state.
* ``openmm.app.ReplicaExchangeSampler``: :class:`FlowReplicaExchangeSampler` overrides
  ``simulateReplica``, the method OpenMM documents for Monte Carlo moves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app, unit
from openmmtools.mcmc import MCMCMove, SequenceMove

from openmm_eqflow.analysis.weights import Estimate, log_z
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.flows.audit import require_passed_audit
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.moves.steps import ProposalBuffer, StateMemory, flow_step
from openmm_eqflow.priors.base import check_space
from openmm_eqflow.seeds import child_seed
from openmm_eqflow.targets.energies.base import FloatArray, check_batch, mask_invalid
from openmm_eqflow.targets.support import check_system
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import positions_in_nm, temperature_quantity

__all__ = [
    "FlowReplicaExchangeSampler",
    "reservoir_moves",
]


def reservoir_moves(
    local_move: MCMCMove,
    flow_move: MCMCMove,
    n_states: int,
    flow_states: Iterable[int] = (0,),
) -> list[MCMCMove]:
    """Make the moves of an openmmtools multistate sampler with the flow at some states.

    Parameters
    ----------
    local_move
        Dynamics used at every state; copied for each.
    flow_move
        A :class:`~openmm_eqflow.moves.flow_moves.FlowMove`, applied after the dynamics. Its
        copies share one stream, so no proposal is used twice.
    n_states
        Number of thermodynamic states, coldest first.
    flow_states
        Where the flow enters; a flow trained at T serves the states near T best.

    Examples
    --------
    >>> moves = reservoir_moves(LangevinDynamicsMove(), FlowMove(flow), 5)  # doctest: +SKIP
    >>> sampler = ReplicaExchangeSampler(mcmc_moves=moves)                  # doctest: +SKIP
    """
    chosen = set(flow_states)
    if not chosen <= set(range(n_states)):
        raise ValueError(
            f"flow_states are {sorted(chosen)}; expected numbers from 0 to {n_states - 1}"
        )
    return [
        SequenceMove([copy.deepcopy(local_move), copy.deepcopy(flow_move)])
        if state in chosen
        else copy.deepcopy(local_move)
        for state in range(n_states)
    ]


class _StateEvaluator:
    """Energies of one state of a multistate sampler, in the simulation's own Context.

    States may differ in force groups and Context parameters, which only the sampler knows how to
    apply. Leaves the Context in that state, at the last positions.
    """

    def __init__(self, sampler: Any, index: int, n_particles: int) -> None:
        self._sampler = sampler
        self._index = index
        self.n_particles = n_particles
        self.n_invalid = 0

    def energies(self, x: FloatArray) -> FloatArray:
        x = check_batch(x, self.n_particles)
        energies = np.full(len(x), np.nan)
        for i, row in enumerate(x):
            try:
                self._sampler.context.setPositions(row)
                energy = self._sampler.computeEnergy(self._index)
            except openmm.OpenMMException:
                continue  # stays NaN: counted and made +inf below
            energies[i] = energy.value_in_unit(unit.kilojoule_per_mole)
        energies, _, n_invalid = mask_invalid(x, energies)
        self.n_invalid += n_invalid
        return energies

    def energies_and_forces(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        raise ConfigurationError("a state of a replica exchange sampler evaluates energies only")

    def close(self) -> None:
        return None


class FlowReplicaExchangeSampler(app.ReplicaExchangeSampler):
    """``openmm.app.ReplicaExchangeSampler`` with a flow at some states.

    After its dynamics, a replica in one of ``flow_states`` is offered flow samples
    (:func:`~openmm_eqflow.moves.steps.flow_step`); centroid, velocities and chirality are kept.
    Everything else, reporters and checkpoints included, is OpenMM's.

    Parameters
    ----------
    states, simulation, stepsPerIteration, reinitializeVelocities
        As for ``openmm.app.ReplicaExchangeSampler``. Positions may also come later, before the
        first step, from the checkpoints of a reporter that resumes a run.
    flow
        A saved and audited flow, or its path.
    flow_states
        Indices of the states where the flow enters.
    n_proposals, n_predraw, seed
        As for :class:`~openmm_eqflow.moves.flow_moves.FlowMove`.

    Raises
    ------
    AuditError, UnsupportedSystemError, ConfigurationError
        The flow or the System cannot be used; the message says why.
    """

    def __init__(
        self,
        states: list[dict[str, Any]],
        simulation: app.Simulation,
        stepsPerIteration: int,
        flow: FlowPath | str | Path,
        flow_states: Sequence[int] = (0,),
        n_proposals: int = 8,
        n_predraw: int = 512,
        seed: int | None = None,
        reinitializeVelocities: bool = False,
    ) -> None:
        super().__init__(states, simulation, stepsPerIteration, reinitializeVelocities)
        self.flow = flow if isinstance(flow, FlowPath) else load_flow(flow)
        require_passed_audit(self.flow)
        n_particles = simulation.system.getNumParticles()
        if n_particles != self.flow.n_particles:
            raise ConfigurationError(
                f"the simulation has {n_particles} particles, the flow {self.flow.n_particles}; "
                "load the flow of this system"
            )
        bad = [i for i in flow_states if not 0 <= i < len(states)]
        if bad:
            raise ValueError(f"flow_states {bad} do not exist; there are {len(states)} states")
        self._generator = torch.Generator()
        self._seed = int(self._generator.seed()) if seed is None else seed
        self._seeded = False
        self._flow_states = tuple(flow_states)
        self._draws = (n_proposals, n_predraw)
        self._targets: dict[int, BoltzmannTarget] = {}
        self._buffers: dict[int, ProposalBuffer] = {}
        self._memories = {i: StateMemory() for i in self._flow_states}
        self.flow_statistics: dict[int, dict[str, int]] = {
            i: {"n_proposed": 0, "n_accepted": 0, "n_invalid": 0} for i in self._flow_states
        }
        self._log_weights: dict[int, list[float]] = {i: [] for i in self._flow_states}
        check_system(simulation.system)
        if self._positions().any():  # else a reporter may still bring them
            self._prepare()

    def _positions(self) -> FloatArray:
        return positions_in_nm(self.replicaConformation[0].getPositions(asNumpy=True))

    def _prepare(self) -> None:
        """Make the targets: their chirality, and what is checked of the System, need positions."""
        positions = self._positions()
        if not positions.any():
            raise ConfigurationError(
                "the simulation has no positions: call simulation.context.setPositions before the "
                "sampler is made, or resume from checkpoints (ReplicaExchangeReporter with "
                "resume=True) before it runs"
            )
        n_proposals, n_predraw = self._draws
        for i in self._flow_states:
            target = self._targets[i] = BoltzmannTarget(
                self.simulation.system,
                self.simulation.topology,
                self._temperature(i),
                positions,
                n_dims=self.flow.n_dims,
                evaluator=_StateEvaluator(self._sampler, i, self.flow.n_particles),
            )
            check_space(self.flow.prior, target)
            self._buffers[i] = ProposalBuffer(
                self.flow,
                target,
                n_proposals=n_proposals,
                n_predraw=n_predraw,
                generator=self._generator,
            )

    def _temperature(self, index: int) -> unit.Quantity:
        state = self.states[index]
        if "temperature" not in state:
            return self.simulation.integrator.getTemperature()
        value = state["temperature"]
        return value if unit.is_quantity(value) else temperature_quantity(value)

    def simulateReplica(self, index: int, steps: int | None = None) -> None:
        """Run the replica's dynamics, then offer it flow samples if its state has the flow."""
        if not self._targets:
            self._prepare()
        if not self._seeded:
            # Not before: a reporter that resumes a run restores the iteration after construction,
            # and the second part of a run must not repeat the draws of the first.
            self._generator.manual_seed(
                child_seed(self._seed, "replica exchange", self.currentIteration)
            )
            self._seeded = True
        super().simulateReplica(index, steps)
        state_index = self.replicaStateIndex[index]
        if state_index not in self._targets:
            return
        context, d = self.simulation.context, self.flow.n_dims
        positions = positions_in_nm(self.replicaConformation[index].getPositions(asNumpy=True))
        new, info = flow_step(
            self.flow,
            self._targets[state_index],
            torch.from_numpy(positions[None, :, :d].copy()),
            self._buffers[state_index],
            self._generator,
            memory=self._memories[state_index],
        )
        counts = self.flow_statistics[state_index]
        counts["n_proposed"] += 1
        counts["n_accepted"] += int(info.accepted[0])
        counts["n_invalid"] += int(info.n_invalid[0])
        log_w = info.log_weight_proposals[0]
        self._log_weights[state_index] += torch.nan_to_num(
            log_w, nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf
        ).tolist()
        # Energies of proposals were computed in this Context, so positions are set in any case.
        positions[:, :d] = new[0].numpy()
        self._sampler.applyState(state_index)
        context.setPositions(positions)
        target = self._targets[state_index]
        if bool(info.accepted[0]) and target.constraints is not None:
            velocities = target.constraints.velocities(positions, target.kT, self._generator)
            context.setVelocities(velocities)
        if bool(info.accepted[0]):
            self.replicaConformation[index] = context.getState(
                positions=True, velocities=True, parameters=True, integratorParameters=True
            )

    def log_z(self, state_index: int) -> Estimate:
        """Log Z of a flow state from the samples offered to it (see ``FlowMove.log_z``).

        Counts from the construction of this object: after a resume, from the resume.
        """
        return log_z(self._log_weights[state_index])
