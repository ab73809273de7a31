"""OpenMM's own replica exchange with a flow at the coldest state.

After its dynamics the replica at the coldest temperature is offered samples of the flow that ships
with alanine dipeptide; exchanges carry them to the other temperatures.
"""

import argparse

import mdtraj
import numpy as np
import openmm
from openmm import app, unit

from openmm_eqflow import FlowReplicaExchangeSampler, load_system


def main() -> None:
    """Run the sampler and say what the flow did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--steps", type=int, default=250, help="MD steps per iteration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5 iterations of 20 steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.iterations, arguments.steps = 5, 20

    system = load_system("alanine-dipeptide")
    integrator = openmm.LangevinMiddleIntegrator(
        system.temperature, 1.0 / unit.picosecond, 1.0 * unit.femtosecond
    )
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(system.topology, system.system, integrator, platform)
    simulation.context.setPositions(system.positions)
    simulation.context.setVelocitiesToTemperature(system.temperature)

    temperatures = (300.0, 360.0, 430.0, 520.0)
    sampler = FlowReplicaExchangeSampler(
        [{"temperature": t * unit.kelvin} for t in temperatures],
        simulation,
        arguments.steps,
        flow=system.directory / "flow",
        flow_states=(0,),
        n_proposals=8,
        seed=arguments.seed,
    )

    # OpenMM calls every reporter after each iteration, before the exchanges.
    phi_of = mdtraj.Topology.from_openmm(system.topology)
    phi = np.empty((arguments.iterations, len(temperatures)))
    iteration = iter(range(arguments.iterations))

    def report(current: app.ReplicaExchangeSampler) -> None:
        frames = np.empty((len(temperatures), system.n_particles, 3))
        for replica, state in enumerate(current.replicaStateIndex):
            positions = current.replicaConformation[replica].getPositions(asNumpy=True)
            frames[state] = positions.value_in_unit(unit.nanometer)
        phi[next(iteration)] = mdtraj.compute_phi(mdtraj.Trajectory(frames, phi_of))[1][:, 0]

    sampler.reporters.append(report)
    sampler.simulate(arguments.iterations)

    counts = sampler.flow_statistics[0]
    print(f"flow moves accepted: {counts['n_accepted']} of {counts['n_proposed']}")
    for state, kelvin in enumerate(temperatures):
        print(f"{kelvin:.0f} K: phi > 0 in {np.mean(phi[:, state] > 0.0):.1%} of the frames")
    log_z = sampler.log_z(0)
    print(f"log Z at {temperatures[0]:.0f} K: {log_z.value:.2f} +- {log_z.error:.2f}")


if __name__ == "__main__":
    main()
