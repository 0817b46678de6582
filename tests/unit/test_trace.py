"""From weights, a picture or a release up to the roots, in folders and in a store."""

import json
import shutil
import subprocess
import sys

import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from dinov3.publish.build import build_release
from dinov3.release.files import format_sums
from dinov3.release.lineage import main
from dinov3.release.record import canonical_json, file_sha256
from tests import traced
from tests.released import a_request, make_chain
from tests.traced import (
    CLUSTERED,
    EVALUATED,
    EXCLUDED,
    TRAINED,
    WHOLE_CHAIN,
    WHY,
    facts,
    stages,
    titles,
)

written, base, ask = traced.written, traced.base, traced.ask  # fixtures


def test_lone_weights_are_found_by_their_bytes(base, ask, tmp_path):
    shutil.copy(
        base / "data" / "distilled_students" / "vits" / "backbone.safetensors", tmp_path / "w"
    )
    code, found = ask(tmp_path / "w")
    assert code == 0
    said = facts(found, "released as vits@0.1.0")
    assert said["match"] == "same bytes as model.safetensors"
    assert said["where"] == str(base / "data" / "releases" / "vits" / "release")
    assert stages(found) == WHOLE_CHAIN


def test_lone_weights_in_another_container_are_found_by_their_tensors(base, ask, tmp_path):
    path = tmp_path / "other.safetensors"
    weights = load_file(base / "data" / "distilled_students" / "vits" / "backbone.safetensors")
    save_file(weights, path, metadata={"made": "elsewhere"})
    code, found = ask(path)
    assert code == 0
    said = facts(found, "released as vits@0.1.0")
    assert said["match"] == "same tensors as model.safetensors, other bytes"
    assert stages(found) == WHOLE_CHAIN


def test_linked_weights_are_found(base, ask, tmp_path):
    """A cache of weights may hold links to blobs."""
    (tmp_path / "blob").mkdir()
    source = base / "data" / "distilled_students" / "vits" / "backbone.safetensors"
    shutil.copy(source, tmp_path / "blob" / "x")
    (tmp_path / "model.safetensors").symlink_to("blob/x")
    assert ask(tmp_path / "model.safetensors")[0] == 0


def test_weights_are_found_in_a_store_without_any_record_here(base, ask):
    path = base / "data" / "releases" / "vits" / "release" / "model.safetensors"
    shutil.copy(path, base / "w.safetensors")
    code, found = ask(base / "w.safetensors", root="nowhere", store=True)
    assert code == 0
    (answer,) = found["answers"]
    assert answer["title"] == "released as vits@0.1.0"
    assert answer["is_marked"]
    assert answer["facts"]["withdrawn"] == WHY
    assert len(answer["facts"]["release digest"]) == 64
    assert stages(found) > WHOLE_CHAIN


@pytest.mark.parametrize("form", ["folder", "file", "name", "digest"])
def test_release_leads_to_its_roots(base, ask, form):
    folder = base / "data" / "releases" / "vits" / "release"
    _, found = ask(folder)
    digest = facts(found, "released as vits@0.1.0")["release digest"]
    target = {
        "folder": folder,
        "file": min((folder / "records").iterdir()),
        "name": "vits@0.1.0",
        "digest": digest[:12],
    }[form]
    code, found = ask(target)
    assert code == 0
    assert "released as vits@0.1.0" in titles(found)
    assert stages(found) == WHOLE_CHAIN | {"eval_reports_vits"}
    here = {one["name"] for record in found["chain"] for one in record["outputs"] if one["is_here"]}
    assert {"backbone.safetensors", "config.json", "report.json", "images.bin"} <= here


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "evals.json", "images.bin", "release.json"]
)
def test_changed_byte_in_a_release_is_named(base, ask, name):
    folder = base / "data" / "releases" / "vits" / "release"
    flip(folder / name, -3)
    code, found = ask(folder)
    assert code == 1
    assert any(name in fault for fault in found["wrong"])


@pytest.mark.parametrize("part", ["records", "runs", "events"])
def test_changed_record_in_a_release_is_named(base, ask, part):
    folder = base / "data" / "releases" / "vits" / "release"
    path = sorted((folder / part).iterdir())[0]
    flip(path, -3)
    code, found = ask(folder)
    assert code == 1
    assert any(path.name in fault for fault in found["wrong"])


def test_weights_that_the_final_record_never_wrote_are_refused(base, ask):
    """Even where SHA256SUMS was made anew."""
    folder = base / "data" / "releases" / "vits" / "release"
    flip(folder / "model.safetensors")
    names = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
    (folder / "SHA256SUMS").write_bytes(
        format_sums({name: file_sha256(folder / name) for name in names})
    )
    code, found = ask(folder)
    assert code == 1
    assert any("never wrote it" in fault for fault in found["wrong"])


