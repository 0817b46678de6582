"""What the demo's recipe learns on its real pictures: three seeds, about a quarter of an hour.

pytest -m slow -s tests/flow/test_quality.py
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dinov3.data.sources.stamps import fetch_stamps
from dinov3.errors import DataError
from dinov3.evals.candidate import open_candidate
from dinov3.evals.collection import Pictures, labelled_halves
from dinov3.evals.features import extract_all
from dinov3.evals.knn import knn_scores, leave_one_out_knn
from dinov3.evals.metrics import mean_cosine, paired_difference, participation_ratio, top_hits
from dinov3.evals.study import preparation
from dinov3.recipe import load_recipe
from tests.flow.conftest import dinov3

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
NUM_RANDOM_INITS = 5
K = 20
CPU = torch.device("cpu")


class Candidates:
    """Features of the labelled pictures by every trained and every random model."""

    def __init__(self, source: str, data: Path) -> None:
        config = load_recipe("demo", phase="evals")
        manifest = data / "image_manifest" / "manifest.parquet"
        self.table = pl.read_parquet(manifest)
        self.halves = labelled_halves(
            self.table, exclude_labels=config.exclude_labels, min_per_class=config.min_per_class
        )
        folders = {seed: data / f"pretrained_{seed}" for seed in SEEDS}
        opened = {seed: open_candidate(folder, None, CPU) for seed, folder in folders.items()}
        models = {f"model {seed}": candidate.backbone for seed, candidate in opened.items()}
        models |= {f"random {seed}": opened[0].untrained(seed) for seed in range(NUM_RANDOM_INITS)}
        self.places = np.concatenate([self.halves.train, self.halves.test])
        self.labels = np.concatenate([self.halves.train_labels, self.halves.test_labels])
        pictures = Pictures(source, self.table).load(self.places)
        found = extract_all(models, pictures, preparation(opened[0], config), 64, CPU)
        self.cls = {name: features.cls for name, features in found.items()}

    def held_out_hits(self, name: str) -> np.ndarray:
        """Whether k-NN against the training half is right, per held-out picture."""
        split = len(self.halves.train)
        reference, queries = self.cls[name][:split], self.cls[name][split:]
        scores = knn_scores(
            reference,
            self.halves.train_labels,
            queries,
            num_classes=self.halves.num_classes,
            ks=[K],
            temperature=0.07,
        )
        return top_hits(scores[K], self.halves.test_labels)

    def leave_one_out(self, name: str) -> float:
        """k-NN among all labelled pictures, each left out in turn."""
        scores = leave_one_out_knn(
            self.cls[name],
            self.labels,
            num_classes=self.halves.num_classes,
            ks=[K],
            temperature=0.07,
        )
        return float(top_hits(scores[K], self.labels).mean())


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> Candidates:
    root = tmp_path_factory.mktemp("quality")
    try:
        source = f"stamps:{fetch_stamps(root / 'stamps')}"
    except DataError as error:
        pytest.skip(str(error))
    data = root / "data"
    table = ("--manifest", data / "image_manifest" / "manifest.parquet")
    read = ("--recipe", "demo", "--source", source)
    embedded = data / "image_embeddings" / "embeddings.parquet"
    dataset = data / "curated_dataset" / "curated.parquet"
    run("manifest", *read, "--output", data / "image_manifest")
    run("embeddings", *read, *table, "--output", embedded.parent)
    curate = ("curate", "--recipe", "demo", *table, "--embeddings", embedded)
    run(*curate, "--output", dataset.parent)
    for seed in SEEDS:
        output = ("--output", data / f"pretrained_{seed}", f"seed={seed}")
        run("train", "pretrained_checkpoint", *read, *table, "--dataset", dataset, *output)
    return Candidates(source, data)


def run(*arguments: str | Path) -> None:
    done: subprocess.CompletedProcess = dinov3(*arguments)
    assert done.returncode == 0, done.stderr


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}")


def test_models_beat_random_inits_on_the_held_out_half(candidates):
    trained = [candidates.held_out_hits(f"model {seed}") for seed in SEEDS]
    untrained = [candidates.held_out_hits(f"random {seed}") for seed in range(NUM_RANDOM_INITS)]
    difference = paired_difference(
        np.mean(trained, axis=0), np.mean(untrained, axis=0), num=10_000, seed=0
    )
    say(f"held out: models {[round(float(hits.mean()), 3) for hits in trained]}")
    say(f"held out: random inits {[round(float(hits.mean()), 3) for hits in untrained]}")
    say(f"held out: difference {difference}")
    assert difference.low > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_features_spread(candidates, seed):
    cls = candidates.cls[f"model {seed}"]
    ratio, cosine = participation_ratio(cls), mean_cosine(cls)
    say(f"seed {seed}: participation ratio {ratio:.2f}, mean cosine {cosine:.3f}")
    assert ratio >= 7
    assert cosine < 0.5


def test_the_demos_model_leaves_one_out(candidates):
    """Among all labelled pictures; the demo's seed is 0, the others are told beside it."""
    accuracies = [candidates.leave_one_out(f"model {seed}") for seed in SEEDS]
    told = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    say(f"leave one out over {len(candidates.labels)} pictures: {told}")
    assert accuracies[0] >= 0.40
