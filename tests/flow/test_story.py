"""The newcomer's story: a folder of pictures through the real pipeline, by dvc and by Dagster.

A copy of this checkout runs its own `dvc.yaml` with the smallest recipe.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
import yaml
from PIL import Image

from dinov3.release.record import read_record
from orchestration.stages import CHECKOUT, checkout_pipeline
from tests.flow.conftest import draw_pictures

STAGES = (
    "image_manifest",
    "image_embeddings",
    "curated_dataset",
    "pretrained_checkpoint",
    "eval_reports/pretrained",
)
LAST = "eval_reports@pretrained"  # the thread that most tests follow
_LOG = "data/release_log/"
_MADE_HERE = (  # by `make demo` in this checkout, or by its owner
    "dvc.lock",
    *(f"{_LOG}{name}" for name in ("attempts.jsonl", "keys/", "receipts.jsonl", "revoked.json")),
)
_WHO = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")


class Checkout:
    """A copy of the checkout as it came, with environments, pictures and the smallest recipe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        listed = ("ls-files", "--cached", "--others", "--exclude-standard", "-z")
        names = subprocess.run(
            ["git", *listed], cwd=CHECKOUT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        for name in filter(None, names):
            if (CHECKOUT / name).is_file() and not name.startswith(_MADE_HERE):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(CHECKOUT / name, root / name)
        for name in (".venv", ".venv-dvc"):
            (root / name).symlink_to(CHECKOUT / name)
        draw_pictures(root / "pictures", num_per_class=8)
        params = yaml.safe_load((root / "params.yaml").read_text())
        params |= {"recipe": "smoke_cpu", "source": "folder:pictures"}
        params["release"] |= {"key": "demo", "version": "0.1.0"}
        params["overrides"]["manifest"] = "licence=CC0-1.0"
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        for command in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "A copy.")):
            subprocess.run(("git", *_WHO, *command), cwd=root, check=True)
        self.keys = root.with_name(f"{root.name}-keys")
        log = ("--log", "data/release_log")
        self.run(sys.executable, "-m", "dinov3", "keys", "new", "demo", "--no-passphrase", *log)

    def start(self, *command: str | Path) -> subprocess.Popen:
        """Starts a command in the copy, in a session of its own."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DAGSTER_HOME": str(self.root / ".dagster")}
        env["DINOV3_KEYS"] = str(self.keys)
        env["PATH"] = f"{CHECKOUT / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.root,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str | Path) -> str:
        """Runs a command that must succeed; returns what it printed."""
        process = self.start(*command)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    def dvc(self, *arguments: str) -> str:
        """The checkout's own dvc."""
        return self.run(self.root / "tools" / "dvc", *arguments)

    def repro(self, *targets: str) -> str:
        """`dvc repro` of the thread that most tests follow."""
        return self.dvc("repro", *(targets or (LAST,)))

    def dagster(self, selection: str = "*eval_reports_pretrained") -> tuple[str | Path, ...]:
        """The command that materializes the same thread."""
        (self.root / ".dagster").mkdir(exist_ok=True)
        shutil.copy2(self.root / "orchestration" / "dagster.yaml", self.root / ".dagster")
        dagster = Path(sys.executable).parent / "dagster"
        chosen = ("--select", selection, "-m", "orchestration.definitions")
        return (dagster, "asset", "materialize", *chosen)

    def outputs(self) -> dict[str, str]:
        """Digest of every file that a record names."""
        found = {}
        for stage in STAGES:
            folder = self.root / "data" / stage
            for name, output in read_record(folder / "record.json").outputs.items():
                found[f"{stage}/{name}"] = output.sha256
        return found

    def ran(self, said: str) -> set[str]:
        """The stages that dvc says it ran."""
        return {stage for stage in STAGES if f"Running stage '{dvc_name(stage)}'" in said}

    def settle(self, pretrain: str = "") -> dict[str, str]:
        """All made by dvc, with these overrides of training; returns the digests."""
        self.override(pretrain)
        self.repro()
        return self.outputs()

    def override(self, pretrain: str) -> None:
        """Sets what is laid over the training recipe."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params["overrides"]["pretrain"] = pretrain
        path.write_text(yaml.safe_dump(params))

    def reset(self, pretrain: str = "") -> None:
        """Back to the pictures and the code."""
        self.override(pretrain)
        made = [path for path in (self.root / "data").iterdir() if path.name != "release_log"]
        rest = ("dvc.lock", ".dvc/cache", ".dvc/tmp", ".cache", ".dagster")
        for path in (*made, *(self.root / name for name in rest)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)


def dvc_name(stage: str) -> str:
    return stage.replace("/", "@")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def by_shell(checkout: Checkout) -> dict[str, str]:
    """Digests after `dvc repro` in the shell."""
    checkout.reset()
    assert checkout.ran(checkout.repro()) == set(STAGES)
    return checkout.outputs()


def test_after_the_first_run_all_is_up_to_date(checkout, by_shell):
    assert checkout.settle() == by_shell
    assert "up to date" in checkout.dvc("status", LAST, "--with-deps")
    assert checkout.ran(checkout.repro()) == set()
    lineage = ("lineage", "data/eval_reports/pretrained")
    said = checkout.run(sys.executable, "-m", "dinov3", *lineage)
    assert all(stage.partition("/")[0] in said for stage in STAGES)


def test_materializing_everything_afterwards_changes_no_digest(checkout, by_shell):
    assert checkout.settle() == by_shell
    checkout.run(*checkout.dagster())
    assert checkout.outputs() == by_shell
    assert "up to date" in checkout.dvc("status", LAST, "--with-deps")


def test_touching_a_picture_runs_nothing(checkout, by_shell):
    checkout.settle()
    (checkout.root / "pictures" / "line" / "000.png").touch()
    assert "up to date" in checkout.dvc("status", LAST, "--with-deps")
    assert checkout.ran(checkout.repro()) == set()


def test_report_holds_the_model_beside_its_baselines(checkout, by_shell):
    checkout.settle()
    report = json.loads((checkout.root / "data/eval_reports/pretrained/report.json").read_text())
    subjects = {row["subject"] for row in report["rows"]}
    assert {"model", "random init", "raw pixels", "majority class"} <= subjects


def test_the_other_door_first_gives_the_same_digests(checkout, by_shell):
    checkout.reset()
    checkout.run(*checkout.dagster())
    assert checkout.outputs() == by_shell
    assert checkout.ran(checkout.repro()) == set()


def test_one_more_picture_re_runs_exactly_what_descends_from_it(checkout, by_shell):
    checkout.settle()
    extra = checkout.root / "pictures" / "line" / "extra.png"
    Image.new("RGB", (50, 40), "orange").save(extra)
    try:
        assert checkout.ran(checkout.repro()) == set(STAGES)
    finally:
        extra.unlink()


def test_picture_changed_in_place_with_its_time_restored_is_noticed(checkout, by_shell):
    checkout.settle()
    path = checkout.root / "pictures" / "line" / "001.png"
    before, data = path.stat(), path.read_bytes()
    changed = bytearray(data)
    changed[-20] ^= 1
    path.write_bytes(bytes(changed))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    try:
        assert "image_manifest" in checkout.dvc("status", LAST, "--with-deps")
    finally:
        path.write_bytes(data)


@pytest.fixture
def captioned(tmp_path: Path) -> Checkout:
    """Cut-outs with captions: what every stage of the pipeline can work on."""
    checkout = Checkout(tmp_path)
    rows = []
    for path in sorted((tmp_path / "pictures").rglob("*.png")):
        picture = Image.open(path).convert("RGBA")
        picture.putalpha(Image.new("L", picture.size, 255))
        picture.paste((0, 0, 0, 0), (0, 0, picture.width // 3, picture.height))
        picture.save(path)
        shape, number = path.parent.name, len(rows)
        rows.append({"path": str(path), "label": shape, "caption": f"{shape} number {number}"})
    pl.DataFrame(rows).write_parquet(tmp_path / "pictures.parquet")
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    params["source"] = "parquet:pictures.parquet"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return checkout


def test_every_artifact_is_made_by_one_materialization_and_follows_to_its_pictures(captioned):
    captioned.run(*captioned.dagster("not key:reevaluations"))
    assert "up to date" in captioned.dvc("status")
    for key in checkout_pipeline().artifacts.values():
        captioned.run(sys.executable, "-m", "dinov3", "lineage", key.folder)
    for model in ("pretrained", "highres", "vits", "convnext"):
        assert_verifies_elsewhere(captioned, model)


def assert_verifies_elsewhere(checkout: Checkout, model: str) -> None:
    """In an empty folder with nothing but the release and the public key."""
    elsewhere = checkout.root / "elsewhere" / model
    shutil.copytree(checkout.root / "data" / "releases" / model / "release", elsewhere / "it")
    shutil.copy2(checkout.keys / "demo.pub", elsewhere / "publisher.pub")
    asked = ("it", "--key", "publisher.pub", "--expect", f"{model}@0.1.0")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dinov3", "verify", *asked],
        cwd=elsewhere, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith(f"VERIFIED {model}@0.1.0\n")


def wait_for_training(root: Path, step: int) -> psutil.Process:
    """The training stage, once it has written the state after so many steps."""
    while not list((root / "data" / ".state").glob(f"*/*/step_{step:09d}")):
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if "train" in (process.info["cmdline"] or []) and process.info["cwd"] == str(root):
            return process
    pytest.fail("training is over before it could be killed")


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    """Dead or a zombie, within the time a saving trainer is given."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


