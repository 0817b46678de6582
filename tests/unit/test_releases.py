"""Published releases as people read them, and the verbs that print them."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dinov3 import cli
from dinov3.cli_store import _Progress
from dinov3.errors import LineageBroken, StoreError
from dinov3.publish.differences import _setting_changes, differences
from dinov3.publish.directory_store import DirectoryStore
from dinov3.publish.private_key import PrivateKey, load_key, new_key
from dinov3.publish.releases import View, describe, listing, metrics, next_version
from dinov3.publish.store import Entry, Release
from dinov3.release.receipts import Receipt
from dinov3.release.record import Record, canonical_json, digest_of
from tests.flow.publishers import make_thin, seal
from tests.released import make_release


@dataclass(frozen=True)
class Shelf:
    """Two published releases of one model, and what the command line needs to reach them."""

    store: DirectoryStore
    log: Path
    folders: tuple[Path, Path]
    key: PrivateKey

    @property
    def options(self) -> list[str]:
        return ["--store", f"directory:{self.store.root}", "--log", str(self.log)]

    def view(self, number: int) -> View:
        return View(self.store, self.store.entries()[number])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("made")
    new_key("demo", folder / "keys", None)
    key = load_key("demo", folder / "keys")
    first = make_release(folder / "one", key=key)
    second = make_release(folder / "two", key=key, version="0.1.1", seed=1, accuracy=0.8)
    shelf = Shelf(DirectoryStore(folder / "store"), folder / "log", (first, second), key)
    for one in shelf.folders:
        shelf.store.publish(one, log=shelf.log, key=key)
    (shelf.log / "keys").mkdir()
    (shelf.log / "keys" / "demo.pub").write_bytes(key.public)
    return shelf


@pytest.fixture
def shelf(made: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A copy that a test may change."""
    monkeypatch.setenv("DINOV3_KEYS", str(made.key.path.parent))
    shutil.copytree(made.store.root, tmp_path / "store")
    shutil.copytree(made.log, tmp_path / "log")
    return replace(made, store=DirectoryStore(tmp_path / "store"), log=tmp_path / "log")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a verb: exit status, output, errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.run([*arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def thin_view(tmp_path: Path, folder: Path) -> View:
    """A release of the test's own making, published without being verified."""
    new_key("thin", tmp_path / "keys", None)
    store = DirectoryStore(tmp_path / "thin store")
    key = load_key("thin", tmp_path / "keys")
    return View(store, store.publish(folder, log=tmp_path / "thin log", key=key))


def test_a_view_reads_what_was_released(shelf: Shelf):
    view = shelf.view(0)
    assert view.read("README.md") == (shelf.folders[0] / "README.md").read_bytes()
    assert view.head().name == "vits@0.1.0"
    assert [record.stage for _, record in view.records().values()] == list(view.records())
    assert view.digests.keys() == view.hashes.keys() | {"SHA256SUMS", "model.sig"}


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.sig"])
def test_a_view_of_changed_lists_is_refused(shelf: Shelf, name: str):
    entry = shelf.store.entries()[0]
    path = shelf.store.root / "objects" / entry.digest / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(LineageBroken, match=r"SHA256SUMS.* line|was changed"):
        View(shelf.store, entry)


@pytest.mark.parametrize("name", ["README.md", "release.json", "evals.json", "images.bin"])
def test_a_file_that_changed_in_the_store_is_not_shown(shelf: Shelf, name: str):
    entry = shelf.store.entries()[0]
    path = shelf.store.root / "objects" / entry.digest / name
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(LineageBroken, match=f"{name}: its sha256 is"):
        [*describe(shelf.view(0), None), *differences(shelf.view(0), shelf.view(1))]


def test_a_view_of_an_unsigned_release_has_no_signature(tmp_path: Path):
    view = thin_view(tmp_path, make_thin(tmp_path / "release"))
    assert view.signature is None
    with pytest.raises(StoreError, match=r"has no file 'evals\.json'"):
        view.json("evals.json")


def test_a_release_of_malformed_files_is_refused_not_guessed_at(tmp_path: Path):
    view = thin_view(tmp_path, make_thin(tmp_path / "release"))
    with pytest.raises(LineageBroken, match=r"release\.json"):
        list(describe(view, None))


def test_metrics_take_what_is_malformed_for_nothing(tmp_path: Path):
    folder = make_thin(tmp_path / "release")
    (folder / "evals.json").write_text('{"rows":[1,{"subject":"model","value":"x"}]}')
    assert metrics(thin_view(tmp_path, seal(folder))) == {"None None": "none [none, none]"}


def test_releases_are_listed_by_model_and_version_with_their_withdrawals():
    entry = Entry("vits", "0.10.0", "a" * 64, None, "a", "m")
    early = replace(entry, version="0.9.0", withdrawn="bad \x1b[2J\n")
    other = replace(entry, model="convnext")
    lines = list(listing([entry, early, other]))
    assert [line.split()[0] for line in lines] == ["convnext@0.10.0", "vits@0.9.0", "vits@0.10.0"]
    assert lines[1].endswith(r"withdrawn: bad \x1b[2J\n")


def test_the_next_version_follows_the_highest_of_store_and_log():
    entry = Entry("vits", "0.9.0", "a" * 64, None, "a", "m")
    entries = [entry, replace(entry, version="0.10.4"), replace(entry, model="x", version="3.0.0")]
    assert next_version("vits", entries) == "0.10.5"
    receipt = Receipt("publish", "vits", "1.2.3", "b" * 64)
    assert next_version("vits", entries, [receipt]) == "1.2.4"
    assert next_version("convnext", entries, [receipt]) == "0.1.0"


def test_a_release_keeps_its_version_where_that_is_free_or_its_own():
    entry = Entry("vits", "0.1.0", "a" * 64, None, "a", "m")
    same = Release("vits", "0.1.0", "a" * 64, {})
    other = replace(same, digest="b" * 64)
    receipt = Receipt("publish", "vits", "0.1.0", "a" * 64)
    assert next_version("vits", [entry], [receipt], release=same) == "0.1.0"
    assert next_version("vits", [entry], release=other) == "0.1.1"
    assert next_version("vits", [], [receipt], release=other) == "0.1.1"
    assert next_version("vits", [], release=replace(other, version="2.0.0")) == "2.0.0"


def test_what_changed_between_two_releases_is_told(shelf: Shelf):
    lines = list(differences(shelf.view(0), shelf.view(1)))
    assert lines[0] == "vits@0.1.0 -> vits@0.1.1"
    assert "  ~ k-NN k=20 top-1: 0.750 [0.650, 0.850] -> 0.800 [0.700, 0.900]" in lines
    assert "  trained: +8 -8" in lines
    assert "config: unchanged" in lines
    assert any(line.startswith("  ~ model.safetensors: ") for line in lines)
    assert any(line.startswith("  ~ curated_dataset: ") for line in lines)


def test_nothing_changed_between_a_release_and_itself(shelf: Shelf):
    lines = list(differences(shelf.view(0), shelf.view(0)))
    assert all(line.endswith(": unchanged") for line in lines[1:])


def test_a_setting_that_changed_is_told_by_its_whole_name(shelf: Shelf, tmp_path: Path):
    folder = shutil.copytree(shelf.folders[0], tmp_path / "release")
    head = json.loads((folder / "release.json").read_bytes())
    stage, digest = head["records"][-1]
    record = json.loads((folder / f"records/{stage}-{digest[:12]}.json").read_bytes())
    record["config"]["knn"]["temperature"] = 0.5
    data = canonical_json({**record, "config_digest": digest_of(record["config"])})
    digest = hashlib.sha256(data).hexdigest()
    (folder / f"records/{stage}-{digest[:12]}.json").write_bytes(data)
    head["records"][-1] = [stage, digest]
    (folder / "release.json").write_bytes(canonical_json({**head, "version": "0.1.2"}))
    (folder / "model.sig").unlink()
    shelf.store.publish(seal(folder), log=shelf.log, key=shelf.key)
    lines = list(differences(shelf.view(0), shelf.view(2)))
    assert "  ~ eval_reports_vits knn.temperature: 0.07 -> 0.5" in lines
    assert (
        f"  ~ eval_reports_vits: {shelf.view(0).head().evaluation[:12]} -> {digest[:12]}" in lines
    )


def test_another_licence_and_images_left_out_are_told(shelf: Shelf, tmp_path: Path):
    settings = ["policy.licence=CC0-1.0", "images=digest"]
    other = make_release(
        tmp_path, key=shelf.key, version="0.1.2", licence="CC0-1.0", overrides=settings
    )
    shelf.store.publish(other, log=shelf.log, key=shelf.key)
    lines = list(differences(shelf.view(0), shelf.view(2)))
    assert "  ~ curated_dataset: GPL-2.0-or-later -> CC0-1.0" in lines
    assert "  ~ licence: GPL-2.0-or-later -> CC0-1.0" in lines
    assert "  only one of the two has a table of images" in lines


def test_the_verbs_tell_what_is_published(
    shelf: Shelf, run: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    store = shelf.options[:2]
    status, output, _ = run("releases", "list", *store)
    assert (status, len(output.splitlines())) == (0, 2)
    status, output, _ = run("releases", "show", "vits@0.1.0", *shelf.options)
    assert status == 0
    assert "distilled_students_vits" in output
    assert "k-NN k=20 top-1  0.750 [0.650, 0.850]" in output
    assert f"Signer: {shelf.key.fingerprint}" in output
    assert f"Receipt: in the log, signed by {shelf.key.fingerprint}" in output
    assert run("releases", "next", "vits", *shelf.options)[1] == "0.1.2\n"
    own = ["--for", str(shelf.folders[0])]
    assert run("releases", "next", "vits", *own, *shelf.options)[1] == "0.1.0\n"
    nowhere = ["--store", f"directory:{tmp_path / 'none'}", "--log", str(tmp_path / "none")]
    assert run("releases", "next", "vits", *nowhere)[1] == "0.1.0\n"
    assert run("releases", "next", "convnext", *own, *nowhere)[0] == 2
    status, output, _ = run("releases", "diff", "vits@0.1.0", "vits@0.1.1", *store)
    assert (status, output.splitlines()[0]) == (0, "vits@0.1.0 -> vits@0.1.1")
    assert run("releases", "audit", *shelf.options)[0] == 0
    assert run("releases", "prune", *store)[1] == "0 removed\n"
    (shelf.store.root / "index" / "000002.json").unlink()
    status, output, _ = run("releases", "audit", *shelf.options)
    assert status == 1
    assert "vits@0.1.1: a receipt names it, the store does not" in output


def test_publish_prints_one_line_and_says_where_it_made_a_store(
    shelf: Shelf, run: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    store = f"directory:{tmp_path / 'typo'}"
    options = ["--key", "demo", "--store", store, "--log", str(shelf.log)]
    status, output, errors = run("publish", str(shelf.folders[0]), *options)
    digest = shelf.store.entries()[0].digest
    assert (status, output) == (0, f"vits@0.1.0 {digest}\n")
    assert errors == f"made a new store at {store}\n"
    assert run("publish", str(shelf.folders[0]), *options) == (0, output, "")


def test_a_refused_release_makes_no_store_and_says_nothing_of_one(
    shelf: Shelf, run: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    options = ["--key", "demo", "--store", f"directory:{tmp_path / 'new'}", "--log", str(shelf.log)]
    broken = shutil.copytree(shelf.folders[0], tmp_path / "release")
    (broken / "README.md").write_text("another card")
    status, _, errors = run("publish", str(broken), *options)
    assert status != 0
    assert "new store" not in errors
    assert not (tmp_path / "new").exists()


def test_bytes_are_counted_only_once_it_takes_a_while(capsys: pytest.CaptureFixture[str]):
    now = [0.0]
    with _Progress(lambda: now[0]) as progress:
        for seconds in (0.1, 1.9):
            now[0] = seconds
            progress.add(4_000_000)
        assert capsys.readouterr().err == ""
        for seconds in (2.0, 2.1, 11.9, 12.0):
            now[0] = seconds
            progress.add(4_000_000)
    assert capsys.readouterr().err == "12 MB\n24 MB\n"


def test_many_settings_of_a_stage_are_told_as_one_line_unless_all_are_asked_for(shelf: Shelf):
    def chain(num: int) -> dict[str, tuple[str, Record]]:
        (stage, (digest, record)) = next(iter(shelf.view(0).records().items()))
        settings = {f"s{place}": num for place in range(num)}
        return {stage: (digest, replace(record, config=settings))}

    (stage,) = chain(1)
    few = list(_setting_changes((chain(9), chain(11)), 20))
    assert len(few) == 11
    assert few[0] == f"~ {stage} s0: 9 -> 11"
    (line,) = _setting_changes((chain(10), chain(24)), 20)
    assert line == (f"~ {stage}: 24 settings: 10 changed, 14 added, 0 removed; --all lists them")
    assert len(list(_setting_changes((chain(10), chain(24)), None))) == 24
    (gone,) = _setting_changes((chain(24), {}), 20)
    assert gone == f"~ {stage}: 24 settings: 0 changed, 0 added, 24 removed; --all lists them"


def test_diff_takes_all(shelf: Shelf, run: Callable[..., tuple[int, str, str]]):
    names = ("vits@0.1.0", "vits@0.1.1")
    short = run("releases", "diff", *names, *shelf.options[:2])
    assert run("releases", "diff", *names, "--all", *shelf.options[:2]) == short


def test_get_says_whether_the_signer_was_checked(
    shelf: Shelf, run: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    first = run("releases", "get", "vits@0.1.0", str(tmp_path / "one"), *shelf.options)
    assert first[0] == 0
    assert f"signed by {shelf.key.fingerprint}" in first[1]
    unknown = ["--store", shelf.options[1], "--log", str(tmp_path / "no log")]
    second = run("releases", "get", "vits@0.1.0", str(tmp_path / "two"), *unknown)
    assert second[0] == 2
    assert "the signer was not checked" in second[2]
    named = [*unknown, "--key", "demo"]
    assert run("releases", "get", "vits@0.1.0", str(tmp_path / "three"), *named)[0] == 0


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_bytes(b"garbage")])
def test_a_key_of_the_log_that_cannot_be_read_is_one_sentence(
    shelf: Shelf,
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    make: Callable[[Path], object],
):
    (shelf.log / "receipts.jsonl").unlink()
    make(shelf.log / "keys" / "a.pub")
    for verb in (["show", "vits@0.1.0"], ["get", "vits@0.1.0", str(tmp_path / "out")]):
        status, _, errors = run("releases", *verb, *shelf.options)
        assert (status, len(errors.splitlines())) == (2, 1)
        assert re.search(r"a\.pub: cannot be read: Is a directory|not a public key in PEM", errors)
        assert ".partial" not in errors
        assert ".." not in errors


def test_a_withdrawn_release_says_so_wherever_it_is_shown(
    shelf: Shelf, run: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    why = ["--reason", "wrong licence", "--key", "demo"]
    assert run("releases", "withdraw", "vits@0.1.0", *why, *shelf.options)[0] == 0
    assert "withdrawn: wrong licence" in run("releases", "list", *shelf.options[:2])[1]
    shown = run("releases", "show", "vits@0.1.0", *shelf.options)[1]
    assert "WITHDRAWN: wrong licence" in shown
    status, _, errors = run("releases", "get", "vits@0.1.0", str(tmp_path / "x"), *shelf.options)
    assert status == 2
    assert "wrong licence" in errors
    forced = ["releases", "get", "vits@0.1.0", str(tmp_path / "x"), "--withdrawn", *shelf.options]
    assert run(*forced)[0] == 0
