r"""Energy terms as torch modules: differentiable, any dtype and device, vectorised over the batch.

Every module maps positions ``(n, n_particles, 3)`` in nm to energies ``(n,)`` in kJ/mol.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from openmm_eqflow.energies.custom_terms import GBStage, GeneralGBTerm
from openmm_eqflow.energies.terms import (
    AngleTerm,
    BondTerm,
    FourierTorsionTerm,
    GBSATerm,
    MapTerm,
    PairTerm,
    ProgramTerm,
    StandardTerm,
)

__all__ = ["AnyTerm", "torch_term"]

AnyTerm = StandardTerm | ProgramTerm | GeneralGBTerm
# Keeps the gradient of an angle finite where its particles are exactly collinear, as OpenMM does.
_TINY = 1e-30


def _distance(x: Tensor, i: Tensor, j: Tensor) -> Tensor:
    distance: Tensor = torch.linalg.vector_norm(x[:, i] - x[:, j], dim=-1)
    return distance


def _angle(x: Tensor, index: Tensor) -> Tensor:
    a, b = x[:, index[:, 0]] - x[:, index[:, 1]], x[:, index[:, 2]] - x[:, index[:, 1]]
    cross = torch.linalg.cross(a, b).square().sum(-1).clamp_min(_TINY).sqrt()
    return torch.atan2(cross, (a * b).sum(-1))


def _dihedral_plane(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`(\rho\cos\phi, \rho\sin\phi)` (IUPAC sign)."""
    p = [x[:, index[:, k]] for k in range(4)]
    b1, b2, b3 = p[1] - p[0], p[2] - p[1], p[3] - p[2]
    n1, n2 = torch.linalg.cross(b1, b2), torch.linalg.cross(b2, b3)
    length = torch.linalg.vector_norm(b2, dim=-1)
    return (n1 * n2).sum(-1), length * (b1 * n2).sum(-1)


def _dihedral(x: Tensor, index: Tensor) -> Tensor:
    cosine, sine = _dihedral_plane(x, index)
    return torch.atan2(sine, cosine)


class _Module(nn.Module):
    def put(self, name: str, array: NDArray[np.generic]) -> None:
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)

    def get(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, name))


class _Harmonic(_Module):
    def __init__(self, term: BondTerm | AngleTerm) -> None:
        super().__init__()
        self._is_bond = isinstance(term, BondTerm)
        self.put("index", term.index)
        self.put("origin", term.length if isinstance(term, BondTerm) else term.angle)
        self.put("k", term.k)

    def forward(self, x: Tensor) -> Tensor:
        index = self.get("index")
        q = _distance(x, index[:, 0], index[:, 1]) if self._is_bond else _angle(x, index)
        return 0.5 * (q - self.get("origin")).square() @ self.get("k")


class _Torsions(_Module):
    def __init__(self, term: FourierTorsionTerm) -> None:
        super().__init__()
        self.put("index", term.index)
        self.put("cosine", term.cosine.T)
        self.put("sine", term.sine.T)

    def forward(self, x: Tensor) -> Tensor:
        cosine, sine = _dihedral_plane(x, self.get("index"))
        radius = torch.sqrt(cosine.square() + sine.square())
        c1, s1 = cosine / radius, sine / radius
        a, b = self.get("cosine"), self.get("sine")
        total = a[0].sum() + torch.zeros_like(c1[:, 0])
        c, s = c1, s1
        for n in range(1, len(a)):
            total = total + c @ a[n] + s @ b[n]
            c, s = c * c1 - s * s1, s * c1 + c * s1
        return total


class _Maps(_Module):
    def __init__(self, term: MapTerm) -> None:
        super().__init__()
        self._size = term.coefficients.shape[1]
        self.put("index", term.index)
        self.put("coefficients", term.coefficients)

    def forward(self, x: Tensor) -> Tensor:
        index, table = self.get("index"), self.get("coefficients")
        powers, cells = [], []
        for angles in (index[:, :4], index[:, 4:]):
            s = (_dihedral(x, angles) % (2 * torch.pi)) * (self._size / (2 * torch.pi))
            # nan has no cell; any will do, the energy stays nan
            cell = torch.nan_to_num(s.detach()).floor().long() % self._size
            s = s - s.detach().floor()
            cells.append(cell)
            powers.append(torch.stack([torch.ones_like(s), s, s * s, s * s * s], dim=-1))
        which = torch.arange(len(index), device=x.device)
        patch = table[which, cells[0], cells[1]]
        return torch.einsum("btk,btl,btkl->b", powers[0], powers[1], patch)


class _Pairs(_Module):
    def __init__(self, term: PairTerm) -> None:
        super().__init__()
        self.put("index", term.index)
        for name in ("charge", "a", "b"):
            self.put(name, getattr(term, name))

    def forward(self, x: Tensor) -> Tensor:
        index = self.get("index")
        inverse = (x[:, index[:, 0]] - x[:, index[:, 1]]).square().sum(-1).rsqrt()
        six = (inverse * inverse) ** 3
        return inverse @ self.get("charge") + (six * six) @ self.get("a") - six @ self.get("b")