LONGER = "schedules.num_steps=60 run.checkpoint_every=5"


@pytest.fixture(scope="module")
def longer(checkout: Checkout) -> dict[str, str]:
    """Digests of a run long enough to be killed in."""
    return checkout.settle(LONGER)


@pytest.mark.parametrize("step", [5, pytest.param(45, marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", ["stage", "dvc"])
def test_shell_run_killed_with_9_leaves_no_orphan_and_ends_the_same(checkout, longer, victim, step):
    checkout.reset(LONGER)
    process = checkout.start(checkout.root / "tools" / "dvc", "repro", LAST)
    training = wait_for_training(checkout.root, step)
    everyone = family(psutil.Process(process.pid))
    (training if victim == "stage" else psutil.Process(process.pid)).send_signal(signal.SIGKILL)
    process.communicate()
    assert gone(everyone)
    assert checkout.settle(LONGER) == longer


@pytest.mark.parametrize("step", [5, pytest.param(45, marks=pytest.mark.slow)])
def test_dagster_step_killed_with_9_leaves_no_orphan_and_ends_the_same(checkout, longer, step):
    checkout.reset(LONGER)
    process = checkout.start(*checkout.dagster())
    wait_for_training(checkout.root, step)
    everyone = family(psutil.Process(process.pid))
    psutil.Process(process.pid).send_signal(signal.SIGKILL)
    process.communicate()
    assert gone(everyone)
    checkout.run(*checkout.dagster())
    assert checkout.outputs() == longer
