"""A folder with system.yaml for a molecule of one's own (``openmm-eqflow init``)."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import yaml
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.constraints import constraint_lengths
from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.forcefield import (
    build_from_forcefield,
    load_pdb,
    load_system_xml,
    write_pdb,
)
from openmm_eqflow.targets.library import (
    SYSTEM_FILE,
    MolecularSystem,
    check_temperature,
    load_system,
)
from openmm_eqflow.targets.support import (
    check_molecule,
    check_solvent,
    check_system,
    complete_bonds,
)
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import (
    energy_in_kj_mol,
    kelvin,
    masses_in_dalton,
    positions_in_nm,
    temperature_quantity,
)

__all__ = [
    "init_system",
]

logger = logging.getLogger(__name__)
_ROOM_TEMPERATURE = temperature_quantity(300.0)
_HEADER = """\
# A system of openmm-eqflow: edit freely, every key is checked when it is loaded.
"""


def init_system(
    directory: str | Path,
    *,
    pdb: str | Path,
    forcefield: Sequence[str] | None = None,
    system_xml: str | Path | None = None,
    temperature: unit.Quantity = _ROOM_TEMPERATURE,
    add_hydrogens: bool = False,
) -> MolecularSystem:
    """Write ``directory/system.yaml`` with copies of the files it names, and load it.

    Parameters
    ----------
    directory
        New folder; its last component becomes the name. It appears only when everything fits.
    pdb
        Structure of one molecule without solvent, in the order of the System.
    forcefield
        OpenMM force-field files (shipped with OpenMM, or paths, which are copied), or
    system_xml
        a System written by ``openmm.XmlSerializer``; exactly one of the two.
    add_hydrogens
        Complete the PDB with ``openmm.app.Modeller.addHydrogens`` (force fields only).

    Raises
    ------
    ConfigurationError
        The folder exists, a file cannot be read, a residue has no template, or PDB and System do
        not describe the same atoms.
    UnsupportedSystemError
        The structure is not one molecule, or the System has no energy, constraints, a box, a
        barostat, virtual sites, Drude particles or an external force; the message names it.

    Examples
    --------
    >>> import tempfile
    >>> from openmm_eqflow.targets.library import systems_directory
    >>> pdb = systems_directory() / "alanine-dipeptide" / "alanine-dipeptide.pdb"
    >>> folder = Path(tempfile.mkdtemp()) / "my-molecule"
    >>> init_system(folder, pdb=pdb, forcefield=["amber14-all.xml"]).n_particles
    22
    """
    directory, pdb = Path(directory), Path(pdb)
    if (forcefield is None) == (system_xml is None):
        raise ConfigurationError(
            "give either force-field files (--forcefield) or a System (--system), not both or none"
        )
    if add_hydrogens and forcefield is None:
        raise ConfigurationError("--add-hydrogens needs --forcefield: a System fixes its atoms")
    if directory.exists():
        raise ConfigurationError(f"{directory} exists; choose another folder or remove it first")
    try:
        degrees = kelvin(temperature)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    check_temperature(degrees, "temperature")
    inputs = [pdb, *([] if system_xml is None else [Path(system_xml)])]
    for path in inputs:
        if not path.is_file():
            raise ConfigurationError(f"{path} is not a file")

    topology, positions = load_pdb(pdb)
    check_solvent(topology, str(pdb))
    if forcefield is not None:
        if add_hydrogens:
            topology, positions = _with_hydrogens(topology, positions, list(forcefield))
        system = build_from_forcefield(topology, list(forcefield))
    else:
        system = load_system_xml(inputs[1])
    complete_bonds(topology, system)
    check_molecule(topology, str(pdb))
    check_system(system)
    _check_same_atoms(topology, system, pdb)
    _check_lengths(topology, system, positions_in_nm(positions), pdb)
    _check_energy(system, positions, pdb)
    # What a run would refuse is refused here.
    BoltzmannTarget(system, topology, temperature, positions, n_workers=1).close()
    _tell(pdb)

    content: dict[str, Any] = {
        "name": directory.name,
        "kind": "molecule",
        "description": f"{topology.getNumAtoms()} atoms from {pdb.name}",
        "coordinates": pdb.name,
        "temperature_kelvin": degrees,
    }
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        if add_hydrogens:
            write_pdb(temporary / pdb.name, topology, positions)
        else:
            shutil.copyfile(pdb, temporary / pdb.name)
        if forcefield is not None:
            content["forcefield"] = [_copy_local(name, temporary) for name in forcefield]
        else:
            content["system_xml"] = "system.xml"
            shutil.copyfile(inputs[1], temporary / "system.xml")
        text = _HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (temporary / SYSTEM_FILE).write_text(text, encoding="utf-8")
        load_system(temporary)
        os.rename(temporary, directory)
    except OSError as error:
        raise ConfigurationError(
            f"{directory} cannot be written ({error.strerror}): choose a folder in which you may"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_system(directory)


def _copy_local(name: str, directory: Path) -> str:
    """Copy a force-field file of the user's; OpenMM's own are found by name anywhere."""
    path = Path(name)
    if not path.is_file():
        return name
    if (directory / path.name).exists():
        raise ConfigurationError(f"two input files are called {path.name}; rename one")
    shutil.copyfile(path, directory / path.name)
    return path.name


def _with_hydrogens(
    topology: app.Topology, positions: unit.Quantity, files: list[str]
) -> tuple[app.Topology, unit.Quantity]:
    modeller = app.Modeller(topology, positions)
    try:
        modeller.addHydrogens(
            app.ForceField(*files), platform=openmm.Platform.getPlatformByName("Reference")
        )
    except (ValueError, KeyError, openmm.OpenMMException) as error:
        raise ConfigurationError(
            f"hydrogens cannot be added: {' '.join(str(error).split())} -> OpenMM knows only "
            "standard residues; add them with your own tool and give the complete PDB"
        ) from error
    return modeller.topology, modeller.positions


def _check_same_atoms(topology: app.Topology, system: openmm.System, pdb: Path) -> None:
    """Compare number, masses and bonds; an order that differs shows up in one of them."""
    n_atoms, n_particles = topology.getNumAtoms(), system.getNumParticles()
    if n_atoms != n_particles:
        raise ConfigurationError(
            f"{pdb} has {n_atoms} atoms but the System has {n_particles} particles; give the PDB "
            "from which the System was made (same atoms, same order)"
        )
    atoms = list(topology.atoms())
    masses = masses_in_dalton(system)
    known = [atom for atom in atoms if atom.element is not None]
    expected = np.array([atom.element.mass.value_in_unit(unit.dalton) for atom in known])
    found = masses[[atom.index for atom in known]]
    # Hydrogen mass repartitioning moves mass from heavy atoms to hydrogens and keeps the sum; the
    # lightest particle is then heavier than a hydrogen and masses do not tell elements.
    repartitioned = found.min() > 1.2 and abs(expected.sum() - found.sum()) < 0.01 * len(known)
    off = np.abs(expected - found) > 0.5
    if off.any() and not repartitioned:
        atom = known[int(np.flatnonzero(off)[0])]
        raise ConfigurationError(
            f"{pdb}: atom {atom.index + 1} ({atom.name}, {atom.element.symbol}) has mass "
            f"{masses[atom.index]:.3f} u in the System; the two list different atoms or another "
            "order"
        )
    bonds = {frozenset((a.index, b.index)) for a, b in topology.bonds()}
    forces = [f for f in system.getForces() if isinstance(f, openmm.HarmonicBondForce)]
    terms = {
        frozenset(force.getBondParameters(index)[:2])
        for force in forces
        for index in range(force.getNumBonds())
    }
    terms |= {frozenset(pair) for pair in constraint_lengths(system)}
    wrong = sorted(tuple(sorted(pair)) for pair in bonds - terms)
    if terms and wrong:
        first, second = (atoms[index] for index in wrong[0])
        raise ConfigurationError(
            f"{pdb} bonds atoms {first.index + 1} ({first.name}) and {second.index + 1} "
            f"({second.name}), the System does not; both must list the same atoms in one order"
        )


def _check_lengths(
    topology: app.Topology, system: openmm.System, positions: FloatArray, pdb: Path
) -> None:
    """Refuse bonds far from the System's length: an atom without coordinates, or broken ones."""
    atoms = list(topology.atoms())
    lengths = {
        frozenset(pair): length.value_in_unit(unit.nanometer)
        for force in system.getForces()
        if isinstance(force, openmm.HarmonicBondForce)
        for *pair, length, _ in map(force.getBondParameters, range(force.getNumBonds()))
    }
    for first, second in topology.bonds():
        a, b = sorted((first.index, second.index))
        found = float(np.linalg.norm(positions[a] - positions[b]))
        usual = lengths.get(frozenset((a, b)), found)
        if not 0.6 * usual <= found <= 1.4 * usual:
            lost = [f"; atom {k + 1} lies at the origin" for k in (a, b) if not positions[k].any()]
            raise UnsupportedSystemError(
                f"{pdb}: atoms {a + 1} ({atoms[a].name}) and {b + 1} ({atoms[b].name}) are bonded "
                f"and {found:.3f} nm apart, the System says {usual:.3f} nm{''.join(lost)}: "
                "coordinates are missing or wrong, repair or minimise the structure"
            )


