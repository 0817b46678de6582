"""Releases whose figures were really measured: the weights that they hold, on drawn pictures."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov3.config import dump
from dinov3.evals.candidate import open_candidate
from dinov3.evals.report import rounded
from dinov3.evals.study import run_study
from dinov3.publish.benchmark import Benchmark, open_benchmark
from dinov3.publish.build import build_release
from dinov3.publish.private_key import PrivateKey
from dinov3.publish.store import open_store
from dinov3.recipe import load_recipe
from dinov3.release.record import canonical_json, file_sha256
from tests.released import Chain, a_request, make_chain, rewrite_record

COLOURS = {"blue": (40, 40, 220), "green": (40, 200, 40), "red": (220, 40, 40)}
PER_CLASS = 16
GATE = "{protocol: k-NN, metric: top-1, k: 20, against: random init, difference_low_at_least: -1}"


def paint(folder: Path, *, mixed: bool = False, seed: int = 0) -> str:
    """Pictures of three colours, labelled by them or, mixed, by none; returns their source."""
    generator = np.random.default_rng(seed)
    names = list(COLOURS)
    for place, colour in enumerate(COLOURS.values()):
        for number in range(PER_CLASS):
            label = names[(number if mixed else place) % len(names)]
            noise = generator.integers(-30, 30, (24, 20, 3))
            path = folder / label / f"{place}_{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8)).save(path)
    return f"folder:{folder}"


def measured_chain(folder: Path, source: str, **wishes) -> Chain:
    """A chain whose report of `vits` says what its weights do on some pictures."""
    chain = make_chain(folder, loadable=True, **wishes)
    config = load_recipe("smoke_cpu", ["run.device=cpu", "run.threads=1"], phase="evals")
    collection = open_benchmark(Benchmark(source), config)
    device = torch.device("cpu")
    study = run_study(
        open_candidate(chain.model("vits"), None, device),
        collection.table,
        collection.pictures,
        collection.halves,
        config,
        device,
    )
    path = chain.report("vits") / "report.json"
    report = json.loads(path.read_bytes())
    report |= rounded({"rows": study.rows, "differences": study.differences})
    assert dump(config)["phase"] == "evals"
    path.write_bytes(canonical_json(report))
    same = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    rewrite_record(path.parent, lambda record: record["outputs"]["report.json"].update(same))
    return chain


def publish(chain: Chain, store: str, version: str, key: PrivateKey) -> Path:
    """Builds, signs and publishes `vits` of a chain; returns the release directory."""
    request = a_request(chain, "vits", version, key, [f"policy.evaluation=[{GATE}]"])
    release = build_release(request)
    open_store(store).publish(release, log=chain.log, key=key)
    return release
