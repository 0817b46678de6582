"""From a source of images to the curated dataset."""

import dagster as dg

from assets.judged import CHECKS
from orchestration.runner import stage_asset

raw_images = dg.AssetsDefinition(  # of a module's bare specs Dagster takes none
    specs=[
        dg.AssetSpec(
            "raw_images",
            group_name="data",
            description="The source of images that params.yaml names; nothing here makes it.",
        )
    ]
)

image_manifest = stage_asset(
    "image_manifest", group="data", kinds={"polars", "parquet"},
    checks=CHECKS["image_manifest"],
    description="One row per decodable image, judged; the unreadable ones with their reasons.",
)  # fmt: skip

image_embeddings = stage_asset(
    "image_embeddings", group="data", kinds={"parquet"},
    description="One unit vector per image, to find copies and clusters with.",
)  # fmt: skip

curated_dataset = stage_asset(
    "curated_dataset", group="data", kinds={"polars", "parquet"},
    checks=CHECKS["curated_dataset"],
    description="Deduplicated, clustered and balanced; every left-out row says why.",
)  # fmt: skip
