"""Lineage on the command line: the whole chain, and any changed byte by name."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest

from dinov3.release.lineage import main
from dinov3.release.record import canonical_json, file_sha256
from dinov3.stage import open_stage


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Source -> image_manifest -> curated_dataset, with an event log."""
    root = tmp_path_factory.mktemp("written") / "data"
    with open_stage("image_manifest", root / "image_manifest", config={"a": 1}) as stage:
        stage.read_root("source", "folder", "c" * 64, {"GPL-2"})
        stage.path("manifest.parquet").write_bytes(b"rows")
    with open_stage("curated_dataset", root / "curated_dataset", config={}) as stage:
        stage.read("manifest", root / "image_manifest" / "manifest.parquet")
        stage.path("curated.parquet").write_bytes(b"kept")
        stage.path("events.jsonl").write_text("{}\n")
    return root


@pytest.fixture
def chain(written, tmp_path):
    """The written chain, to be tampered with."""
    return shutil.copytree(written, tmp_path / "data")


def run(chain, target, *options):
    return main([str(target), "--root", str(chain), *options])


def forge(folder, **changes):
    """Changes fields of a record, and has `run.json` beside it name the changed record."""
    path = folder / "record.json"
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), **changes}))
    rewrite_run(folder, record=file_sha256(path))


def rewrite_run(folder, **changes):
    path = folder / "run.json"
    path.write_bytes(canonical_json({**json.loads(path.read_bytes()), **changes}))


def retell(root):
    """Has the child name its parent's record as it is now."""
    parent = file_sha256(root / "image_manifest" / "record.json")
    (edge,) = json.loads((root / "curated_dataset" / "record.json").read_bytes())["inputs"]
    forge(root / "curated_dataset", inputs=[{**edge, "record": parent}])


def named(name, path):
    """The entry of `outputs` that truly describes a file."""
    return {
        name: {"sha256": file_sha256(path), "bytes": path.stat().st_size, "tensors": None},
    }


def test_chain_is_printed_to_the_roots(chain, capsys):
    assert run(chain, chain / "curated_dataset") == 0
    shown = capsys.readouterr().out
    assert shown.index("curated_dataset") < shown.index("image_manifest")
    assert "the chain begins here" in shown
    assert "GPL-2" in shown


def test_a_file_its_digest_and_the_record_digest_lead_to_the_same_record(chain, capsys):
    path = chain / "curated_dataset" / "curated.parquet"
    shown = set()
    for target in (path, file_sha256(path), file_sha256(path.parent / "record.json")[:12]):
        assert run(chain, target) == 0
        shown.add(capsys.readouterr().out)
    assert len(shown) == 1


@pytest.mark.parametrize("place", [0, -3])
@pytest.mark.parametrize(
    "name",
    [
        "image_manifest/manifest.parquet",
        "image_manifest/record.json",
        "curated_dataset/curated.parquet",
        "curated_dataset/record.json",
        "curated_dataset/events.jsonl",
    ],
)
def test_one_changed_byte_of_any_artifact_is_named(chain, capsys, name, place):
    flip(chain / name, place)
    assert run(chain, chain / "curated_dataset" / "curated.parquet") == 1
    assert name in capsys.readouterr().err


def test_run_of_another_record_is_named(chain, capsys):
    """`run.json` speaks of itself alone, so only what it says of others can be checked."""
    path = chain / "curated_dataset" / "run.json"
    value = json.loads(path.read_text())
    value["record"] = value["record"][::-1]
    path.write_bytes(canonical_json(value))
    assert run(chain, chain / "curated_dataset") == 1
    assert "curated_dataset/record.json: changed" in capsys.readouterr().err


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def test_record_with_kinder_claims_over_the_same_bytes_is_caught(chain, capsys):
    """The edge names the upstream record, not only the artifact."""
    with open_stage("image_manifest", chain / "image_manifest", config={"a": 2}) as stage:
        stage.read_root("source", "folder", "c" * 64, {"MIT"})
        stage.path("manifest.parquet").write_bytes(b"rows")
    assert run(chain, chain / "curated_dataset") == 1
    assert "made from another record" in capsys.readouterr().err


def test_removed_ancestor_cuts_the_chain(chain, capsys):
    (chain / "image_manifest" / "record.json").unlink()
    assert run(chain, chain / "curated_dataset") == 1
    assert "is not there" in capsys.readouterr().err


def test_bytes_that_are_not_here_are_shown_as_unchecked(chain, capsys):
    (chain / "image_manifest" / "manifest.parquet").unlink()
    assert run(chain, chain / "curated_dataset") == 0
    assert "not here, not checked" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["no/such/path", "deadbeef00"])
def test_unknown_target_exits_with_2(chain, capsys, target):
    assert run(chain, target) == 2
    assert "no record" in capsys.readouterr().err


