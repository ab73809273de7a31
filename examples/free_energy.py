"""Free energies of alanine dipeptide from the flow that ships with it.

1. absolute log Z from flow samples alone, and by Bennett's ratio with samples of the target;
2. the free energy of implicit solvation, from the same samples in two potentials;
3. the free energy difference between two conformations, from weighted samples.
"""

import argparse
import tempfile
from pathlib import Path

import mdtraj
import numpy as np
import torch

from openmm_eqflow import load_flow, load_system
from openmm_eqflow.analysis.chains import population
from openmm_eqflow.analysis.free_energy import delta_f_reweighting, log_z_bar
from openmm_eqflow.analysis.weights import Estimate, log_z, pareto_k, relative_ess
from openmm_eqflow.moves.chains import run_chains
from openmm_eqflow.runs.evaluation import draw_weighted
from openmm_eqflow.runs.stages import build_target


def main() -> None:
    """Draw samples, then estimate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000, help="independent flow samples")
    parser.add_argument("--chains", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40, help="steps of every chain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few samples, short chains")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.chains, arguments.steps = 500, 10, 5

    system, vacuum = load_system("alanine-dipeptide"), load_system("alanine-dipeptide-vacuum")
    flow = load_flow("alanine-dipeptide")
    with build_target(system) as target, build_target(vacuum) as target_vacuum:
        samples = draw_weighted(flow, target, arguments.samples, seed=arguments.seed)
        u_vacuum = target_vacuum.reduced_potential(samples.x)

        # Samples of the target itself: Markov chains of local and flow moves.
        start = torch.from_numpy(target.positions).expand(arguments.chains, -1, -1)
        with tempfile.TemporaryDirectory() as folder:
            chains = run_chains(
                flow,
                target,
                start,
                Path(folder),
                n_steps=arguments.steps,
                n_proposals=4,
                n_local_steps=20,
                seed=arguments.seed + 1,
            )
    # numpy from here on.
    u, log_q, log_w = (a.numpy() for a in (samples.u, samples.log_q, samples.log_weight))
    u_vacuum = u_vacuum.numpy()
    ess, k = relative_ess(log_w), pareto_k(log_w)
    print(f"{arguments.samples} flow samples: raw relative ESS {ess:.3f}, Pareto k {k:.2f}")

    # 1. log Z over the mean-free subspace, in nm, for one chirality. Bennett's ratio wants
    # decorrelated samples of the target: every fifth step of the chains.
    show("log Z, flow samples alone", log_z(log_w))
    show("log Z, Bennett with chains", log_z_bar(log_w, chains.log_weight[4::5].ravel()))

    # 2. The effective sample size in vacuum tells whether these samples can speak for it.
    show("solvation free energy, kT", delta_f_reweighting(u_vacuum, u, log_q))
    print(f"  relative ESS in vacuum {relative_ess(-u_vacuum - log_q):.3f}")

    # 3. phi > 0 against phi < 0.
    topology = mdtraj.Topology.from_openmm(system.topology)
    phi = mdtraj.compute_phi(mdtraj.Trajectory(samples.x.numpy(), topology))[1][:, 0]
    share = population(phi > 0.0, log_weights=log_w)
    show("population of phi > 0", share.estimate)
    print(f"  {share.ess:.0f} effective samples")
    if share.value > 0.0:
        odds = np.log1p(-share.value) - np.log(share.value)
        print(f"  free energy against phi < 0: {odds:.2f} kT")


def show(what: str, estimate: Estimate) -> None:
    """Print an estimate with its standard error."""
    print(f"{what:<28} {estimate.value:9.3f} +- {estimate.error:.3f}")


if __name__ == "__main__":
    main()
