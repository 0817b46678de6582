"""Lineage on the command line: the whole chain, and any changed byte by name."""

import subprocess
import sys

import pytest

from dinov3.release.lineage import main
from dinov3.release.record import file_sha256
from dinov3.stage import open_stage


@pytest.fixture
def chain(tmp_path):
    """Source -> image_manifest -> curated_dataset, with an event log."""
    root = tmp_path / "data"
    with open_stage("image_manifest", root / "image_manifest", config={"a": 1}) as stage:
        stage.read_root("source", "folder", "c" * 64, {"GPL-2"})
        stage.path("manifest.parquet").write_bytes(b"rows")
    with open_stage("curated_dataset", root / "curated_dataset", config={}) as stage:
        stage.read("manifest", root / "image_manifest" / "manifest.parquet")
        stage.path("curated.parquet").write_bytes(b"kept")
        stage.path("events.jsonl").write_text("{}\n")
    return root


def run(chain, target):
    return main([str(target), "--root", str(chain)])


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
    flip(path, path.read_text().index('"record":"') + 12)
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
