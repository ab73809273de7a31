"""Small molecules from SMILES or an SD file: RDKit's geometry, GAFF2 by AmberTools.

Needs the extra ``pip install openmm-eqflow[ligand]``. Stereochemistry and bond orders are RDKit's;
stereocentres and double bonds must be said, because a run keeps them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.targets.forcefield import one_line

__all__ = [
    "CHARGES",
    "parametrise",
    "read_molecule",
]

#: antechamber's names and what they mean.
CHARGES = {"bcc": "AM1-BCC", "gas": "Gasteiger"}
_CONFORMERS = 10  # of which the lowest in MMFF's energy is taken: no boats
_INSTALL = 'pip install "openmm-eqflow[ligand]"'


def parametrise(
    folder: Path, *, smiles: str | None = None, sdf: Path | None = None, charges: str = "bcc"
) -> tuple[Path, Path, list[tuple[int, int, int]], list[str]]:
    """Write ``mol.prmtop`` and ``mol.inpcrd`` of a molecule to a folder.

    Parameters
    ----------
    folder
        Where the files of all steps go.
    smiles, sdf
        One of the two. Of an SD file the first molecule with its coordinates, if it has three
        dimensions and all hydrogens; else coordinates by ETKDG.
    charges
        ``bcc`` (AM1-BCC, seconds to minutes) or ``gas`` (Gasteiger, for a quick look).

    Returns
    -------
    prmtop, inpcrd, orders, lines
        The files, bonds (i, j, order) with i < j of order 1, 2 and 3 (aromatic ones 0: between),
        and what is kept: centres and double bonds.

    Raises
    ------
    ConfigurationError
        A program is not installed, the molecule cannot be read, a centre or double bond is not
        said, or AmberTools fails.
    """
    molecule, orders, lines = read_molecule(smiles=smiles, sdf=sdf)
    from rdkit import Chem

    name = smiles if sdf is None else str(sdf)
    with Chem.SDWriter(str(folder / "mol.sdf")) as writer:
        writer.write(molecule)
    net = Chem.GetFormalCharge(molecule)
    _call(
        folder,
        *("antechamber", "-i", "mol.sdf", "-fi", "sdf", "-o", "mol.mol2", "-fo", "mol2"),
        *("-c", charges, "-at", "gaff2", "-nc", str(net), "-rn", "MOL", "-dr", "no"),
    )
    _call(folder, "parmchk2", "-i", "mol.mol2", "-f", "mol2", "-o", "mol.frcmod", "-s", "gaff2")
    (folder / "leap.in").write_text(
        "source leaprc.gaff2\nloadamberparams mol.frcmod\nM = loadmol2 mol.mol2\n"
        "saveamberparm M mol.prmtop mol.inpcrd\nquit\n",
        encoding="utf-8",
    )
    _call(folder, "tleap", "-f", "leap.in")
    prmtop, inpcrd = folder / "mol.prmtop", folder / "mol.inpcrd"
    if not (inpcrd.is_file() and inpcrd.stat().st_size):
        raise ConfigurationError(
            f"{name!r}: tleap made no parameters; GAFF2 has none for some elements: make a System "
            "with your own tool and give it with --system"
        )
    return prmtop, inpcrd, orders, lines


def read_molecule(
    *, smiles: str | None = None, sdf: Path | None = None
) -> tuple[Any, list[tuple[int, int, int]], list[str]]:
    """Read a molecule with all its hydrogens, in three dimensions; this needs RDKit alone.

    Parameters
    ----------
    smiles, sdf
        As in :func:`parametrise`.

    Returns
    -------
    molecule, orders, lines
        RDKit's molecule with one conformer (in angstrom), and the others as in
        :func:`parametrise`.

    Raises
    ------
    ConfigurationError
        RDKit is not installed, the molecule cannot be read, or a centre or double bond is not
        said.

    Examples
    --------
    >>> molecule, orders, lines = read_molecule(smiles="C/C=C/C")  # doctest: +SKIP
    >>> lines  # doctest: +SKIP
    ['Double bond 2-3: E.']
    """
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem import AllChem
    except ImportError as error:
        raise ConfigurationError(
            f"--smiles and --sdf need RDKit and AmberTools: {_INSTALL}"
        ) from error
    RDLogger.DisableLog("rdApp.*")
    name = smiles if sdf is None else str(sdf)
    if sdf is None:
        molecule = Chem.MolFromSmiles(smiles)
    else:
        molecule = next(iter(Chem.SDMolSupplier(str(sdf), removeHs=False)), None)
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise ConfigurationError(
            f"{name!r} is no molecule to RDKit: check valences, ring numbers and brackets"
        )
    if len(Chem.GetMolFrags(molecule)) > 1:
        raise ConfigurationError(
            f"{name!r} holds {len(Chem.GetMolFrags(molecule))} molecules: give one, without "
            "counter-ions"
        )
    whole = Chem.AddHs(molecule, addCoords=True)
    has_place = molecule.GetNumConformers() and molecule.GetConformer().Is3D()
    if has_place:
        Chem.AssignStereochemistryFrom3D(whole)
    elif not len(AllChem.EmbedMultipleConfs(whole, _CONFORMERS, randomSeed=7)):
        raise ConfigurationError(
            f"{name!r}: no geometry satisfies it (ETKDG): check its stereochemistry, or give an "
            "SD file with coordinates"
        )
    _refuse_unsaid(Chem, whole, str(name))
    if not has_place:
        energies = [e for _, e in AllChem.MMFFOptimizeMoleculeConfs(whole)]
        kept = Chem.Conformer(whole.GetConformers()[energies.index(min(energies))])
        whole.RemoveAllConformers()
        whole.AddConformer(kept, assignId=True)
    orders = [
        (
            min(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()),
            max(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()),
            0 if bond.GetIsAromatic() else int(bond.GetBondTypeAsDouble()),
        )
        for bond in whole.GetBonds()
    ]
    return whole, orders, _stereo(Chem, whole)


def _refuse_unsaid(chem: Any, molecule: Any, name: str) -> None:
    unsaid = [
        f"{info.type.name.split('_')[0].lower()} {info.centeredOn + 1}"
        for info in chem.FindPotentialStereo(molecule)
        if info.specified == chem.StereoSpecified.Unspecified
    ]
    if unsaid:
        raise ConfigurationError(
            f"{name!r} leaves stereochemistry open ({', '.join(unsaid)}): say which isomer with "
            "@, @@, / and \\ in the SMILES, or give an SD file with coordinates; a run keeps it"
        )


def _stereo(chem: Any, molecule: Any) -> list[str]:
    chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
    lines = [
        f"Centre {atom.GetSymbol()} (atom {atom.GetIdx() + 1}): {atom.GetProp('_CIPCode')}."
        for atom in molecule.GetAtoms()
        if atom.HasProp("_CIPCode")
    ]
    for bond in molecule.GetBonds():
        if (stereo := str(bond.GetStereo())) in ("STEREOE", "STEREOZ"):
            ends = bond.GetBeginAtomIdx() + 1, bond.GetEndAtomIdx() + 1
            lines.append(f"Double bond {ends[0]}-{ends[1]}: {stereo[-1]}.")
    return lines


def _call(folder: Path, *command: str) -> None:
    """Run a program of AmberTools, beside this Python or on the PATH."""
    beside = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{command[0]} of AmberTools is not installed: {_INSTALL} (Linux on x86-64; elsewhere "
            "install AmberTools from conda-forge)"
        ) from error
    if done.returncode:
        told = one_line(RuntimeError((done.stdout + done.stderr)[-300:]))
        raise ConfigurationError(
            f"{command[0]} failed ({told}): check the molecule, or make a System with your own "
            "tool and give it with --system"
        )