class _GBSA(_Module):
    r"""OBC2: Born radii from pair integrals, the Still formula, and the ACE surface term.

    Onufriev, Bashford and Case 2004, equations 6 to 8; Still et al. 1990, equation 3;
    Schaefer, Bartels and Karplus 1998.
    """

    def __init__(self, term: GBSATerm) -> None:
        super().__init__()
        n = len(term.charge)
        i, j = np.argwhere(~np.eye(n, dtype=bool)).T
        self._n = n
        self._scale = (-0.5 * term.prefactor, term.surface, term.probe)
        self.put("i", i)
        self.put("j", j)
        for name in ("radius", "offset_radius", "charge"):
            self.put(name, getattr(term, name))
        self.put("pair_charge", term.charge[i] * term.charge[j])
        self.put("near", term.offset_radius[i])
        self.put("reach", term.scaled_radius[j])

    def forward(self, x: Tensor) -> Tensor:
        i, j, near, reach = (self.get(k) for k in ("i", "j", "near", "reach"))
        r = _distance(x, i, j)
        lower = 1 / torch.maximum(near, (r - reach).abs())
        upper = 1 / (r + reach)
        square = upper.square() - lower.square()
        term = lower - upper + 0.25 * r * square + 0.5 / r * torch.log(upper / lower)
        term = term - 0.25 * reach.square() / r * square
        term = term + torch.where(near < reach - r, 2 * (1 / near - lower), 0.0)
        term = torch.where(near < r + reach, term, 0.0)
        offset, radius, charge = (self.get(k) for k in ("offset_radius", "radius", "charge"))
        psi = 0.5 * offset * term.reshape(len(x), self._n, -1).sum(-1)
        born = 1 / (1 / offset - torch.tanh(psi * (1 - psi * (0.8 - 4.85 * psi))) / radius)
        polar, surface, probe = self._scale
        product = born[:, i] * born[:, j]
        still = torch.sqrt(r * r + product * torch.exp(-r * r / (4 * product)))
        energy = polar * ((1 / still) @ self.get("pair_charge") + (1 / born) @ charge.square())
        return energy + surface * ((radius / born) ** 6) @ (radius + probe).square()


class _Programs(_Module):
    def __init__(self, term: ProgramTerm) -> None:
        super().__init__()
        self._program, self._geometry = term.program, term.geometry
        self._constants = list(term.constants)
        self.put("index", term.index)
        for k, array in enumerate(term.constants.values()):
            self.put(f"constant{k}", array)

    def forward(self, x: Tensor) -> Tensor:
        index = self.get("index")
        inputs = {name: self.get(f"constant{k}") for k, name in enumerate(self._constants)}
        for name, (kind, slots) in self._geometry.items():
            at = index[:, list(slots)]
            if kind == "distance":
                inputs[name] = _distance(x, at[:, 0], at[:, 1])
            elif kind == "angle":
                inputs[name] = _angle(x, at)
            elif kind == "dihedral":
                inputs[name] = _dihedral(x, at)
            else:
                inputs[name] = x[:, at[:, 0], "xyz".index(kind)]
        energy = self._program.run(inputs, x)
        return energy.expand(len(x), len(index)).sum(-1)


class _GeneralGB(_Module):
    def __init__(self, term: GeneralGBTerm) -> None:
        super().__init__()
        self._n = term.n_particles
        self._stages = (*term.values, *term.energies)
        for k, stage in enumerate(self._stages):
            if stage.pairs is not None:
                self.put(f"pairs{k}", stage.pairs)
            for m, array in enumerate(stage.constants.values()):
                self.put(f"constant{k}_{m}", array)

    def _run(self, k: int, stage: GBStage, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        inputs = {name: self.get(f"constant{k}_{m}") for m, name in enumerate(stage.constants)}
        if stage.pairs is None:
            inputs.update(values)
            return stage.program.run(inputs, x).expand(len(x), self._n)
        i, j = self.get(f"pairs{k}").T
        inputs["r"] = _distance(x, i, j)
        for name, value in values.items():
            inputs[name + "1"], inputs[name + "2"] = value[:, i], value[:, j]
        return stage.program.run(inputs, x).expand(len(x), len(i))

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        energy = x.new_zeros(len(x))
        for k, stage in enumerate(self._stages):
            result = self._run(k, stage, x, values)
            if not stage.name:
                energy = energy + result.sum(-1)
            elif stage.pairs is None:
                values[stage.name] = result
            else:
                zero = x.new_zeros(len(x), self._n)
                values[stage.name] = zero.index_add(1, self.get(f"pairs{k}")[:, 0], result)
        return energy


def torch_term(term: AnyTerm) -> nn.Module:
    """Wrap the arrays of a force as a module."""
    if isinstance(term, BondTerm | AngleTerm):
        return _Harmonic(term)
    if isinstance(term, FourierTorsionTerm):
        return _Torsions(term)
    if isinstance(term, MapTerm):
        return _Maps(term)
    if isinstance(term, PairTerm):
        return _Pairs(term)
    if isinstance(term, GBSATerm):
        return _GBSA(term)
    if isinstance(term, ProgramTerm):
        return _Programs(term)
    return _GeneralGB(term)