def test_control_characters_of_a_field_are_escaped(tmp_path, capsys):
    with open_stage("bad\x1b[31m", tmp_path / "s", config={}) as stage:
        stage.path("x").write_text("x")
    assert main([str(tmp_path / "s"), "--root", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_lineage_loads_neither_torch_nor_an_orchestrator(chain):
    code = (
        "import sys; from dinov3.__main__ import main; "
        f"root = {str(chain)!r}; "
        "sys.argv[1:] = ['lineage', root + '/curated_dataset', '--root', root]; "
        "code = main(); "
        "heavy = {'torch', 'numpy', 'polars', 'pydantic', 'typer', 'dagster'} & set(sys.modules); "
        "sys.exit(code or (f'{heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("hidden", [".state/image_manifest/finished", "seen/.cache/x"])
def test_copy_of_a_record_in_a_hidden_folder_does_not_vouch(chain, capsys, hidden):
    shutil.copytree(chain / "image_manifest", chain / hidden)
    forge(chain / "image_manifest", licences={"in": ["MIT"], "out": ["MIT"]})
    assert run(chain, chain / "curated_dataset") == 1
    assert "image_manifest/record.json: changed" in capsys.readouterr().err


def test_root_may_itself_be_hidden(chain):
    root = chain.rename(chain.with_name(".data"))
    assert run(root, root / "curated_dataset") == 0


def test_bare_copy_of_a_record_does_not_stand_in_for_the_changed_one(chain, capsys):
    (chain / "backup").mkdir()
    shutil.copy(chain / "image_manifest" / "record.json", chain / "backup")
    (chain / "image_manifest" / "manifest.parquet").write_bytes(b"more rows")
    path = chain / "image_manifest" / "manifest.parquet"
    forge(chain / "image_manifest", outputs=named("manifest.parquet", path))
    assert run(chain, chain / "curated_dataset") == 1
    assert "image_manifest/record.json: changed" in capsys.readouterr().err


@pytest.mark.parametrize("tampered", ["image_manifest", "copy"])
def test_every_folder_that_holds_the_record_is_checked(chain, capsys, tampered):
    shutil.copytree(chain / "image_manifest", chain / "copy")
    assert run(chain, chain / "curated_dataset") == 0
    flip(chain / tampered / "manifest.parquet", 0)
    assert run(chain, chain / "curated_dataset") == 1
    assert f"{tampered}/manifest.parquet: changed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["record.json", "run.json", "curated.parquet", "events.jsonl"])
def test_pipe_is_never_opened(chain, capsys, name):
    path = chain / "curated_dataset" / name
    path.unlink()
    os.mkfifo(path)
    assert run(chain, chain / "curated_dataset") == 1
    assert f"{name}: not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["record.json", "run.json", "curated.parquet"])
def test_folder_in_place_of_a_file_is_named(chain, capsys, name):
    path = chain / "curated_dataset" / name
    path.unlink()
    path.mkdir()
    assert run(chain, chain / "curated_dataset") == 1
    assert f"{name}: not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["record.json", "run.json", "curated.parquet"])
def test_link_to_the_same_bytes_elsewhere_is_named(chain, tmp_path, capsys, name):
    path = chain / "curated_dataset" / name
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name)
    assert run(chain, chain / "curated_dataset") == 1
    assert f"{name}: a symbolic link that leaves the folder" in capsys.readouterr().err


def test_loop_of_links_is_named(chain, capsys):
    path = chain / "curated_dataset" / "curated.parquet"
    path.unlink()
    path.symlink_to(path)
    assert run(chain, chain / "curated_dataset" / "record.json") == 1
    assert "curated.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ABSOLUTE", "../secret", "a/../../secret", "", ".", "a\0b"])
def test_output_outside_the_folder_is_never_hashed(chain, tmp_path, capsys, name):
    secret = chain / "secret"
    secret.write_text("secret")
    output = named(name.replace("ABSOLUTE", str(secret)), secret)
    forge(chain / "curated_dataset", outputs=output)
    assert run(chain, chain / "curated_dataset") == 1
    said = capsys.readouterr().err
    assert "leaves the folder" in said
    assert "changed" not in said


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret"])
def test_file_beside_a_record_lies_in_its_folder(chain, capsys, name):
    run_json = chain / "curated_dataset" / "run.json"
    value = {**json.loads(run_json.read_bytes()), "beside": {name: "a" * 64}}
    run_json.write_text(json.dumps(value))
    assert run(chain, chain / "curated_dataset") == 1
    said = capsys.readouterr().err
    assert "leaves the folder" in said
    assert "changed" not in said


def test_config_that_its_digest_does_not_name_is_caught(chain, capsys):
    forge(chain / "curated_dataset", config={"seed": 1})
    assert run(chain, chain / "curated_dataset") == 1
    assert "config_digest is not the digest of its config" in capsys.readouterr().err


def test_size_that_is_not_the_files_is_caught(chain, capsys):
    output = named("curated.parquet", chain / "curated_dataset" / "curated.parquet")
    output["curated.parquet"]["bytes"] = 3
    forge(chain / "curated_dataset", outputs=output)
    assert run(chain, chain / "curated_dataset") == 1
    assert "has 4 bytes, the record says 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (None, "no tensor digest of w.safetensors"),
        ("a" * 64, "tensor digest does not belong to these bytes"),
    ],
)
def test_weights_need_their_own_tensor_digest(chain, capsys, tensors, said):
    path = chain / "curated_dataset" / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    output = named(path.name, path)
    output[path.name]["tensors"] = tensors
    forge(chain / "curated_dataset", outputs=output)
    assert run(chain, chain / "curated_dataset") == 1
    assert said in capsys.readouterr().err


