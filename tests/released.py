"""A tiny but genuine chain of artifacts, and a release made of it by the real builder.

Records, edges, digests and licences come from the same `open_stage` as in production, recipes from
`smoke_cpu`; only what the stages would compute (features, weights, figures) is drawn at random.
"""

import atexit
import datetime
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.numpy import save_file

from dinov3.config import dump
from dinov3.publish.build import ReleaseRequest, build_release
from dinov3.publish.private_key import PrivateKey, load_key, new_key
from dinov3.recipe import load_recipe
from dinov3.release.images import write_images
from dinov3.release.record import RECORD_NAME, canonical_json, digest_of, file_sha256, read_record
from dinov3.stage import EVENTS_NAME, TRAINING_DATA, UNKNOWN, Stage, code_digest, open_stage

LICENCE = "GPL-2.0-or-later"
TODAY = datetime.date(2026, 11, 21)
COMMIT = "c0ffee" + "0" * 34
NUM_TRAINED, NUM_TEST = 8, 4
ROLES = {
    1: "trained",
    2: "clustered only",
    3: "evaluated",
    16: "excluded: exact duplicate",
    17: "excluded: near-duplicate of a held-out image",
    18: "excluded: near-duplicate",
}
MODEL, BASELINES = "model", ("random init", "raw pixels", "majority class")
FOLDERS = {"pretrained": "pretrained_checkpoint", "vits": "distilled_students/vits"}


@dataclass(frozen=True)
class Wishes:
    """How a chain departs from a flawless one.

    Attributes:
        seed: Of pictures and weights: another seed, another model.
        accuracy: Figure of the model in every row of its reports.
        licence: Of the pictures.
        word: Stands wherever a user's word may stand: label, caption, class.
        committed: Whether run.json says that the code was that of a commit.
        healthy: Verdict of training.
        sound: Verdict on the image table.
        overlap: Whether a picture is both trained on and evaluated on.
        performed: Steps of the last training, if not as many as planned.
        heads: Whether the artifacts have heads.
        outside: Licence of outside weights that pretraining began from; None: from nothing.
        loadable: Whether the weights are those of the recipe's network (needs torch).
    """

    seed: int = 0
    accuracy: float = 0.75
    licence: str = LICENCE
    word: str = "town"
    committed: bool = True
    healthy: bool = True
    sound: bool = True
    overlap: bool = False
    performed: int | None = None
    heads: bool = True
    outside: str | None = None
    loadable: bool = False


@dataclass(frozen=True)
class Chain:
    """Where the artifacts lie: `root` is what `--artifacts` names, `log` what `--log` does."""

    root: Path
    wishes: Wishes = field(default_factory=Wishes)

    @property
    def log(self) -> Path:
        return self.root / "release_log"

    def model(self, key: str = "vits") -> Path:
        """Folder of the weights of a model."""
        return self.root / FOLDERS[key]

    def report(self, key: str = "vits") -> Path:
        """Folder of its evaluation."""
        return self.root / "eval_reports" / key

    def folder(self, stage: str) -> Path:
        """Folder of a data stage."""
        return self.root / stage


def make_chain(folder: Path, **wishes: Any) -> Chain:
    """Makes manifest, embeddings, curated dataset, pretraining, a student and both evaluations.

    Args:
        folder: Becomes `data/`.
        **wishes: Fields of `Wishes`.
    """
    chain = Chain(folder, Wishes(**wishes))
    shutil.copytree(_template(chain.wishes), folder, dirs_exist_ok=True)
    return chain


@functools.cache
def _template(wishes: Wishes) -> Path:
    """The same chain is made once in a process: no file of it names its folder."""
    scratch = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    chain = Chain(scratch / "data", wishes)
    _make_manifest(chain)
    _make_embeddings(chain)
    _make_curated(chain)
    _make_pretrained(chain)
    _make_student(chain)
    for key in FOLDERS:
        _make_report(chain, key)
    chain.log.mkdir()
    return chain.root


def make_key(folder: Path, name: str = "demo") -> PrivateKey:
    """A key without passphrase; its public half is `<name>.pub` beside it."""
    new_key(name, folder, None)
    return load_key(name, folder)


def make_release(
    folder: Path,
    *,
    model: str = "vits",
    version: str = "0.1.0",
    key: PrivateKey | None = None,
    chain: Chain | None = None,
    overrides: Sequence[str] = (),
    **wishes: Any,
) -> Path:
    """Builds a release through the real builder; returns its directory.

    Args:
        folder: Holds `data/`, and the release in `data/releases/<model>/release`.
        model: `vits` or `pretrained`.
        version: Of the release.
        key: Signs it; None leaves it unsigned.
        chain: What it is made of, by default a new one in `folder / "data"`.
        overrides: `key=value` over the recipe `smoke_cpu/release`.
        **wishes: Of the new chain.
    """
    chain = chain or make_chain(folder / "data", **wishes)
    return build_release(a_request(chain, model, version, key, overrides))


