"""TorchEnergy: every force class, expressions, refusals, the same bits however it is run."""

from __future__ import annotations

import ast
import hashlib
import warnings
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit
from stand_ins import ROOT
from stand_ins.energies import assert_agree, empty_system, phe_system, reference

from openmm_eqflow.errors import UnsupportedSystemError
from openmm_eqflow.targets.energies.choose import choose_evaluator
from openmm_eqflow.targets.energies.contexts import ContextPool
from openmm_eqflow.targets.energies.expressions import parse
from openmm_eqflow.targets.energies.torch_energy import TorchEnergy
from openmm_eqflow.targets.library import list_systems, load_system
from openmm_eqflow.units import positions_in_nm

NAMES = [info.name for info in list_systems()]
AMBER_OBC1 = ("amber14-all.xml", "implicit/obc1.xml")
AMBER_GBN2 = ("amber14-all.xml", "implicit/gbn2.xml")
NMA = ROOT / "examples" / "n-methylacetamide.pdb"


def configurations(system, positions, n, thermal):
    """Langevin frames at 300 K, or the start with every atom displaced by up to 0.05 nm."""
    rng = np.random.default_rng(7)
    if not thermal:
        width = rng.uniform(0.005, 0.05, size=(n, 1, 1))
        return positions + width * rng.normal(size=(n, *positions.shape))
    integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 5, 0.0005)
    integrator.setRandomNumberSeed(7)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(openmm.XmlSerializer.clone(system), integrator, platform)
    context.setPositions(positions)
    frames = []
    for _ in range(n):
        integrator.step(2)
        frames.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)


