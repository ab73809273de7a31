"""Langevin dynamics with global moves from a flow, in openmmtools (README, Python section)."""

import argparse

from openmm import unit
from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState

from openmm_eqflow import FlowMove, load_flow, load_system

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--iterations", type=int, default=50)
arguments = parser.parse_args()

system = load_system("alanine-dipeptide")
flow = load_flow("alanine-dipeptide")
state = ThermodynamicState(system.system, system.temperature)
langevin = LangevinDynamicsMove(timestep=1.0 * unit.femtosecond, n_steps=100)
move = SequenceMove([FlowMove(flow, n_proposals=4), langevin])
sampler = MCMCSampler(state, SamplerState(system.positions), move)
sampler.run(arguments.iterations)
statistics = move.move_list[0].statistics
print(f"acceptance {statistics['n_accepted'] / statistics['n_proposed']:.2f}")
