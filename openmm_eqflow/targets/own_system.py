"""A folder with system.yaml for a molecule of one's own (``openmm-eqflow init``)."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import yaml
from openmm import app, unit

from openmm_eqflow.errors import ConfigurationError, UnsupportedSystemError
from openmm_eqflow.targets.constraints import constraint_lengths, hold_bonds, repartition
from openmm_eqflow.targets.energies.base import FloatArray
from openmm_eqflow.targets.forcefield import (
    build_from_forcefield,
    fullest_locations,
    load_system_xml,
    pdb_lines,
    write_pdb,
)
from openmm_eqflow.targets.inputs import (
    COORDINATES,
    Structure,
    check_scale,
    force_energies,
    read_structure,
    read_topology,
    select,
    subset,
)
from openmm_eqflow.targets.library import (
    SYSTEM_FILE,
    MolecularSystem,
    check_temperature,
    load_system,
)
from openmm_eqflow.targets.ligand import CHARGES, parametrise
from openmm_eqflow.targets.support import (
    check_molecule,
    check_solvent,
    check_system,
    complete_bonds,
    without_solvent,
)
from openmm_eqflow.targets.target import BoltzmannTarget
from openmm_eqflow.units import (
    kelvin,
    masses_in_dalton,
    positions_in_nm,
    temperature_quantity,
)

__all__ = [
    "init_ligand",
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
    pdb: str | Path | None = None,
    forcefield: Sequence[str] | None = None,
    system_xml: str | Path | None = None,
    temperature: unit.Quantity = _ROOM_TEMPERATURE,
    add_hydrogens: bool = False,
    topology: str | Path | None = None,
    parameters: Sequence[str | Path] = (),
    chain: str | None = None,
    residue: str | None = None,
    strip_solvent: bool = False,
    constraints: str = "none",
    hydrogen_mass: float | None = None,
    bond_orders: Sequence[Sequence[int]] = (),
    description: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> MolecularSystem:
    """Write ``directory/system.yaml`` with copies of the files it names, and load it.

    Parameters
    ----------
    directory
        New folder; its last component becomes the name. It appears only when everything fits.
    pdb
        Structure of one molecule: a PDB, mmCIF, GROMACS, Amber or CHARMM file, by its ending.
    forcefield
        OpenMM force-field files (shipped with OpenMM, or paths, which are copied), or
    system_xml
        a System written by ``openmm.XmlSerializer``, or neither where
    topology
        is a ``.prmtop``, ``.top`` or ``.psf`` file, built without cutoff. With
        ``system_xml`` only its atoms and bonds are taken.
    parameters
        CHARMM's parameter files, or the folder of GROMACS's force fields.
    add_hydrogens
        Complete the structure with ``openmm.app.Modeller.addHydrogens`` (force fields only).
    chain, residue
        Take this chain (its letter), these residues (name or number) alone.
    strip_solvent
        Remove water and ions, from the System too.
    constraints
        ``"hbonds"`` or ``"allbonds"`` constrain these bonds; ``"none"`` leaves the System so.
    hydrogen_mass
        Of every hydrogen in dalton, taken from the atom it is bonded to.
    bond_orders
        ``(i, j, order)`` of bonds, atoms counted from 0; PDB files have none.
    description
        For system.yaml.
    tell
        Called with lines about the input: the energy of every force at the given coordinates.

    Raises
    ------
    ConfigurationError
        The folder exists, a file cannot be read, a residue has no template, or the files do not
        describe the same atoms.
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
    directory = Path(directory)
    if pdb is None:
        raise ConfigurationError(
            "there are no coordinates: give them with --pdb, --cif, --inpcrd, --gro or --crd"
        )
    pdb = Path(pdb)
    given = [forcefield is not None, system_xml is not None or topology is not None]
    if sum(given) != 1:
        raise ConfigurationError(
            "give either force-field files (--forcefield), a System (--system) or a topology "
            "(--prmtop, --top, --psf), not both or none"
        )
    if add_hydrogens and forcefield is None:
        raise ConfigurationError("--add-hydrogens needs --forcefield: a System fixes its atoms")
    if parameters and topology is None:
        raise ConfigurationError("--params belongs to --psf or --top: give one of them")
    if directory.exists():
        raise ConfigurationError(f"{directory} exists; choose another folder or remove it first")
    try:
        degrees = kelvin(temperature)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    check_temperature(degrees, "temperature")
    for path in (pdb, topology, system_xml):
        if path is not None and not Path(path).is_file():
            raise ConfigurationError(f"{path} is not a file")

    whole = _read(pdb, system_xml, topology, parameters)
    part = _part(whole, pdb, chain, residue, strip_solvent)
    molecule, positions, system = part.topology, part.positions, part.system
    check_solvent(molecule, str(pdb))
    check_scale(positions_in_nm(positions), str(pdb))
    if forcefield is not None:
        if add_hydrogens:
            molecule, positions = _with_hydrogens(molecule, positions, list(forcefield))
        system = build_from_forcefield(molecule, list(forcefield))
    if system is None:
        raise ConfigurationError("there is no potential: give --forcefield or --system")
    complete_bonds(molecule, system)
    check_molecule(molecule, str(pdb))
    changed = constraints != "none" or hydrogen_mass is not None
    if constraints != "none":
        hold_bonds(system, molecule, constraints)
    if hydrogen_mass is not None:
        repartition(system, molecule, hydrogen_mass)
    check_system(system)
    _check_same_atoms(molecule, system, pdb)
    _check_lengths(molecule, system, positions_in_nm(positions), pdb)
    energies = force_energies(system, positions)
    _check_energy(system, positions, energies, pdb)
    # What a run would refuse is refused here.
    BoltzmannTarget(system, molecule, temperature, positions, n_workers=1).close()
    _tell(pdb)
    if tell is not None:
        for name, energy in [*energies, ("total", sum(e for _, e in energies))]:
            tell(f"{name:<28} {energy:18.6f} kJ/mol")

    is_pdb = COORDINATES.get(pdb.suffix.lower(), "PDB") == "PDB"
    as_given = part is whole and not add_hydrogens and is_pdb and topology is None
    structure = pdb.name if as_given or (forcefield is not None and is_pdb) else "topology.pdb"
    content: dict[str, Any] = {
        "name": directory.name,
        "kind": "molecule",
        "description": description or f"{molecule.getNumAtoms()} atoms from {pdb.name}",
        "coordinates": structure,
        "temperature_kelvin": degrees,
    }
    if bond_orders:
        content["bond_orders"] = [[int(n) for n in row] for row in bond_orders]
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        if as_given:
            shutil.copyfile(pdb, temporary / structure)
        else:
            write_pdb(temporary / structure, molecule, positions)
        if forcefield is not None and not changed:
            content["forcefield"] = [_copy_local(name, temporary) for name in forcefield]
        else:
            content["system_xml"] = "system.xml"
            if system_xml is not None and part is whole and not changed:
                shutil.copyfile(system_xml, temporary / "system.xml")
            else:
                text = openmm.XmlSerializer.serialize(system)
                (temporary / "system.xml").write_text(text, encoding="utf-8")
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


