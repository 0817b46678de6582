"""What Dagster shows of an artifact, read from the files of a stage: nothing is computed anew."""

import base64
import hashlib
import html
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import dagster as dg
from PIL import Image, ImageOps

from dinov3.data.decode import UndecodableImage, composite, decode_image
from dinov3.data.sources import open_source
from dinov3.errors import DataError, DinoError
from dinov3.evals.curves import HEIGHT, WIDTH, Curve, read_curves
from dinov3.release.record import RECORD_NAME, canonical_json, file_sha256, read_record
from orchestration.lock import Lock, locked_outs
from orchestration.stages import Artifact

_MAX_CURVES = 16
_COLUMNS = 4
_TITLE = 14  # height of a panel's title
_NUM_PICTURES = 12
_TILE = 96  # pixels
_PLAIN = (bool, int, float, str)


def describe(root: Path, artifact: Artifact, lock: Lock) -> dict[str, Any]:
    """Digests, row counts and facts of the record, curves, sample pictures, the report.

    Only the digests when the files are not those that `dvc.lock` names.

    Args:
        root: Folder of the pipeline.
        artifact: One that is in the lock.
        lock: What dvc wrote down.
    """
    folder = root / artifact.folder
    shown: dict[str, Any] = {
        "folder": dg.MetadataValue.path(str(folder)),
        "digests": dg.MetadataValue.md(_digests(artifact, lock)),
    }
    record_path = folder / RECORD_NAME
    named = locked_outs(artifact, lock).get(f"{artifact.folder}/{RECORD_NAME}")
    if named is None or not _is_file_of(record_path, named):
        return shown
    shown |= _record(record_path)
    if (folder / "events.jsonl").is_file():
        shown |= _curves(folder / "events.jsonl")
    if (folder / "manifest.parquet").is_file():
        shown |= _pictures(folder / "manifest.parquet", root)
    if (folder / "report.html").is_file():
        shown["report"] = dg.MetadataValue.path(str(folder / "report.html"))
    return shown


def picture_markdown(name: str, kind: str, data: bytes) -> dg.MarkdownMetadataValue:
    """A picture that needs no server; `kind` as in the media type image/<kind>."""
    text = base64.b64encode(data).decode("ascii")
    return dg.MetadataValue.md(f"![{name}](data:image/{kind};base64,{text})")


def _digests(artifact: Artifact, lock: Lock) -> str:
    sizes = lock[artifact.stage].sizes
    rows = [
        f"| {PurePosixPath(path).relative_to(artifact.folder)} | `{value}` | {sizes[path]:,} |"
        for path, value in locked_outs(artifact, lock).items()
    ]
    return "\n".join(["| output | md5 | bytes |", "|---|---|---|", *rows])


def _is_file_of(path: Path, md5: str) -> bool:
    if not path.is_file():
        return False
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5


def _record(path: Path) -> dict[str, Any]:
    """The record's own digest, its facts, and the tensor digests of weights."""
    record = read_record(path)
    shown: dict[str, Any] = {"record_sha256": file_sha256(path)}
    for name, output in record.outputs.items():
        if output.tensors is not None:
            shown[f"tensors/{name}"] = output.tensors
    for name, value in record.facts.items():
        plain = isinstance(value, _PLAIN)
        shown[f"facts/{name}"] = value if plain else dg.MetadataValue.md(_code(value))
        if name == "rows":
            shown["dagster/row_count"] = value
    return shown


def _code(value: Any) -> str:
    text = json.dumps(json.loads(canonical_json(value)), indent=2, ensure_ascii=False)
    return f"```json\n{text}\n```"


def _curves(path: Path) -> dict[str, Any]:
    """Damaged ones are told and stop nobody: other artifacts are to be reported too."""
    try:
        curves = read_curves(path)
    except DataError as error:
        return {"curves": f"cannot be read: {error}"}
    if not curves:
        return {}
    return {
        "steps": curves[0].last_step,
        "last_values": dg.MetadataValue.md(_code({curve.name: curve.last for curve in curves})),
        "curves": picture_markdown("curves", "svg+xml", _draw(curves[:_MAX_CURVES])),
    }


def _draw(curves: Sequence[Curve]) -> bytes:
    """The panels of the report, four in a row."""
    rows = -(-len(curves) // _COLUMNS)
    width, height = _COLUMNS * WIDTH, rows * (HEIGHT + _TITLE)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, curve in enumerate(curves):
        x, y = place % _COLUMNS * WIDTH, place // _COLUMNS * (HEIGHT + _TITLE)
        parts.append(
            f'<g transform="translate({x},{y})">'
            f'<text x="4" y="11" font-size="10">{html.escape(curve.name)} {curve.last:.4g}</text>'
            f'<polyline transform="translate(0,{_TITLE})" points="{curve.points}" fill="none" '
            f'stroke="#1f5fa8"/></g>'
        )
    return "".join([*parts, "</svg>"]).encode()


def _pictures(manifest: Path, root: Path) -> dict[str, Any]:
    """A contact sheet of rows spread evenly over the manifest."""
    import polars as pl
    import yaml

    try:
        paths = pl.read_parquet(manifest, columns=["path"])["path"]
    except pl.exceptions.PolarsError as error:
        return {"samples": f"{manifest.name} cannot be read: {error}"}
    chosen = paths.gather_every(max(1, len(paths) // _NUM_PICTURES)).head(_NUM_PICTURES).to_list()
    spec = yaml.safe_load((root / "params.yaml").read_text("utf-8"))["source"]
    try:
        source = open_source(spec)
        pictures = [decode_image(source.read(path), max_pixels=sys.maxsize) for path in chosen]
    except (DinoError, UndecodableImage, OSError) as error:
        return {"samples": f"the source cannot be read now: {error}"}
    return {"samples": picture_markdown("samples", "png", _contact_sheet(pictures))}


def _contact_sheet(pictures: Sequence[Image.Image]) -> bytes:
    sheet = Image.new("RGB", (_TILE * len(pictures), _TILE), "white")
    for place, picture in enumerate(pictures):
        tile = ImageOps.contain(composite(picture, (255, 255, 255)), (_TILE, _TILE))
        sheet.paste(tile, (place * _TILE, 0))
    stream = io.BytesIO()
    sheet.save(stream, format="png")
    return stream.getvalue()