def test_file_a_release_does_not_list_is_named(base, ask):
    extra = base / "data" / "releases" / "vits" / "release" / "extra"
    extra.write_text("x")
    code, found = ask(extra)
    assert code == 1
    assert any("extra: unlisted" in fault for fault in found["wrong"])


def test_store_whose_bytes_are_not_those_of_its_digest_is_named(base, ask):
    for path in (base / "store").rglob("release.json"):
        path.chmod(0o644)
        flip(path, -3)
    code, found = ask("vits@0.1.0", root="nowhere", store=True)
    assert code == 1
    assert any("vits@0.1.0" in fault for fault in found["wrong"])


def test_store_that_is_not_there_cannot_be_checked(base, capsys):
    arguments = ["vits@0.1.0", "--root", str(base), "--store", "nowhere:at/all"]
    assert main(arguments) == 2
    assert "no kind of store" in capsys.readouterr().err


def test_lone_file_that_nothing_knows_exits_with_2(ask, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"unheard of")
    code, found = ask(tmp_path / "x.bin", store=True)
    assert code == 2
    assert "no record below" in found["unchecked"][0]


def test_lone_weights_that_are_none_are_named(ask, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"pickle")
    code, found = ask(tmp_path / "x.safetensors")
    assert code == 1
    assert "safetensors header" in found["wrong"][0]


def test_root_is_told_by_who_read_it(base, ask):
    record = json.loads((base / "data" / "image_manifest" / "record.json").read_bytes())
    code, found = ask(record["inputs"][0]["sha256"])
    assert code == 0
    assert "a root: image_manifest read it as source" in titles(found)


@pytest.mark.parametrize(
    ("digest", "role", "told"),
    [
        (TRAINED, "trained", {"kept": True, "cluster": [0, 1]}),
        (CLUSTERED, "clustered only", {"left out because": "not drawn by balanced sampling"}),
        (
            EXCLUDED,
            "excluded: exact duplicate",
            {"left out because": "exact duplicate", "duplicate of": "pictures/00.png"},
        ),
        (EVALUATED, "evaluated", {"left out because": "held out for evaluation"}),
    ],
)
def test_picture_is_told_with_its_place_and_why_it_was_left_out(ask, digest, role, told):
    code, found = ask(digest)
    assert code == 0
    assert facts(found, "a picture of curated_dataset")["role"] == role
    (curated,) = [one for one in titles(found) if one.startswith("a picture of curated_dataset: ")]
    assert told.items() <= facts(found, curated).items()
    (manifest,) = [one for one in titles(found) if one.startswith("a picture of image_manifest: ")]
    assert {"source": "folder", "licence": "GPL-2.0-or-later"}.items() <= facts(
        found, manifest
    ).items()
    assert {"curated_dataset", "image_manifest"} <= stages(found)


def test_picture_file_is_known_by_its_bytes(ask, tmp_path):
    (tmp_path / "a.png").write_bytes(b"0/0")  # the chain's pictures are the digests of such words
    code, found = ask(tmp_path / "a.png")
    assert code == 0
    assert facts(found, "a picture of curated_dataset")["role"] == "trained"


def test_picture_is_found_in_a_store_alone(ask):
    code, found = ask(TRAINED, root="nowhere", store=True)
    assert code == 0
    assert facts(found, "a picture of release vits@0.1.0")["role"] == "trained"


@pytest.mark.parametrize("name", ["images.bin", "curated.parquet"])
def test_table_that_changed_tells_nothing(base, ask, name):
    flip(base / "data" / "curated_dataset" / name, -10)
    code, found = ask(TRAINED)
    assert code == 1
    assert any(f"{name}: changed" in fault for fault in found["wrong"])


