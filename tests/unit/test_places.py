"""Where a release may be written: over no artifact, log or folder of another."""

import shutil
from pathlib import Path

import pytest

from dinov3.errors import ConfigError, ReleaseRefused
from dinov3.publish.places import refuse_occupied, refuse_traces
from dinov3.release.index import collect
from tests.released import make_chain, make_release


@pytest.fixture
def chain(tmp_path):
    return make_chain(tmp_path / "data")


def judge(chain, output, stage="release_vits"):
    """What the builder asks of an output."""
    nodes = [node for copies in collect(chain.root)[0].values() for node in copies]
    refuse_occupied(output, stage, artifacts=chain.root, log=chain.log, nodes=nodes)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("curated_dataset", "overlaps the artifacts of curated_dataset"),
        ("distilled_students/vits", "overlaps the artifacts of distilled_students_vits"),
        ("distilled_students/vits/deep/er", "overlaps the artifacts of distilled_students_vits"),
        ("distilled_students", "overlaps the artifacts of distilled_students_vits"),
        (".", "holds all artifacts"),
        ("..", "holds all artifacts"),
        ("release_log", "overlaps the log of releases"),
        ("release_log/vits", "overlaps the log of releases"),
        ("link", "overlaps the artifacts of image_manifest"),
        ("link/deeper", "overlaps the artifacts of image_manifest"),
    ],
)
def test_what_the_release_is_made_of_is_no_place_for_it(chain, output, why):
    (chain.root / "link").symlink_to(chain.folder("image_manifest"))
    with pytest.raises(ConfigError, match=f"output: {why}.*Choose a folder of its own"):
        judge(chain, chain.root / output)


@pytest.mark.parametrize("output", ["releases/vits", "curated_dataset_2", "new/and/deep"])
def test_folder_of_its_own_is_taken_below_the_artifacts_and_elsewhere(chain, tmp_path, output):
    for above in (chain.root, tmp_path / "elsewhere"):
        judge(chain, above / output)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("record.json", "holds a record that cannot be read"),
        ("run.json", "holds run.json, which no release left there"),
        ("release/notes.txt", "holds release, which no release left there"),
    ],
)
def test_folder_that_somebody_wrote_into_is_refused(chain, tmp_path, name, why):
    theirs = tmp_path / "elsewhere" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("{}")
    with pytest.raises(ConfigError, match=why):
        judge(chain, tmp_path / "elsewhere")


def test_artifact_that_lies_elsewhere_is_refused(chain, tmp_path):
    copy = shutil.copytree(chain.folder("curated_dataset"), tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="output: is that of curated_dataset"):
        judge(chain, copy)


def test_release_makes_way_for_the_next_of_its_model_alone(chain, tmp_path):
    folder = make_release(tmp_path, chain=chain).parent
    judge(chain, folder)
    with pytest.raises(ConfigError, match="overlaps the artifacts of release_vits"):
        judge(chain, folder, "release_pretrained")
    (folder / "record.json").unlink()  # as a run that was killed in its last moment leaves it
    judge(chain, folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"source":"folder:/srv/data/pictures"}',
        '{"source":"folder:/srv/data"}',
        '{"log":"saved to /srv/data, at last"}',
        r'{"diff":"+path\n/srv/data/x"}',
        '{"url":"file:///srv/data/x"}',
    ],
)
def test_folder_of_this_machine_is_found_whole_or_with_what_is_in_it(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(ReleaseRefused, match=r"record\.json: names a folder .* got /srv/data\."):
        refuse_traces(tmp_path, [Path("/srv/data")])


@pytest.mark.parametrize(
    "text",
    ["my/srv/data/x", "/srv/database/x", "/srv/data.old", "../srv/data/x", "srv/data", "/srv/dat"],
)
def test_another_folder_whose_name_is_alike_is_none_of_this_machine(tmp_path, text):
    (tmp_path / "record.json").write_text(f'{{"source":"{text}"}}')
    refuse_traces(tmp_path, [Path("/srv/data"), Path("/")])