def init_ligand(
    directory: str | Path,
    *,
    smiles: str | None = None,
    sdf: str | Path | None = None,
    charges: str = "bcc",
    temperature: unit.Quantity = _ROOM_TEMPERATURE,
    constraints: str = "none",
    hydrogen_mass: float | None = None,
    tell: Callable[[str], None] | None = None,
) -> MolecularSystem:
    """Write a folder as :func:`init_system` does for a small molecule, with GAFF2 in vacuum.

    Parameters
    ----------
    directory, temperature, constraints, hydrogen_mass, tell
        As there.
    smiles, sdf, charges
        As in :func:`~openmm_eqflow.targets.ligand.parametrise`.

    Raises
    ------
    ConfigurationError, UnsupportedSystemError
        Of both.
    """
    if (smiles is None) == (sdf is None):
        raise ConfigurationError("give either --smiles or --sdf")
    if sdf is not None and not Path(sdf).is_file():
        raise ConfigurationError(f"{sdf} is not a file")
    if Path(directory).exists():
        raise ConfigurationError(f"{directory} exists; choose another folder or remove it first")
    with tempfile.TemporaryDirectory() as made:
        prmtop, inpcrd, orders, lines = parametrise(
            Path(made), smiles=smiles, sdf=None if sdf is None else Path(sdf), charges=charges
        )
        system = init_system(
            directory,
            pdb=inpcrd,
            topology=prmtop,
            temperature=temperature,
            bond_orders=orders,
            constraints=constraints,
            hydrogen_mass=hydrogen_mass,
            description=f"{smiles or Path(str(sdf)).name}: GAFF2, {CHARGES[charges]} charges",
            tell=tell,
        )
    if tell is not None:
        for line in lines:
            tell(line)
    return system


