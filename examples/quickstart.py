"""Langevin dynamics with global moves from a flow, in openmmtools (README, Python section)."""

import os

from openmm import unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState

from openmm_eqflow import FlowMove, load_flow, load_system

n_iterations = int(os.environ.get("EQFLOW_ITERATIONS", "50"))
system = load_system("alanine-dipeptide")
flow = load_flow(system.directory / "flow")
state = ThermodynamicState(system.system, system.temperature)
langevin = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=100)
move = SequenceMove([FlowMove(flow, n_proposals=4), langevin])
sampler = MCMCSampler(state, SamplerState(system.positions), move)
sampler.run(n_iterations)
statistics = move.move_list[0].statistics
print(f"acceptance {statistics['n_accepted'] / statistics['n_proposed']:.2f}")
