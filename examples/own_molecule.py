"""From a PDB file to a trajectory and a report: a molecule of your own, in Python.

The command line does the same in two commands:

    openmm-eqflow init n-methylacetamide --pdb examples/n-methylacetamide.pdb \
        --forcefield amber14-all.xml implicit/obc2.xml
    openmm-eqflow run n-methylacetamide
"""

import argparse
from pathlib import Path

import yaml
from openmm import unit

from openmm_eqflow import init_system, load_system, run
from openmm_eqflow.runs.stages import build_target

# Seconds instead of minutes: enough to see every stage work, not enough for a good flow. The same
# mapping can be written by hand into system.yaml, for any budget.
QUICK = {
    "reference": {
        "max_temperature_ratio": 1.2,
        "steps_per_swap": 20,
        "swaps_per_frame": 1,
        "equilibration_frames": 10,
    },
    "recipe": {
        "reference_seconds": 30,
        "max_frames": 600,
        "train_seconds": 2,
        "batch_size": 64,
        "field": {"width": 16, "conditioner_width": 16, "torsion_width": 16},
        "prior_rounds": 1,
        "prior_samples": 1000,
        "n_pool": 2000,
        "chunk": 500,
        "n_chunks": 2,
        "n_evaluate": 600,
        "n_samples": 120,
        "n_chains": 6,
        "n_local_steps": 3,
    },
}


class Lines:
    """Prints the name of every stage as it begins."""

    def __init__(self) -> None:
        self.stage = ""

    def __call__(self, fraction: float, text: str) -> None:
        """Take the fraction of the stage that is done, and a text that starts with its name."""
        stage = text.split(":")[0]
        if stage != self.stage:
            print(stage)
        self.stage = stage


def main() -> None:
    """Describe, train, sample, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pdb", type=Path, default=Path(__file__).with_name("n-methylacetamide.pdb")
    )
    parser.add_argument(
        "--forcefield", nargs="+", default=["amber14-all.xml", "implicit/obc2.xml"]
    )
    parser.add_argument("--temperature", type=float, default=300.0, help="kelvin")
    parser.add_argument("--budget", default="standard", help="quick, standard or thorough")
    parser.add_argument("--out", type=Path, default=Path("own-molecule"))
    parser.add_argument("--quick", action="store_true", help="a few seconds per stage")
    arguments = parser.parse_args()

    # 1. A folder that describes the molecule; what cannot be sampled is refused here.
    system = init_system(
        arguments.out / "system",
        pdb=arguments.pdb,
        forcefield=arguments.forcefield,
        temperature=arguments.temperature * unit.kelvin,
    )
    if arguments.quick:
        with (system.directory / "system.yaml").open("a", encoding="utf-8") as file:
            yaml.safe_dump({"settings": QUICK}, file)
        system = load_system(system.directory)

    # 2. What the symmetry analysis found: look at it before you trust a density.
    with build_target(system) as target:
        symmetry = target.symmetry
        print(f"{system.n_particles} atoms, {len(symmetry.stereocentres)} stereocentres")
        print(f"{symmetry.order} relabellings leave the energy unchanged")

    # 3. Reference data, training, sampling, report. Interrupt it and call it again: it goes on.
    made = run(
        system.directory,
        arguments.out / "run",
        budget=arguments.budget,
        seed=0,
        device="cpu",
        progress=Lines(),
    )
    metrics = made.metrics()
    print(f"raw relative ESS {metrics['relative_ess']:.3f} of {metrics['n_samples']} samples")
    print(metrics["verdict"]["sentence"])
    print(f"report: {made.path / 'report.html'}")


if __name__ == "__main__":
    main()
