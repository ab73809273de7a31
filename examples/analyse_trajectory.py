"""Analyse a finished run with mdtraj: free-energy profiles, populations, files for other tools.

Give it the run directory of any molecule, for example that of

    openmm-eqflow run alanine-dipeptide --out my-run
"""

import argparse
from pathlib import Path

import mdtraj
import numpy as np

from openmm_eqflow.analysis.chains import autocorrelation_ess, population, split_r_hat
from openmm_eqflow.analysis.export import write_colvar
from openmm_eqflow.analysis.observables import torsion_angles
from openmm_eqflow.analysis.profiles import free_energy_profile
from openmm_eqflow.report.data import load_run


def main() -> None:
    """Read a run directory, print and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory with a complete sample stage")
    parser.add_argument("--bins", type=int, default=24)
    parser.add_argument("--kt", type=float, default=2.494, help="kJ/mol, for the COLVAR file")
    arguments = parser.parse_args()

    # The chains, one after the other: equal weights, correlated in time.
    trajectory = mdtraj.load(
        str(arguments.run / "samples.dcd"), top=str(arguments.run / "topology.pdb")
    )
    chain = np.load(arguments.run / "samples.npz")["chain"]
    # Independent flow samples: unequal weights, no correlation. Positions are kept of the first.
    flow = np.load(arguments.run / "flow_samples.npz")
    samples = mdtraj.Trajectory(flow["positions"], trajectory.topology)
    log_weights = flow["log_weight"][: samples.n_frames]

    found = load_run(arguments.run).isomers.torsions
    torsions = [t for t in found if t.kind == "single" and t.fold == 1]
    if not torsions:
        raise SystemExit(f"{arguments.run} has no rotatable bond: analyse other coordinates")
    angles, weighted = (
        torsion_angles(part.xyz, torsions) for part in (trajectory, samples)
    )

    print("share of each torsion above 0, and how well the chains know it")
    columns = {}
    for torsion, of_chains, of_flow in zip(torsions, angles.T, weighted.T, strict=True):
        by_chain = np.cos([of_chains[chain == c] for c in np.unique(chain)])
        one = population(of_chains > 0.0, chain=chain)
        two = population(of_flow > 0.0, log_weights=log_weights)
        print(
            f"  {torsion.name:<12} chains {one.value:.3f} +- {one.error:.3f}, reweighted flow "
            f"{two.value:.3f} +- {two.error:.3f}; {autocorrelation_ess(by_chain):.0f} effective "
            f"of {of_chains.size} samples, split R-hat {split_r_hat(by_chain):.3f}"
        )
        # Names PLUMED can read: atoms counted from 1.
        columns["torsion_" + "_".join(str(atom + 1) for atom in torsion.atoms)] = of_chains

    print(f"\nfree energy along {torsions[0].name}, kT")
    options = {"bins": arguments.bins, "range": (-np.pi, np.pi)}
    first = free_energy_profile(angles[:, 0], chain=chain, **options)
    second = free_energy_profile(weighted[:, 0], log_weights=log_weights, **options)
    print("  degrees   chains              reweighted flow")
    for row in zip(
        np.degrees(first.centres),
        first.free_energy,
        first.error,
        second.free_energy,
        second.error,
        strict=True,
    ):
        print("  {:7.1f}   {:6.2f} +- {:<6.2f}    {:6.2f} +- {:.2f}".format(*row))

    path = write_colvar(
        arguments.run / "COLVAR", columns, kt=arguments.kt, periodic=tuple(columns)
    )
    print(f"\nwrote {path} for PLUMED, pyEMMA or numpy.loadtxt")


if __name__ == "__main__":
    main()