def _tell(pdb: Path) -> None:
    """Warn of what a PDB file holds and is not used."""
    lines = pdb.read_text(encoding="utf-8").splitlines()
    places = {line[16] for line in lines if line.startswith(("ATOM", "HETATM"))} - {" "}
    if len(places) > 1:
        logger.warning(
            "%s has alternate locations %s: the first of every atom is taken",
            pdb,
            ", ".join(sorted(places)),
        )
    if (models := sum(line.startswith("MODEL ") for line in lines)) > 1:
        logger.warning("%s has %d models: the first is taken", pdb, models)
    boxes = [line.split()[1:4] for line in lines if line.startswith("CRYST1")]
    if any(edge.replace(".", "").strip("0") not in ("", "1") for box in boxes for edge in box):
        logger.warning("%s has a box (CRYST1): it is not used, the molecule is alone", pdb)


def _check_energy(system: openmm.System, positions: unit.Quantity, pdb: Path) -> None:
    context = openmm.Context(
        system, openmm.VerletIntegrator(1e-3), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions)
    state = context.getState(energy=True, forces=True)
    energy = energy_in_kj_mol(state.getPotentialEnergy())
    if energy == 0.0 and not state.getForces(asNumpy=True)._value.any():
        raise UnsupportedSystemError(
            "the System has no energy: none of its forces has a term, give the System with the "
            "force field in it"
        )
    if not np.isfinite(energy):
        raise UnsupportedSystemError(
            f"the potential energy of {pdb} is {energy} kJ/mol; atoms overlap or coordinates are "
            "missing: repair or minimise the structure first"
        )