def _read(
    pdb: Path,
    system_xml: str | Path | None,
    topology: str | Path | None,
    parameters: Sequence[str | Path],
) -> Structure:
    """Everything the files hold; a System in XML stands above that of a topology."""
    structure = read_structure(pdb, None if topology is None else Path(topology))
    if topology is not None:
        structure = read_topology(Path(topology), structure, [Path(p) for p in parameters])
    if system_xml is not None:
        structure.system = load_system_xml(Path(system_xml))
    return structure


def _part(
    whole: Structure, pdb: Path, chain: str | None, residue: str | None, strip_solvent: bool
) -> Structure:
    if not (strip_solvent or chain is not None or residue is not None):
        return whole
    n_atoms = whole.topology.getNumAtoms()
    if whole.system is not None and whole.system.getNumParticles() != n_atoms:
        raise ConfigurationError(
            f"{pdb} has {n_atoms} atoms but the System has {whole.system.getNumParticles()} "
            "particles; give the structure from which the System was made"
        )
    keep = set(select(whole.topology, chain, residue))
    if strip_solvent:
        keep &= set(without_solvent(whole.topology, str(pdb)))
        lost = n_atoms - len(keep)
        logger.warning("%s: %d atoms of solvent or other molecules are left out", pdb, lost)
    return subset(whole, sorted(keep))


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
            "order: give the PDB from which the System was made"
        )
    bonds = {frozenset((a.index, b.index)) for a, b in topology.bonds()}
    # AMOEBA's bonds are custom ones, its harmonic ones are Urey-Bradley terms.
    kinds = (openmm.HarmonicBondForce, openmm.CustomBondForce)
    forces = [f for f in system.getForces() if isinstance(f, kinds)]
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
    if COORDINATES.get(pdb.suffix.lower(), "PDB") != "PDB":
        return
    lines = pdb_lines(pdb)
    atoms = [line for line in lines if line.startswith(("ATOM", "HETATM"))]
    places = {line[16:17] for line in atoms} - {" ", ""}
    if places:
        kept = fullest_locations(lines)
        lost = len(lines) - len(kept)
        rest = {line[12:16] + line[17:] for line in kept}
        taken = {
            f"{line[16]} of {line[17:20].strip()} {line[22:27].strip()}"
            for line in atoms
            if line[16:17].strip() and line[12:16] + line[17:] in rest
        }
        logger.warning(
            "%s has alternate locations %s: in every residue the one of highest occupancy is "
            "taken, or the first of equals (%s); %d %s left out",
            pdb,
            ", ".join(sorted(places)),
            ", ".join(sorted(taken)),
            lost,
            "atom is" if lost == 1 else "atoms are",
        )
    if (models := sum(line.startswith("MODEL ") for line in lines)) > 1:
        logger.warning("%s has %d models: the first is taken", pdb, models)
    boxes = [line.split()[1:4] for line in lines if line.startswith("CRYST1")]
    if any(edge.replace(".", "").strip("0") not in ("", "1") for box in boxes for edge in box):
        logger.warning("%s has a box (CRYST1): it is not used, the molecule is alone", pdb)


def _check_energy(
    system: openmm.System,
    positions: unit.Quantity,
    energies: list[tuple[str, float]],
    pdb: Path,
) -> None:
    energy = sum(value for _, value in energies)
    if energy == 0.0:
        context = openmm.Context(
            system, openmm.VerletIntegrator(1e-3), openmm.Platform.getPlatformByName("Reference")
        )
        # At a minimum of springs energy and forces are zero, a little beside it they are not.
        beside = np.random.default_rng(0).normal(0.0, 1e-3, (system.getNumParticles(), 3))
        context.setPositions(positions + beside * unit.nanometer)
        if not context.getState(forces=True).getForces(asNumpy=True)._value.any():
            raise UnsupportedSystemError(
                "the System has no energy: none of its forces has a term, give the System with "
                "the force field in it"
            )
    if not np.isfinite(energy):
        name = next((name for name, value in energies if not np.isfinite(value)), "")
        raise UnsupportedSystemError(
            f"the potential energy of {pdb} is {energy} kJ/mol ({name}); atoms overlap or "
            "coordinates are missing: repair or minimise the structure first"
        )
