"""Methanol as the files of other programs: the same numbers in GROMACS's and CHARMM's words."""

from __future__ import annotations

from pathlib import Path

GRO = """\
methanol
    6
    1MOH     C1    1   0.000   0.000   0.000
    1MOH     H1    2   0.036   0.103   0.000
    1MOH     H2    3   0.036  -0.051   0.089
    1MOH     H3    4   0.036  -0.051  -0.089
    1MOH     O1    5  -0.142   0.000   0.000
    1MOH     HO    6  -0.174   0.091   0.000
   3.00000   3.00000   3.00000
"""

TOP = """\
[ defaults ]
1 2 yes 0.5 0.8333

[ atomtypes ]
c3 c3 6 12.010 0.0 A 0.339967 0.457730
h1 h1 1 1.008 0.0 A 0.247135 0.0656888
oh oh 8 16.000 0.0 A 0.306647 0.880314
ho ho 1 1.008 0.0 A 0.000000 0.000000

[ moleculetype ]
MOH 3

[ atoms ]
1 c3 1 MOH C1 1 0.1167 12.010
2 h1 1 MOH H1 1 0.0287 1.008
3 h1 1 MOH H2 1 0.0287 1.008
4 h1 1 MOH H3 1 0.0287 1.008
5 oh 1 MOH O1 1 -0.5988 16.000
6 ho 1 MOH HO 1 0.3960 1.008

[ bonds ]
1 2 1 0.1093 281000.0
1 3 1 0.1093 281000.0
1 4 1 0.1093 281000.0
1 5 1 0.1426 262900.0
5 6 1 0.0974 309300.0

[ pairs ]
2 6 1
3 6 1
4 6 1

[ angles ]
2 1 3 1 109.55 327.9
2 1 4 1 109.55 327.9
3 1 4 1 109.55 327.9
2 1 5 1 109.88 426.6
3 1 5 1 109.88 426.6
4 1 5 1 109.88 426.6
1 5 6 1 108.16 394.1

[ dihedrals ]
2 1 5 6 9 0.0 0.6973 3
3 1 5 6 9 0.0 0.6973 3
4 1 5 6 9 0.0 0.6973 3

[ system ]
methanol

[ molecules ]
MOH 1
"""

PSF = """\
PSF

       1 !NTITLE
 REMARKS methanol

       6 !NATOM
       1 MOH  1    MOH  C1   C3       0.116700       12.0100           0
       2 MOH  1    MOH  H1   H1       0.028700        1.0080           0
       3 MOH  1    MOH  H2   H1       0.028700        1.0080           0
       4 MOH  1    MOH  H3   H1       0.028700        1.0080           0
       5 MOH  1    MOH  O1   OH      -0.598800       16.0000           0
       6 MOH  1    MOH  HO   HO       0.396000        1.0080           0

       5 !NBOND: bonds
       1       2       1       3       1       4       1       5
       5       6

       7 !NTHETA: angles
       2       1       3       2       1       4       3       1       4
       2       1       5       3       1       5       4       1       5
       1       5       6

       3 !NPHI: dihedrals
       2       1       5       6       3       1       5       6
       4       1       5       6

       0 !NIMPHI: impropers


       0 !NDON: donors


       0 !NACC: acceptors


       0 !NNB

       0       0       0       0       0       0

       1       0 !NGRP
       0       0       0

"""

RTF = """\
* methanol
*
   36  1
MASS  1 C3  12.01000 C
MASS  2 H1   1.00800 H
MASS  3 OH  16.00000 O
MASS  4 HO   1.00800 H

END
"""

PRM = """\
* methanol
*
BONDS
C3 H1 335.8 1.0930
C3 OH 314.2 1.4260
OH HO 369.6 0.9740

ANGLES
H1 C3 H1 39.18 109.55
H1 C3 OH 50.98 109.88
C3 OH HO 47.09 108.16

DIHEDRALS
H1 C3 OH HO 0.16666 3 0.00

NONBONDED nbxmod  5 atom cdiel shift vatom vdistance vswitch -
cutnb 14.0 ctofnb 12.0 ctonnb 10.0 eps 1.0 e14fac 1.0 wmin 1.5
C3 0.0 -0.1094 1.9080
H1 0.0 -0.0157 1.3870
OH 0.0 -0.2104 1.7210
HO 0.0 -0.0100 0.3000

END
"""


def write_methanol(folder: Path) -> Path:
    """Write conf.gro, topol.top, mol.psf, mol.rtf, mol.prm, mol.crd and mol.pdb."""
    files = {"conf.gro": GRO, "topol.top": TOP, "mol.psf": PSF, "mol.rtf": RTF, "mol.prm": PRM}
    card, pdb = ["* methanol", "*", "    6"], []
    for k, line in enumerate(GRO.splitlines()[2:8], start=1):
        name = line[10:15].strip()
        x, y, z = (10.0 * float(word) for word in line[20:].split())
        card.append(f"{k:5d}{1:5d} MOH  {name:<4s}{x:10.5f}{y:10.5f}{z:10.5f} MOH  1      0.00000")
        pdb.append(
            f"HETATM{k:5d}  {name:<3s} MOH A   1    {x:8.3f}{y:8.3f}{z:8.3f}"
            f"  1.00  0.00           {name[0]}"
        )
    bonds = ((1, 2, 3, 4, 5), (5, 6))
    pdb += ["CONECT" + "".join(f"{k:5d}" for k in atoms) for atoms in bonds]
    files["mol.crd"] = "\n".join(card) + "\n"
    files["mol.pdb"] = "\n".join([*pdb, "END", ""])
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