def a_request(
    chain: Chain,
    model: str = "vits",
    version: str = "0.1.0",
    key: PrivateKey | None = None,
    overrides: Sequence[str] = (),
) -> ReleaseRequest:
    """What `python -m dinov3 release` would ask of the builder."""
    return ReleaseRequest(
        stage=f"release_{model}",
        model=model,
        version=version,
        weights=chain.model(model),
        report=chain.report(model),
        artifacts=chain.root,
        log=chain.log,
        output=chain.root / "releases" / model,
        config=load_recipe("smoke_cpu", overrides, phase="release"),
        key=key,
        recipe="smoke_cpu",
        overrides=tuple(overrides),
        today=TODAY,
    )


def rewrite_record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the record of a folder, and run.json so that it names the new one."""
    record = json.loads((folder / RECORD_NAME).read_bytes())
    change(record)
    (folder / RECORD_NAME).write_bytes(canonical_json(record))
    change_run(folder, record=file_sha256(folder / RECORD_NAME))


def change_run(folder: Path, **facts: Any) -> None:
    """Sets fields of run.json, which no record binds."""
    run = json.loads((folder / "run.json").read_bytes())
    (folder / "run.json").write_bytes(canonical_json({**run, **facts}))


def _pictures(chain: Chain) -> list[tuple[bytes, str, str]]:
    """Digest, split and path of every picture."""
    count = NUM_TRAINED + NUM_TEST + 2
    splits = ["train"] * (NUM_TRAINED + 2) + ["test"] * NUM_TEST
    return [
        (_sha(f"{chain.wishes.seed}/{number}").digest(), split, f"pictures/{number:02d}.png")
        for number, split in zip(range(count), splits, strict=True)
    ]


def _make_manifest(chain: Chain) -> None:
    wishes = chain.wishes
    rows = [
        {
            "path": path,
            "sha256": digest.hex(),
            "bytes": 100,
            "width": 60,
            "height": 50,
            "mode": "RGB",
            "source": "folder",
            "licence": wishes.licence,
            "caption": f"A picture of {wishes.word}.",
            "label": wishes.word,
            "split": split,
            "pixel_sha256": _sha(digest.hex()).hexdigest(),
            "phash": digest.hex()[:16],
        }
        for digest, split, path in _pictures(chain)
    ]
    source = {"source": "folder", "num_files": len(rows), "bytes": 100 * len(rows)}
    source["sha256"] = digest_of([[row["path"], row["sha256"]] for row in rows])
    with _stage(chain, "image_manifest", "manifest") as stage:
        stage.read_root("source", "folder", source["sha256"], {wishes.licence})
        stage.facts.update(rows=len(rows), labels={wishes.word: len(rows)}, source=source)
        pl.DataFrame(rows).write_parquet(stage.path("manifest.parquet"))
        empty = pl.DataFrame(schema=["path", "reason", "detail"])
        empty.write_parquet(stage.path("unreadable.parquet"))
        verdict = {"passed": wishes.sound, "rows": len(rows)}
        verdict["expectations"] = [{"name": "expect_images", "passed": wishes.sound}]
        stage.path("verdict.json").write_bytes(canonical_json(verdict))


def _make_embeddings(chain: Chain) -> None:
    pictures = _pictures(chain)
    with _stage(chain, "image_embeddings", "embeddings", embeddings=0) as stage:
        _read_manifest(stage, chain)
        table = pl.DataFrame(
            {
                "path": [path for _, _, path in pictures],
                "sha256": [digest.hex() for digest, _, _ in pictures],
                "embedding": [[float(value) for value in digest[:4]] for digest, _, _ in pictures],
            }
        )
        table.write_parquet(stage.path("embeddings.parquet"))
        stage.facts = {"rows": len(pictures), "dim": 4, "embedder": "pixels"}


def _make_curated(chain: Chain) -> None:
    pictures = _pictures(chain)
    roles = [1] * NUM_TRAINED + [2, 16] + [3] * NUM_TEST
    rows = [(digest, role) for (digest, _, _), role in zip(pictures, roles, strict=True)]
    if chain.wishes.overlap:
        rows.append((pictures[0][0], 3))
    reasons = {2: "not drawn by balanced sampling", 3: "held out for evaluation"}
    reasons[16] = "exact duplicate"
    with _stage(chain, "curated_dataset", "curation", curation=0) as stage:
        _read_manifest(stage, chain)
        embeddings = chain.folder("image_embeddings") / "embeddings.parquet"
        stage.read("embeddings", embeddings)
        table = pl.DataFrame(
            {
                "path": [path for _, _, path in pictures],
                "sha256": [digest.hex() for digest, _, _ in pictures],
                "split": [split for _, split, _ in pictures],
                "kept": [role == 1 for role in roles],
                "reason": [reasons.get(role) for role in roles],
                "duplicate_of": [pictures[0][2] if role == 16 else None for role in roles],
                "similarity": [1.0 if role == 16 else None for role in roles],
                "cluster": [[0, 1] if role in (1, 2) else None for role in roles],
            }
        )
        table.write_parquet(stage.path("curated.parquet"))
        write_images(stage.path("images.bin"), rows, ROLES)
        stage.facts = {"rows": len(rows), "kept": NUM_TRAINED}
        stage.path("summary.json").write_bytes(canonical_json(stage.facts))


def _make_pretrained(chain: Chain) -> None:
    folder = chain.model("pretrained")
    with _stage(chain, "pretrained_checkpoint", "pretrain", folder, seed=0) as stage:
        _read_manifest(stage, chain)
        _read_dataset(stage, chain)
        if chain.wishes.outside is not None:
            stage.read_root("init", "outside.pth", "0" * 64, {chain.wishes.outside})
            stage.facts[TRAINING_DATA] = UNKNOWN
        model = stage.config["model"]
        config = {name: stage.config[name] for name in ("phase", "model", "heads", "crops")}
        _write_training(stage, chain, model, config)
        (stage.path("snapshots")).mkdir()
        _write_weights(stage.path("snapshots/step_000000002.safetensors"), chain, 2)


def _make_student(chain: Chain) -> None:
    teacher = chain.model("pretrained")
    folder = chain.model("vits")
    with _stage(chain, "distilled_students_vits", "distill", folder, seed=0) as stage:
        _read_manifest(stage, chain)
        _read_dataset(stage, chain)
        stage.read("teacher config", teacher / "config.json")
        stage.read("init", teacher / "backbone.safetensors")
        if chain.wishes.heads:
            stage.read("init heads", teacher / "heads.safetensors")
        student = stage.config["students"]["vits"]
        config = {
            "phase": "distill",
            "student": "vits",
            "model": student["model"],
            "heads": student["heads"],
            "crops": {**stage.config["crops"], **student["crops"]},
        }
        _write_training(stage, chain, student["model"], config, chain.wishes.performed)


def _write_training(
    stage: Stage,
    chain: Chain,
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    performed: int | None = None,
) -> None:
    """Weights, config, verdict and event log, as the frame of training leaves them."""
    planned = stage.config["schedules"]["num_steps"]
    performed = planned if performed is None else performed
    stage.steps = {"planned": planned, "performed": performed}
    stage.facts["num_images"] = NUM_TRAINED
    place = len(stage.name)  # teacher and student differ
    _write_weights(stage.path("backbone.safetensors"), chain, place, model)
    if chain.wishes.heads:
        _write_weights(stage.path("heads.safetensors"), chain, place + 1)
    stage.path("config.json").write_bytes(canonical_json(config))
    healthy = chain.wishes.healthy
    metrics = {"mean_cosine": 0.3, "participation_ratio": 6.5, "prototype_entropy": 0.9}
    verdict = {
        "passed": healthy,
        "reason": None if healthy else "mean_cosine is 0.999, must be at most 0.98",
        "step": performed,
        "metrics": metrics,
        "thresholds": stage.config["health"],
    }
    stage.path("health.json").write_bytes(canonical_json(verdict))
    with stage.path(EVENTS_NAME).open("w") as log:
        for step in range(1, performed + 1):
            line = {"step": step, "time": 1.7e9 + step, "loss": 9.0 - step / 8}
            health = {f"health/{name}": value for name, value in metrics.items()}
            log.write(json.dumps({**line, **(health if step == performed else {})}) + "\n")
    stage.run_facts.update(device="cpu", threads=1, world_size=1, interruptions=[])


def _make_report(chain: Chain, key: str) -> None:
    """Judges a model by figures of its own choosing; baselines are worse by a fixed margin."""
    model = chain.model(key)
    with _stage(chain, f"eval_reports_{key}", "evals", chain.report(key), seed=0) as stage:
        stage.read("backbone", model / "backbone.safetensors")
        stage.read("model config", model / "config.json")
        _read_manifest(stage, chain)
        _read_dataset(stage, chain)
        weights = read_record(model / RECORD_NAME).outputs["backbone.safetensors"]
        report = {
            "schema": "dinov3.report/1",
            "stage": stage.name,
            "model": {
                "name": "backbone.safetensors",
                "sha256": weights.sha256,
                "tensors": weights.tensors,
                "record": file_sha256(model / RECORD_NAME),
            },
            "dataset": {
                "sha256": file_sha256(chain.folder("image_manifest") / "manifest.parquet"),
                "contamination": stage.contamination,
                "num_train": NUM_TRAINED,
                "num_test": NUM_TEST,
                "num_held_out": NUM_TEST,
                "classes": [chain.wishes.word],
            },
            "code": code_digest(),
            "config": digest_of(stage.config),
            "num_random_inits": 2,
            "rows": list(_rows(chain.wishes.accuracy)),
            "differences": list(_differences(chain.wishes.accuracy)),
            "features": {"mean_cosine": 0.3, "num_samples": NUM_TEST, "rankme": 3.5},
            "per_class": [{"label": chain.wishes.word, "model": chain.wishes.accuracy}],
            "scenes": None,
            "choices": [],
            "missing": [],
        }
        stage.path("report.json").write_bytes(canonical_json(report))
        stage.path("report.html").write_text("<!doctype html><title>Report</title>")
        stage.facts = {"contamination": stage.contamination, "num_test": NUM_TEST}


def _rows(accuracy: float) -> Any:
    protocols = ({"protocol": "k-NN", "k": 5}, {"protocol": "k-NN", "k": 20})
    for protocol in (*protocols, {"protocol": "linear probe"}):
        for subject in (MODEL, *BASELINES):
            value = accuracy if subject == MODEL else 0.5
            yield {**protocol, **_figure(subject, value)}


def _differences(accuracy: float) -> Any:
    for against in BASELINES[:2]:
        row = {"protocol": "k-NN", "k": 20, "against": against}
        yield {**row, **_figure(MODEL, accuracy - 0.5)}


def _figure(subject: str, value: float) -> dict[str, Any]:
    figure = {"subject": subject, "metric": "top-1", "num_samples": NUM_TEST}
    low, high = round(value - 0.1, 6), round(value + 0.1, 6)
    return {**figure, "value": round(value, 6), "low": low, "high": high}


def _write_weights(
    path: Path, chain: Chain, place: int, model: Mapping[str, Any] | None = None
) -> None:
    if model is not None and chain.wishes.loadable:
        _write_network(path, chain.wishes.seed + place, model)
        return
    rng = np.random.default_rng([chain.wishes.seed, place])
    names = [f"{role}.blocks.0.weight" for role in ("teacher", "student")]
    save_file({name: rng.random((4, 8), np.float32) for name in names}, path)


def _write_network(path: Path, seed: int, model: Mapping[str, Any]) -> None:
    """The very network of the recipe, so that `hub.load` opens it."""
    from dinov3 import hub
    from dinov3.checkpoint import save_tensors
    from dinov3.models.backbone import backbone_config

    tensors = {}
    for number, role in enumerate(("teacher", "student")):
        network = hub.random_init(backbone_config(dict(model)), 2 * seed + number)
        tensors |= {f"{role}.{name}": value for name, value in network.state_dict().items()}
    save_tensors(path, tensors)


def _stage(
    chain: Chain, name: str, phase: str, folder: Path | None = None, **seeds: int
) -> "_Opened":
    config = _recipe(phase)
    return _Opened(chain, open_stage(name, folder or chain.folder(name), config=config), seeds)


@functools.cache
def _recipe(phase: str) -> dict[str, Any]:
    return dump(load_recipe("smoke_cpu", phase=phase))


class _Opened:
    """A stage whose run.json says what the wishes say of the code, not what this checkout is."""

    def __init__(self, chain: Chain, opened: Any, seeds: dict[str, int]) -> None:
        self._chain, self._opened, self._seeds = chain, opened, seeds

    def __enter__(self) -> Stage:
        stage: Stage = self._opened.__enter__()
        stage.seeds = self._seeds
        committed = self._chain.wishes.committed
        diff = None if committed else "diff --git a/dinov3/gates.py b/dinov3/gates.py\n"
        stage.run_facts.update(commit=COMMIT, dirty=not committed, diff=diff)
        return stage

    def __exit__(self, *error: Any) -> bool | None:
        swallowed: bool | None = self._opened.__exit__(*error)
        return swallowed


def _read_manifest(stage: Stage, chain: Chain) -> None:
    stage.read("manifest", chain.folder("image_manifest") / "manifest.parquet")


def _read_dataset(stage: Stage, chain: Chain) -> None:
    stage.read("dataset", chain.folder("curated_dataset") / "curated.parquet")


def _sha(text: str) -> Any:
    return hashlib.sha256(text.encode())
