r"""What to look at in a trajectory: named torsions, basins, pair distances, slow coordinates.

Everything is a function of positions in nm; nothing depends on how the frames were made. Angles
are in radians. ``targets/isomers.py`` finds the torsions of a molecule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Ramachandran",
    "Torsion",
    "TwoStates",
    "pair_distances",
    "ramachandran_pairs",
    "seen_once",
    "slow_coordinates",
    "squared_radius_of_gyration",
    "torsion_angles",
    "two_states",
]

FloatArray = NDArray[np.float64]
#: A state with fewer frames, or a smaller share where its arc is found from frames, is none.
_FEW_FRAMES, _RARE = 5, 0.002


class Torsion(NamedTuple):
    """A torsion that tells isomers or conformers apart.

    Attributes
    ----------
    name
        What a person reads.
    atoms
        Four particles.
    fold
        How many of its turns look alike (methyl: 3).
    kind
        ``single``, ``amide``, ``ester`` (acids, too) or ``double`` bond, or ``ring`` for a bond of
        a flexible ring, or ``side`` for a substituent of one.
    ring
        The ring it belongs to, -1 for none.
    even
        Whether angles of opposite sign are the same up to labels (the two chairs of cyclohexane).
    """

    name: str
    atoms: tuple[int, int, int, int]
    fold: int = 1
    kind: str = "single"
    ring: int = -1
    even: bool = False


class Ramachandran(NamedTuple):
    """The two backbone torsions of one residue."""

    residue: str
    phi: Torsion
    psi: Torsion


class TwoStates(NamedTuple):
    """The arc from ``start`` up to ``stop`` (radians) against the rest of the circle."""

    start: float
    stop: float

    def contains(self, angle: FloatArray) -> NDArray[np.bool_]:
        """Whether angles lie on the arc."""
        width = np.mod(self.stop - self.start, 2 * np.pi)
        inside: NDArray[np.bool_] = np.mod(angle - self.start, 2 * np.pi) < width
        return inside


def ramachandran_pairs(torsions: Sequence[Torsion]) -> list[Ramachandran]:
    """Pair the phi and psi that share a residue (phi's third atom is psi's second)."""
    pairs = []
    for phi in (t for t in torsions if t.name.startswith("φ")):
        for psi in (t for t in torsions if t.name.startswith("ψ")):
            if phi.atoms[2] == psi.atoms[1]:
                pairs.append(Ramachandran(phi.name[1:].strip(), phi, psi))
    return pairs


def torsion_angles(
    x: NDArray[np.floating[Any]], torsions: Sequence[Torsion | tuple[int, int, int, int]]
) -> FloatArray:
    """Dihedral angles of ``(n_frames, n_particles, 3)``, IUPAC sign, ``(n_frames, n_torsions)``.

    Radians. Four atoms alone: in (-pi, pi]. A :class:`Torsion`: wrapped to [-pi, pi) / fold, and
    without its sign where ``even``. The arctan2 form of Blondel and Karplus 1996 (J. Comput. Chem.
    17, 1132) is used because it has no singularity at 0 and pi.
    """
    angles = np.zeros((len(x), len(torsions)))
    for column, torsion in enumerate(torsions):
        t = torsion if isinstance(torsion, Torsion) else Torsion("", torsion)
        a, b, c, d = (x[:, k].astype(np.float64) for k in t.atoms)
        normal_a, normal_b = np.cross(b - a, c - b), np.cross(c - b, d - c)
        sine = np.linalg.norm(c - b, axis=-1) * ((b - a) * normal_b).sum(axis=-1)
        angle = np.arctan2(sine, (normal_a * normal_b).sum(axis=-1))
        if t.fold > 1:
            angle = (np.mod(angle * t.fold + np.pi, 2 * np.pi) - np.pi) / t.fold
        angles[:, column] = np.abs(angle) if t.even else angle
    return angles


def two_states(
    angle: FloatArray, weights: FloatArray | None = None, *, least: float = _RARE
) -> TwoStates | None:
    """Cut a circle at the two barriers that separate its two best-separated states.

    Parameters
    ----------
    angle
        ``(n,)`` radians.
    weights
        ``(n,)``, not negative; equal by default.
    least
        Smallest population of a state.

    Returns
    -------
    TwoStates or None
        The arc with the smaller population; None if the density has no two peaks with a barrier
        of less than half the lower one between them.
    """
    n_bins = 72
    counts, edges = np.histogram(angle, bins=n_bins, range=(-np.pi, np.pi), weights=weights)
    total = counts.sum()
    if not total > 0.0:
        return None
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    padded = np.concatenate([counts[-6:], counts, counts[:6]])
    density = np.convolve(padded, kernel / kernel.sum(), mode="valid") / total
    minima = np.flatnonzero(
        (density <= np.roll(density, 1)) & (density <= np.roll(density, -1))
    )
    best: tuple[float, TwoStates] | None = None
    for i, first in enumerate(minima):
        for second in minima[i + 1 :]:
            inner, outer = density[first:second], np.roll(density, -second)
            outer = outer[: n_bins - (second - first)]
            minority = min(inner.sum(), outer.sum())
            barrier = max(density[first], density[second])
            lower = min(inner.max(), outer.max())
            if minority < least or barrier > 0.5 * lower:
                continue
            a, b = (float(0.5 * (edges[k] + edges[k + 1])) for k in (first, second))
            arc = TwoStates(a, b) if inner.sum() <= outer.sum() else TwoStates(b, a)
            score = float((density[first] + density[second]) / np.sqrt(minority))
            if best is None or score < best[0]:
                best = (score, arc)
    return None if best is None else best[1]


def seen_once(torsions: Sequence[Torsion], angles: FloatArray) -> list[list[Torsion]]:
    """Torsions, and rings (all their torsions), that frames show in one state only.

    Parameters
    ----------
    torsions
        Those whose turns all look alike (``fold`` above 1), and rings whose states differ in
        labels only (``even``), have no other state to show.
    angles
        ``(n, n_torsions)`` as of :func:`torsion_angles`, of all frames that count.

    Returns
    -------
    list
        Amides, esters and double bonds have two sides, phi of a peptide its two signs; what else
        the states of a torsion are, only frames can tell: two peaks with a barrier between.
    """
    found: dict[tuple[int, int], list[Torsion]] = {}
    several: set[tuple[int, int]] = set()
    for column, torsion in enumerate(torsions):
        key = (torsion.ring, -1 if torsion.ring >= 0 else column)
        found.setdefault(key, []).append(torsion)
        angle = angles[:, column]
        if torsion.fold > 1 or torsion.even:
            several.add(key)
        elif torsion.kind in ("amide", "ester", "double") or torsion.name.startswith("φ"):
            side = np.sin(angle) if torsion.name.startswith("φ") else np.cos(angle)
            if min((side > 0.0).sum(), (side <= 0.0).sum()) >= _FEW_FRAMES:
                several.add(key)
        elif two_states(angle, least=max(_RARE, _FEW_FRAMES / max(1, len(angle)))) is not None:
            several.add(key)
    return [members for key, members in found.items() if key not in several]


def pair_distances(x: NDArray[np.floating[Any]]) -> FloatArray:
    """Distances of all pairs, ``(n_frames, N (N - 1) / 2)`` in nm, of ``(n_frames, N, D)``."""
    i, j = np.triu_indices(x.shape[1], k=1)
    distances = np.empty((len(x), len(i)))
    # The differences of many frames of a large cluster would fill the memory.
    step = max(1, 2_000_000 // max(1, len(i)))
    for start in range(0, len(x), step):
        y = x[start : start + step].astype(np.float64)
        distances[start : start + step] = np.linalg.norm(y[:, i] - y[:, j], axis=-1)
    return distances


def squared_radius_of_gyration(x: NDArray[np.floating[Any]]) -> FloatArray:
    r""":math:`\frac1N \sum_i |x_i - \bar x|^2` in nm^2, geometric (no masses), ``(n_frames,)``."""
    y = x.astype(np.float64)
    y = y - y.mean(axis=1, keepdims=True)
    result: FloatArray = np.square(y).sum(axis=(1, 2)) / y.shape[1]
    return result


def slow_coordinates(
    x: NDArray[np.floating[Any]], angles: FloatArray, torsions: Sequence[Torsion]
) -> dict[str, FloatArray]:
    """Coordinates that tell slow modes: size, and cosine and sine of every torsion.

    Invariant under exchange of identical atoms, whose labels need not mix.
    """
    named = {"squared radius of gyration": squared_radius_of_gyration(x)}
    for column, torsion in enumerate(torsions):
        times = "" if torsion.fold == 1 else f"{torsion.fold} "
        for word, function in (("cos", np.cos), ("sin", np.sin))[: 1 if torsion.even else 2]:
            named[f"{word} {times}{torsion.name}"] = function(torsion.fold * angles[:, column])
    return named
