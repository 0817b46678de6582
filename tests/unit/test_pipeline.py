"""`dvc.yaml` names every file a stage's result depends on."""

from pathlib import Path

import grimp
import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
ENTRIES = {
    "image_manifest": "dinov3.curation.manifest",
    "image_embeddings": "dinov3.curation.embed",
    "curated_dataset": "dinov3.curation.curate",
    "pretrained_checkpoint": "dinov3.train.phases",
    "gram_teacher": "dinov3.evals.choose_teacher",
    "gram_checkpoint": "dinov3.train.phases",
    "highres_model": "dinov3.train.phases",
    "distilled_students": "dinov3.train.distill",
    "caption_pairs": "dinov3.curation.captions",
    "dinotxt": "dinov3.train.text_alignment",
    "eval_reports": "dinov3.evals.report",
    "eval_reports_dinotxt": "dinov3.evals.text_report",
    "eval_reports_phases": "dinov3.evals.phases",
    "release": "dinov3.publish.build",
}
# They carry a stage and its words, or bytes that are checked by digest, and decide nothing: a
# better error message re-trains no model.
FRAME = {
    "dinov3.checkpoint",
    "dinov3.config",
    "dinov3.curation.progress",
    "dinov3.device",
    "dinov3.errors",
    "dinov3.lake",
    "dinov3.launch",
    "dinov3.ranks",
    "dinov3.recipe",
    "dinov3.stage",
    "dinov3.state",
    "dinov3.verified_weights",
    "dinov3.weight_files",
}


FRAME_PACKAGES = ("dinov3.release.", "dinov3.config.", "dinov3.state.", "dinov3.lake.")


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("dinov3", cache_dir=None)


@pytest.fixture(scope="module")
def stages():
    pipeline = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in pipeline.items()}


def test_every_stage_is_looked_at(stages):
    assert set(stages) == set(ENTRIES)


@pytest.mark.parametrize(("stage", "entry"), ENTRIES.items())
def test_every_module_a_stage_imports_is_a_dependency_of_it(graph, stages, stage, entry):
    needed = {entry, *graph.find_upstream_modules(entry)} - FRAME
    needed = {name for name in needed if not f"{name}.".startswith(FRAME_PACKAGES)}
    files = [path_of(name) for name in needed]
    files = [path for path in files if path.name != "__init__.py" or "sources" in path.parts]
    deps = [Path(dep) for dep in stages[stage]["deps"] if dep.startswith("dinov3")]
    missing = [path for path in files if not any(path.is_relative_to(dep) for dep in deps)]
    assert sorted(map(str, missing)) == []


def path_of(module: str) -> Path:
    path = Path(*module.split("."))
    return path / "__init__.py" if (CHECKOUT / path).is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("stage", ENTRIES)
def test_every_output_is_named_one_by_one(stages, stage):
    """Times stand in `run.json` alone, so what lies downstream depends on single files."""
    outs = stages[stage]["outs"]
    assert {Path(out).name for out in outs} >= {"record.json", "run.json"}
    assert not [dep for dep in stages[stage]["deps"] if dep.endswith("run.json")]


PHASES = {
    "image_manifest": "manifest",
    "image_embeddings": "embeddings",
    "curated_dataset": "curation",
    "pretrained_checkpoint": "pretrain",
    "gram_teacher": "gram_teacher",
    "gram_checkpoint": "gram",
    "highres_model": "highres",
    "distilled_students": "distill",
    "caption_pairs": "captions",
    "dinotxt": "dinotxt",
    "eval_reports": "evals",
    "eval_reports_dinotxt": "evals",
    "eval_reports_phases": "evals",
    "release": "release",
}
RECIPES = Path("dinov3/recipes")
PIPELINE_FAMILIES = ["default", "demo", "smoke_cpu", "vits_1gpu", "vitl_1gpu"]


@pytest.mark.parametrize("family", PIPELINE_FAMILIES)
@pytest.mark.parametrize(("stage", "phase"), PHASES.items())
def test_every_recipe_a_stage_reads_is_a_dependency_of_it(stages, stage, phase, family):
    deps = [Path(dep.replace("${recipe}", family)) for dep in stages[stage]["deps"]]
    read = recipe_files(RECIPES / family / f"{phase}.yaml")
    missing = [path for path in read if not any(path.is_relative_to(dep) for dep in deps)]
    assert sorted(map(str, missing)) == []


def recipe_files(path: Path) -> set[Path]:
    """The file and everything it extends, at the top and inside."""
    found = {path}
    for name in parents(yaml.safe_load((CHECKOUT / path).read_text())):
        beside = RECIPES / (f"{name}.yaml" if "/" in name else f"{name}/{path.stem}.yaml")
        found |= recipe_files(beside)
    return found


def parents(tree: object) -> list[str]:
    if not isinstance(tree, dict):
        return []
    own = [tree["extends"]] if "extends" in tree else []
    return own + [name for value in tree.values() for name in parents(value)]
