"""An OpenMM Topology as plain JSON values, and back."""

from __future__ import annotations

from typing import Any

from openmm import app

__all__ = [
    "topology_from_record",
    "topology_record",
]


def topology_record(topology: app.Topology | None) -> dict[str, Any] | None:
    """Return chains, residues, atoms and bonds by number, with orders where they are known."""
    if topology is None:
        return None
    return {
        "chains": [c.id for c in topology.chains()],
        "residues": [[r.name, r.id, r.chain.index] for r in topology.residues()],
        "atoms": [
            [a.name, None if a.element is None else a.element.symbol, a.residue.index]
            for a in topology.atoms()
        ],
        "bonds": [
            [bond[0].index, bond[1].index, *([] if bond.order is None else [int(bond.order)])]
            for bond in topology.bonds()
        ],
    }


def topology_from_record(record: dict[str, Any] | None) -> app.Topology | None:
    """Rebuild a topology from :func:`topology_record`."""
    if record is None:
        return None
    topology = app.Topology()
    chains = [topology.addChain(c) for c in record["chains"]]
    residues = [topology.addResidue(n, chains[c], i) for n, i, c in record["residues"]]
    atoms = [
        topology.addAtom(n, e and app.Element.getBySymbol(e), residues[r])
        for n, e, r in record["atoms"]
    ]
    for a, b, *order in record["bonds"]:
        topology.addBond(atoms[a], atoms[b], None, order[0] if order else None)
    return topology
