"""Flow files: exact round trip, and one line for every way a file can be wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from stand_ins.flows import chart_field, molecule_flow, planar_flow, stream, water_prior

from openmm_eqflow.errors import CheckpointError
from openmm_eqflow.files import write_npz
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import (
    file_sha256,
    load_flow,
    load_tensors,
    save_flow,
    save_tensors,
)
from openmm_eqflow.targets.library import systems_directory
from openmm_eqflow.vector_fields import ChartField


@pytest.mark.parametrize("make", [molecule_flow, planar_flow])
def test_round_trip(tmp_path, make):
    flow = make(n_steps=4)
    audit(flow, n=16, generator=stream(0))
    path = save_flow(flow, tmp_path / "flow", {"system_hash": "abc", "bad": float("nan")})
    assert path == tmp_path / "flow.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flow.json", "flow.safetensors"]
    x, log_q = flow.sample_and_log_prob(10, generator=stream(1))
    for name in ("flow", "flow.safetensors", "flow.json"):
        again = load_flow(tmp_path / name)
        again.module.requires_grad_(False)
        x_again, log_q_again = again.sample_and_log_prob(10, generator=stream(1))
        assert torch.equal(x, x_again)
        assert torch.equal(log_q, log_q_again)
    assert again.grid == flow.grid
    assert again.audit_report == json.loads(json.dumps(flow.audit_report))
    assert again.metadata == {"system_hash": "abc", "bad": None}
    assert again.source == (str(path), file_sha256(path)) == flow.source
    assert not again.module.training


def test_dots_in_a_name_are_part_of_it(tmp_path):
    flows = [molecule_flow(size, n_steps=2) for size in (0.1, 0.3)]
    for k, flow in enumerate(flows):
        assert save_flow(flow, tmp_path / f"a.{k}") == tmp_path / f"a.{k}.safetensors"
    x = flows[0].sample(5, generator=stream(0))
    for k, flow in enumerate(flows):
        for suffix in ("", ".json", ".safetensors"):
            again = load_flow(tmp_path / f"a.{k}{suffix}")
            again.module.requires_grad_(False)
            assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert len(list(tmp_path.iterdir())) == 4


def test_flow_that_ships_loads_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_flow("alanine-dipeptide")
    assert shipped.metadata["system"] == "alanine-dipeptide"
    assert shipped.source == load_flow(systems_directory() / "alanine-dipeptide" / "flow").source
    with pytest.raises(CheckpointError, match=r"harmonic.flow\.safetensors does not exist"):
        load_flow("harmonic")
    # "./" means a file, and other names are files anyway.
    for name in ("./alanine-dipeptide", "no-such-system"):
        with pytest.raises(CheckpointError, match=r"^\W*[\w-]+\.safetensors does not exist"):
            load_flow(name)


def test_prior_without_torsions(tmp_path):
    flow = EquivariantFlow(water_prior(), ChartField(3, 0, [], width=4))
    save_flow(flow, tmp_path / "flow")
    x = flow.sample(5, generator=stream(0))
    assert torch.equal(load_flow(tmp_path / "flow").log_prob(x), flow.log_prob(x))


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; train a flow first"):
        load_flow(tmp_path / "flow")
    save_flow(molecule_flow(n_steps=2), tmp_path / "flow")
    (tmp_path / "flow.json").unlink()
    with pytest.raises(CheckpointError, match=r"flow\.json does not exist"):
        load_flow(tmp_path / "flow")


def test_every_kind_of_damage_is_one_line(tmp_path):
    first, second = molecule_flow(n_steps=2), molecule_flow(0.3, n_steps=2)
    save_flow(first, tmp_path / "flow")
    save_flow(second, tmp_path / "other")
    weights, words = tmp_path / "flow.safetensors", tmp_path / "flow.json"
    good_weights, good_words = weights.read_bytes(), words.read_text()
    record = json.loads(good_words)

    def expect(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as info:
            load_flow(tmp_path / "flow")
        assert "\n" not in str(info.value)
        assert str(tmp_path) in str(info.value)

    weights.write_bytes(good_weights[:-100])
    expect("altered or truncated")
    weights.write_bytes(b"")
    expect("altered or truncated")
    flipped = bytearray(good_weights)
    flipped[-7] ^= 1
    weights.write_bytes(flipped)
    expect("altered or truncated")
    weights.write_bytes((tmp_path / "other.safetensors").read_bytes())
    expect("altered or truncated")
    weights.write_bytes(good_weights)

    words.write_text(good_words[: len(good_words) // 2])
    expect("not valid JSON")
    words.write_bytes(b"\xff\xfe\x00")
    expect("not valid JSON")
    words.write_text("[1, 2]")
    expect("not of format")
    words.write_text(json.dumps(record | {"format": "somebody/else"}))
    expect("not of format")
    words.write_text((tmp_path / "other.json").read_text())
    expect("altered or truncated")
    # The words matter as much as the numbers: a coarser grid or a narrower tail is another q.
    for key, value in (("grid", [0.0, 1.0]), ("audit", {"passed": True}), ("metadata", {"a": 1})):
        words.write_text(json.dumps(record | {key: value}))
        expect("was altered")
    prior = json.loads(json.dumps(record["prior"]))
    prior["config"]["tail_share"] = 0.01
    words.write_text(json.dumps(record | {"prior": prior}))
    expect("was altered")
    for key in ("sha256", "prior", "record_sha256"):
        words.write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        expect("was altered")
    words.write_text(good_words)
    load_flow(tmp_path / "flow")


def test_flow_of_another_version(tmp_path, monkeypatch):
    flow = molecule_flow(n_steps=2)
    flow.vector_field.config = flow.vector_field.config | {"no_such_option": 3}
    save_flow(flow, tmp_path / "flow")
    with pytest.raises(CheckpointError, match="no_such_option"):
        load_flow(tmp_path / "flow")
    flow.vector_field.config = chart_field(width=32).config
    save_flow(flow, tmp_path / "flow")
    with pytest.raises(CheckpointError, match="size mismatch") as info:
        load_flow(tmp_path / "flow")
    assert "\n" not in str(info.value)


def test_tensors_round_trip_and_damage(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"x": torch.arange(5), "empty": torch.zeros(0, 3)}
    save_tensors(path, tensors, {"step": 3, "name": "é"})
    found, words = load_tensors(path)
    assert words == {"step": 3, "name": "é"}
    assert all(torch.equal(found[k], v) for k, v in tensors.items())
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_flow(molecule_flow(n_steps=2), tmp_path / "flow")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_flow(molecule_flow(0.3, n_steps=2), tmp_path / "flow")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_objects_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"'bad'.*Python objects"):
        write_npz(tmp_path / "a.npz", {"good": [1.0], "bad": np.array([{}], dtype=object)})
    assert not list(tmp_path.iterdir())