def test_recorded_weights_that_are_no_safetensors_are_named(chain, capsys):
    path = chain / "curated_dataset" / "w.safetensors"
    path.write_bytes(b"pickle")
    output = named(path.name, path)
    output[path.name]["tensors"] = "a" * 64
    forge(chain / "curated_dataset", outputs=output)
    assert run(chain, chain / "curated_dataset") == 1
    assert "w.safetensors: safetensors header" in capsys.readouterr().err


def test_licence_of_an_input_cannot_be_dropped(chain, capsys):
    forge(chain / "curated_dataset", licences={"in": [], "out": []})
    assert run(chain, chain / "curated_dataset") == 1
    assert "drops licences of its input manifest.parquet: GPL-2" in capsys.readouterr().err


def test_outputs_carry_every_licence_of_the_inputs(chain, capsys):
    forge(chain / "curated_dataset", licences={"in": ["GPL-2"], "out": ["MIT"]})
    assert run(chain, chain / "curated_dataset") == 1
    assert "drop licences of its inputs: GPL-2" in capsys.readouterr().err


def test_licence_added_on_the_way_holds(chain):
    forge(chain / "curated_dataset", licences={"in": ["GPL-2"], "out": ["GPL-2", "MIT"]})
    assert run(chain, chain / "curated_dataset") == 0


def test_forged_parent_with_a_retold_edge_shows_its_own_fault(chain, capsys):
    forge(chain / "image_manifest", config={"a": 2})
    retell(chain)
    assert run(chain, chain / "curated_dataset") == 1
    assert "image_manifest/record.json: config_digest" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["extra.parquet", "tensorboard/extra"])
def test_file_no_record_names_is_not_vouched_for(chain, capsys, name):
    path = chain / "curated_dataset" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert run(chain, path) == 1
    assert f"{name}: unrecorded" in capsys.readouterr().err
    assert run(chain, path.parents[name.count("/")]) == 0


@pytest.mark.parametrize(
    "name", ["curated.parquet", "events.jsonl", "record.json", "run.json", "../curated_dataset"]
)
def test_every_recorded_file_is_vouched_for(chain, name):
    assert run(chain, chain / "curated_dataset" / name) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"beside": []},
        {"beside": None},
        {"record": None},
        {"record": {}},
        {"beside": {"events.jsonl": 3}},
        {"beside": {"\ud800": "a" * 64}},
    ],
)
def test_malformed_run_is_named(chain, capsys, changes):
    path = chain / "curated_dataset" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    assert run(chain, chain / "curated_dataset") == 1
    assert "lineage: " in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"[]", b"{}", b"9" * 10_000, b"[" * 100_000, b"\xff", b""])
@pytest.mark.parametrize("name", ["record.json", "run.json"])
def test_anything_in_place_of_a_record_is_named(chain, capsys, name, data):
    (chain / "curated_dataset" / name).write_bytes(data)
    assert run(chain, chain / "curated_dataset") == 1
    assert f"curated_dataset/{name}: " in capsys.readouterr().err


def test_unreadable_record_outside_the_root_is_named(chain, tmp_path, capsys):
    (tmp_path / "record.json").write_bytes(b"{")
    assert run(chain, tmp_path) == 1
    assert "record.json: not readable as JSON" in capsys.readouterr().err


def test_record_outside_the_root_is_checked_against_the_root(chain, tmp_path, capsys):
    moved = (chain / "curated_dataset").rename(tmp_path / "released")
    assert run(chain, moved) == 0
    assert "image_manifest" in capsys.readouterr().out
    flip(moved / "curated.parquet", 0)
    assert run(chain, moved) == 1


@pytest.mark.parametrize("options", [[], ["--reverse"]])
@pytest.mark.parametrize("form", ["text", "json", "dot", "html"])
def test_control_characters_never_reach_the_terminal(chain, capsys, form, options):
    evil = "\x1b[2J\r\n\u202e\"];<img src=x onerror='y'>&\\"
    folder = chain / evil.strip()
    folder.mkdir()
    (folder / "record.json").write_text(f"{{{evil}")
    digest = hashlib.sha256(b"").hexdigest()
    forge(
        chain / "curated_dataset",
        stage=evil,
        inputs=[{"role": evil, "name": evil, "sha256": digest, "record": digest}],
        outputs={evil: {"sha256": digest, "bytes": 0, "tensors": None}},
        licences={"in": [evil], "out": [evil]},
    )
    (chain / "curated_dataset" / evil).write_text("other")
    assert run(chain, chain / "curated_dataset", "--format", form, *options) == 1
    shown = "".join(capsys.readouterr())
    assert shown.isascii()
    assert all(letter.isprintable() or letter == "\n" for letter in shown)
    assert "\\x1b[2J" in shown
    assert form != "html" or "<img" not in shown.partition("</html>")[0]