def test_without_polars_the_list_alone_answers_and_says_what_is_missing(base):
    code = (
        "import sys; sys.modules['polars'] = None; "
        "from dinov3.release.lineage import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [EXCLUDED, "--root", str(base / "data")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "role: excluded: exact duplicate" in done.stdout
    assert "Install it: pip install polars" in done.stderr


def test_table_of_another_kind_is_told_as_unreadable(base, ask):
    """A record can name any file so."""
    path = base / "data" / "curated_dataset" / "curated.parquet"
    pl.DataFrame({"path": ["x"]}).write_parquet(path)
    record = path.with_name("record.json")
    value = json.loads(record.read_bytes())
    value["outputs"][path.name] |= {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    record.write_bytes(canonical_json(value))
    code, found = ask(TRAINED)
    assert code == 1  # what was made from the record no longer finds it
    assert any("not a table of pictures" in fault for fault in found["unchecked"])


@pytest.mark.parametrize("options", [[], ["--reverse"]])
@pytest.mark.parametrize("form", ["text", "dot", "html"])
def test_every_form_names_the_release_and_that_it_is_withdrawn(base, capsys, form, options):
    arguments = ["vits@0.1.0", "--root", str(base / "data"), "--format", form, *options]
    assert main([*arguments, "--store", f"directory:{base / 'store'}"]) == 0
    shown = capsys.readouterr().out
    assert "vits@0.1.0" in shown
    assert "withdrawn" in shown.lower()
    assert shown.isascii()


def test_looking_into_folders_loads_nothing_heavy(base):
    code = (
        "import sys; from dinov3.release.lineage import main; "
        f"code = main(['vits@0.1.0', '--root', {str(base / 'data')!r}]); "
        "heavy = {'torch', 'numpy', 'polars', 'cryptography', 'pydantic'} & set(sys.modules); "
        "sys.exit(code or (f'{heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", ["text", "json", "dot", "html"])
def test_words_of_a_caption_or_label_are_shown_not_obeyed(tmp_path, capsys, form):
    word = "\x1b[2J\r\u202e</script>\"'<img src=x onerror=y>\\"
    make_chain(tmp_path / "data", word=word)
    assert main([TRAINED, "--root", str(tmp_path / "data"), "--format", form]) == 0
    shown = capsys.readouterr().out
    assert all(" " <= letter <= "~" or letter == "\n" for letter in shown)
    assert form == "dot" or "onerror" in shown
    assert form != "html" or "<img" not in shown


def test_weights_from_outside_are_said_to_be_of_unknown_data(tmp_path, capsys):
    chain = make_chain(tmp_path / "data", outside="MIT")
    assert main([str(chain.model("vits")), "--root", str(chain.root)]) == 0
    shown = capsys.readouterr().out
    assert "the chain begins here, training data unknown" in shown
    assert shown.count("training data unknown: weights from outside are above") == 2


def test_chain_of_pictures_alone_says_nothing_of_unknown_data(base, capsys):
    assert main(["vits@0.1.0", "--root", str(base / "data")]) == 0
    assert "unknown" not in capsys.readouterr().out


@pytest.fixture
def planted(base):
    """An unsigned release under a kinder name among the signed ones."""
    folder = base / "data" / "releases" / "planted" / "release"
    shutil.copytree(base / "data" / "releases" / "vits" / "release", folder)
    head = json.loads((folder / "release.json").read_bytes())
    (folder / "release.json").write_bytes(canonical_json({**head, "version": "9.9.9"}))
    (folder / "model.sig").unlink()
    (folder / "SHA256SUMS").unlink()
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    sums = format_sums({name: file_sha256(folder / name) for name in names})
    (folder / "SHA256SUMS").write_bytes(sums)
    return folder


def test_unsigned_release_is_not_shown_as_released(planted, ask):
    code, found = ask("vits@9.9.9")
    assert code == 0
    assert "released as vits@9.9.9" not in titles(found)
    said = facts(found, "unsigned, calls itself vits@9.9.9")
    assert said["signature"] == "none: anybody may have made it"


def test_signature_that_is_there_is_told_as_unchecked(base, ask):
    for store in (False, True):
        _, found = ask("vits@0.1.0", store=store)
        assert "not checked" in facts(found, "released as vits@0.1.0")["signature"]


def test_unsigned_release_is_told_among_the_users(planted, ask):
    _, found = ask(TRAINED, "--reverse")
    assert "used by unsigned release vits@9.9.9" in titles(found)
    assert "used by release vits@0.1.0" in titles(found)


@pytest.mark.parametrize("form", ["text", "dot", "html"])
def test_every_form_says_that_a_release_is_unsigned(planted, base, capsys, form):
    assert main(["vits@9.9.9", "--root", str(base / "data"), "--format", form]) == 0
    assert "unsigned" in capsys.readouterr().out


def test_list_that_is_not_public_is_told_where_no_other_tells_the_role(base, ask):
    """An image table knows the picture, and not whether it was trained on."""
    chain = make_chain(base / "private")
    build_release(a_request(chain, "vits", "0.2.0", None, ["images=digest"]))
    assert ask(TRAINED, root="private")[0] == 0
    shutil.rmtree(base / "private" / "curated_dataset")
    code, found = ask(TRAINED, root="private")
    assert code == 2
    assert any("list of pictures is" in said for said in found["unchecked"])