@pytest.mark.parametrize("thermal", [True, False], ids=["thermal", "distorted"])
@pytest.mark.parametrize("name", NAMES)
def test_shipped_systems_agree_with_reference(name, thermal):
    molecule = load_system(name)
    positions = np.array(molecule.positions.value_in_unit(unit.nanometer))
    x = configurations(molecule.system, positions, 256, thermal)
    evaluator = TorchEnergy(molecule.system, positions=positions, n_threads=1)
    assert_agree(evaluator, molecule.system, x)
    assert evaluator.n_invalid == 0
    with torch.no_grad():
        eager = evaluator(torch.from_numpy(x[:32])).numpy()
    np.testing.assert_allclose(eager, evaluator.energies(x[:32]), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize(
    "force_field", [AMBER_OBC1, AMBER_GBN2, ("charmm36.xml",)], ids=["OBC1", "GBn2", "CHARMM36"]
)
def test_other_force_fields_on_a_ring_side_chain(force_field):
    system, _, positions = phe_system(*force_field)
    evaluator = TorchEnergy(system, positions=positions, n_threads=1)
    n_forces = sum(not isinstance(f, openmm.CMMotionRemover) for f in system.getForces())
    assert len(evaluator.terms) == n_forces
    for thermal in (True, False):
        assert_agree(evaluator, system, configurations(system, positions, 256, thermal))
    eager = TorchEnergy(system, positions=positions, compiled=False)
    assert eager.compiled_forces == ()
    assert_agree(eager, system, configurations(system, positions, 8, False))


def test_gradient_and_single_precision():
    molecule = load_system("alanine-dipeptide")
    positions = np.array(molecule.positions.value_in_unit(unit.nanometer))
    energy = TorchEnergy(molecule.system, positions=positions)
    x = torch.tensor(configurations(molecule.system, positions, 4, False), requires_grad=True)
    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    forces = energy.energies_and_forces(x.detach().numpy())[1]
    np.testing.assert_allclose(-gradient.numpy(), forces, atol=1e-9 * np.abs(forces).max())
    doubles = energy(x).detach()
    singles = energy.float()(x.detach().float())
    assert singles.dtype == torch.float32
    torch.testing.assert_close(singles.double(), doubles, rtol=1e-4, atol=1e-1)


def custom_forces():
    bond = openmm.CustomBondForce("D*(1-exp(-a*(r-r0)))^2 + scale*erf(r)/r")
    bond.addGlobalParameter("scale", 0.7)
    for name in ("D", "a", "r0"):
        bond.addPerBondParameter(name)
    bond.addBond(0, 1, [100.0, 20.0, 0.15])
    bond.addBond(1, 2, [80.0, 15.0, 0.2])
    angle = openmm.CustomAngleForce("k*(cos(theta)-c0)^2 + 0.3*sqrt(theta)")
    angle.addPerAngleParameter("k")
    angle.addPerAngleParameter("c0")
    angle.addAngle(0, 1, 2, [30.0, 0.1])
    torsion = openmm.CustomTorsionForce(
        "k*min(dtheta, 2*pi-dtheta)^2; dtheta = abs(theta-theta0); pi = 3.1415926535"
    )
    torsion.addPerTorsionParameter("k")
    torsion.addPerTorsionParameter("theta0")
    torsion.addTorsion(0, 1, 2, 3, [12.0, 0.4])
    pair = openmm.CustomNonbondedForce(
        "table(type1,type2)*line(type1)*line(type2)"
        "*select(step(r-0.3), exp(-r/w), 2-r^2)/max(r,0.05); w=0.5*(w1+w2)"
    )
    values = [1.0, 2.0, 3.0, 2.0, 4.0, 5.0, 3.0, 5.0, 6.0]
    pair.addTabulatedFunction("table", openmm.Discrete2DFunction(3, 3, values))
    pair.addTabulatedFunction("line", openmm.Discrete1DFunction([0.5, 1.5, 2.5]))
    pair.addPerParticleParameter("type")
    pair.addPerParticleParameter("w")
    for i in range(6):
        pair.addParticle([i % 3, 0.2 + 0.05 * i])
    pair.addExclusion(0, 1)
    pair.addInteractionGroup([0, 1, 2], [1, 2, 3, 4])
    pair.addInteractionGroup([5], [0, 1])
    compound = openmm.CustomCompoundBondForce(
        4,
        "k*(distance(p1,p2)-0.2)^2*cos(angle(p2,p3,p4)) + tanh(dihedral(p1,p2,p3,p4))"
        " + atan2(y1-y2, 1+(x3-x4)^2) + sinh(z1-z4)*delta(k-3)",
    )
    compound.addPerBondParameter("k")
    compound.addBond([2, 3, 4, 5], [3.0])
    compound.addBond([5, 1, 0, 3], [4.0])
    rb = openmm.RBTorsionForce()
    rb.addTorsion(1, 2, 3, 4, 1.0, -2.0, 3.0, 0.5, -0.7, 0.2)
    cmap = openmm.CMAPTorsionForce()
    cmap.addMap(8, np.random.default_rng(0).normal(size=64).tolist())
    cmap.addTorsion(0, 0, 1, 2, 3, 1, 2, 3, 4)
    nonbonded = openmm.NonbondedForce()
    nonbonded.addGlobalParameter("lam", 0.6)
    for i in range(6):
        nonbonded.addParticle(0.1 * (i - 2), 0.1 + 0.02 * i, 0.3)
    nonbonded.addException(0, 1, 0.0, 1.0, 0.0)
    nonbonded.addException(1, 2, 0.2, 0.12, 0.4)
    nonbonded.addParticleParameterOffset("lam", 3, 0.5, 0.01, 0.2)
    nonbonded.addExceptionParameterOffset("lam", 1, 0.1, 0.02, 0.3)
    return [bond, angle, torsion, pair, compound, rb, cmap, nonbonded]


@pytest.mark.parametrize("k", range(8))
@pytest.mark.parametrize("compiled", [True, False])
def test_every_force_class(k, compiled):
    force = custom_forces()[k]
    system = empty_system(6)
    system.addForce(force)
    rng = np.random.default_rng(k)
    x = np.cumsum(rng.normal(size=(40, 6, 3)) * 0.12, axis=1)
    evaluator = TorchEnergy(system, positions=x[0], compiled=compiled)
    assert_agree(evaluator, system, x)


@pytest.mark.parametrize(
    "text",
    [
        "-r^2 + 2^-r^0.5 - (r-1)^3/(r+2)^-2",
        "r*.5e0+1.e-1; r2 = square(r)",
        "b + a; a = cube(b)*recip(r); b = log(r + 1)",
        "sec(r)+csc(r)+cot(r)+asin(r/9)+acos(r/9)+atan(r)+tan(r)+cosh(r)+erfc(r)",
        "floor(3*r)*r + ceil(2*r)*r^2 + r^r + min(r, 0.4)",
        "1/r/r - 8/2/r*3 + r^2^0.5 - -r",
    ],
)
def test_expressions_mean_what_openmm_says(text):
    force = openmm.CustomBondForce(text)
    force.addBond(0, 1, [])
    system = empty_system(2)
    system.addForce(force)
    x = np.zeros((9, 2, 3))
    x[:, 1, 0] = np.linspace(0.31, 1.27, 9)
    for compiled in (True, False):
        assert_agree(TorchEnergy(system, positions=x[1], compiled=compiled), system, x)


@pytest.mark.parametrize(
    "text", ["r +", "(r", "r)", "r ? 2", "nosuch(r)", "sin(r, r)", "a; a = b; b = a", "__import__"]
)
def test_bad_expressions_are_refused(text):
    force = openmm.CustomBondForce("r")
    force.setEnergyFunction(text)
    force.addBond(0, 1, [])
    system = empty_system(2)
    system.addForce(force)
    with pytest.raises(UnsupportedSystemError, match="CustomBondForce"):
        TorchEnergy(system)


def test_repeated_subexpressions_are_shared():
    program = parse("1/r + 1/r^2 + exp(1/r)")
    assert sum(o.op == "recip" for o in program.operations) == 1


def test_unknown_force_falls_back_with_its_name():
    system = empty_system(3)
    force = openmm.CustomCentroidBondForce(2, "distance(g1,g2)^2")
    force.addGroup([0, 1])
    force.addGroup([2])
    force.addBond([0, 1])
    system.addForce(force)
    x = np.random.default_rng(0).normal(size=(5, 3, 3))
    with pytest.warns(UserWarning, match="CustomCentroidBondForce"):
        evaluator = choose_evaluator(system, n_workers=1, positions=x[0])
    assert isinstance(evaluator, ContextPool)
    np.testing.assert_allclose(evaluator.energies(x), reference(system, x)[0], rtol=1e-5)
    evaluator.close()


def test_disagreement_with_openmm_is_noticed(monkeypatch):
    monkeypatch.setattr("openmm_eqflow.targets.energies.terms.COULOMB", 138.9)
    system = load_system("alanine-dipeptide").system
    with pytest.raises(UnsupportedSystemError, match=r"NonbondedForce .* disagrees"):
        TorchEnergy(system)


@pytest.mark.parametrize("force", [openmm.NonbondedForce, openmm.GBSAOBCForce])
def test_cutoffs_are_not_covered(force):
    system = empty_system(2)
    one = force()
    for _ in range(2):
        one.addParticle(0.1, 0.2, 0.8)
    one.setNonbondedMethod(force.CutoffNonPeriodic)
    system.addForce(one)
    with pytest.raises(UnsupportedSystemError, match=force.__name__):
        TorchEnergy(system)


def test_tables_of_positions_are_not_covered():
    system = empty_system(2)
    force = openmm.CustomNonbondedForce("table(floor(r))")
    force.addTabulatedFunction("table", openmm.Discrete1DFunction([1.0, 2.0, 3.0]))
    for _ in range(2):
        force.addParticle([])
    system.addForce(force)
    with pytest.raises(UnsupportedSystemError, match="tabulated function 'table' of positions"):
        TorchEnergy(system)


def test_kernels_are_cached_under_the_hash_of_their_sources():
    """All of them: a module of this package that a kernel imports is one of the sources."""
    import numba

    from openmm_eqflow.targets.energies.compiled import load_kernels

    before = numba.config.CACHE_DIR
    kernels = load_kernels()
    assert numba.config.CACHE_DIR == before
    folder = Path(kernels[0].__file__).parent
    sources = sorted([*folder.glob("kernels_*.py"), folder / "vector_math.py"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    assert f"kernels-{digest}" in str(kernels[0].bond_kernel.stats.cache_path)
    needed = {Path(kernel.__file__).stem for kernel in kernels}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("openmm_eqflow"):
                needed.add(str(node.module).rsplit(".", 1)[-1])
    assert needed <= {path.stem for path in sources}
    assert "vector_math" in needed


def forces_without_terms():
    """One of every class that lists its terms, with parameters and tables but no term."""
    bond = openmm.CustomBondForce("k*r")
    bond.addPerBondParameter("k")
    angle = openmm.CustomAngleForce("k*theta")
    angle.addPerAngleParameter("k")
    torsion = openmm.CustomTorsionForce("k*theta")
    torsion.addPerTorsionParameter("k")
    compound = openmm.CustomCompoundBondForce(2, "k*distance(p1,p2)")
    compound.addPerBondParameter("k")
    cmap = openmm.CMAPTorsionForce()
    cmap.addMap(4, [1.0] * 16)
    excluded, empty_group = (openmm.CustomNonbondedForce("q1*q2/r") for _ in range(2))
    for pairs in (excluded, empty_group):
        pairs.addPerParticleParameter("q")
        for k in range(4):
            pairs.addParticle([k + 1.0])
    for k in range(4):
        for j in range(k):
            excluded.addExclusion(j, k)
    empty_group.addInteractionGroup([], [0, 1, 2, 3])
    standard = [
        openmm.HarmonicBondForce(),
        openmm.HarmonicAngleForce(),
        openmm.PeriodicTorsionForce(),
        openmm.RBTorsionForce(),
        openmm.CustomExternalForce("x"),
        openmm.CustomCentroidBondForce(1, "x1"),
    ]
    return [*standard, cmap, bond, angle, torsion, compound, excluded, empty_group]


@pytest.mark.parametrize("k", range(13))
def test_a_force_without_terms_is_skipped(k):
    """Alone, and beside a force that has an energy."""
    x = np.random.default_rng(k).normal(size=(6, 4, 3)) * 0.2
    for with_energy in (False, True):
        system = empty_system(4)
        system.addForce(forces_without_terms()[k])
        if with_energy:
            bond = openmm.HarmonicBondForce()
            bond.addBond(0, 1, 0.1, 2000.0)
            system.addForce(bond)
        for compiled in (True, False):
            evaluator = TorchEnergy(system, positions=x[0], compiled=compiled)
            assert_agree(evaluator, system, x)
            assert (np.abs(evaluator.energies(x)).min() > 0.0) == with_energy


def test_general_born_without_pairs():
    """Every pair excluded: the single-particle energies are left."""
    gb = openmm.CustomGBForce()
    gb.addPerParticleParameter("q")
    for k in range(3):
        gb.addParticle([k + 1.0])
        for j in range(k):
            gb.addExclusion(j, k)
    gb.addComputedValue("I", "q1*r", openmm.CustomGBForce.ParticlePair)
    gb.addEnergyTerm("3*q + I", openmm.CustomGBForce.SingleParticle)
    gb.addEnergyTerm("I1*q2/r", openmm.CustomGBForce.ParticlePair)
    system = empty_system(3)
    system.addForce(gb)
    x = np.random.default_rng(3).normal(size=(6, 3, 3)) * 0.2
    for compiled in (True, False):
        evaluator = TorchEnergy(system, positions=x[0], compiled=compiled)
        assert_agree(evaluator, system, x)
        np.testing.assert_allclose(evaluator.energies(x), 18.0)


@pytest.mark.parametrize("force_field", ["charmm36.xml", "amber19-all.xml"])
def test_force_fields_with_maps_on_a_molecule_without_any(force_field):
    """N-methylacetamide has no torsion pair of a backbone: the map force is there and empty."""
    pdb = app.PDBFile(str(NMA))
    system = app.ForceField(force_field).createSystem(pdb.topology, constraints=None)
    assert any(isinstance(f, openmm.CMAPTorsionForce) for f in system.getForces())
    positions = np.array(pdb.positions.value_in_unit(unit.nanometer))
    evaluator = choose_evaluator(system, positions=positions)
    assert isinstance(evaluator, TorchEnergy)
    assert_agree(evaluator, system, configurations(system, positions, 16, False))


def test_what_cannot_be_read_falls_back_and_is_told_once(monkeypatch):
    def broken(force):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("openmm_eqflow.targets.energies.torch_energy.read_standard", broken)
    system = empty_system(2)
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.1, 2000.0)
    system.addForce(bond)
    x = np.random.default_rng(0).normal(size=(5, 2, 3))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        pools = [choose_evaluator(system, n_workers=1, positions=x[0]) for _ in range(3)]
    assert [str(w.message) for w in heard] == [
        "falling back to OpenMM Contexts: HarmonicBondForce (force 0) cannot be read "
        "(IndexError: tuple index out of range)"
    ]
    for pool in pools:
        np.testing.assert_allclose(pool.energies(x), reference(system, x)[0], rtol=1e-5)
        pool.close()


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    system = load_system("alanine-dipeptide")
    noise = np.random.default_rng(0).normal(size=(1000, system.n_particles, 3))
    return positions_in_nm(system.positions) + 0.005 * noise


@pytest.mark.parametrize("name", ["alanine-dipeptide", "alanine-dipeptide-vacuum"])
@pytest.mark.parametrize("compiled", [True, False])
def test_energies_do_not_depend_on_threads_place_or_memory(batch, name, compiled):
    energy = TorchEnergy(load_system(name).system, compiled=compiled, n_threads=1)
    u, f = energy.energies_and_forces(batch)
    for n_threads in (1, 2, 3, 5):
        energy.n_threads = n_threads
        for shift in range(3):
            # Another address modulo the 64 bytes that vector units and BLAS care about.
            room = np.empty(batch.size + 8)
            x = room[shift : shift + batch.size].reshape(batch.shape)
            x[:] = batch
            again_u, again_f = energy.energies_and_forces(x)
            np.testing.assert_array_equal(again_u, u)
            np.testing.assert_array_equal(again_f, f)
            np.testing.assert_array_equal(energy.energies(x), u)
    if compiled:  # a configuration does not see its neighbours
        part_u, part_f = energy.energies_and_forces(batch[117:390])
        np.testing.assert_array_equal(part_u, u[117:390])
        np.testing.assert_array_equal(part_f, f[117:390])
    energy.close()
