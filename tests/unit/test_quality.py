"""Great Expectations really judges: every kind of fault is seen, and polars' numbers reach it."""

import os
import subprocess
import sys

import pandas as pd
import polars as pl
import pytest

from dinov3.config import ExpectationsConfig
from dinov3.curation import quality
from dinov3.curation.manifest import MANIFEST_SCHEMA, UNREADABLE_SCHEMA
from dinov3.curation.quality import judge, require_passed, to_pandas
from dinov3.errors import JudgementFailed

EXPECT = ExpectationsConfig(
    min_images=2,
    max_unreadable_fraction=0.2,
    min_short_side=8,
    max_small_fraction=0.2,
    max_duplicate_fraction=0.5,
)


def rows(num=10):
    return [
        {
            "path": f"{i:03d}.png", "sha256": f"{i:064x}", "bytes": 9, "width": 10, "height": 20,
            "mode": "RGB", "source": "folder", "licence": "MIT", "caption": None, "label": None,
            "split": "train", "pixel_sha256": f"{i * 7**20 % 2**64:016x}" + "0" * 48,
            "phash": f"{i:016x}",
        }
        for i in range(num)
    ]  # fmt: skip


def verdict_on(tmp_path, table, num_unreadable=0, expect=EXPECT):
    pl.DataFrame(table, MANIFEST_SCHEMA).write_parquet(tmp_path / "m.parquet")
    lost = [{"path": f"{i}", "reason": "empty", "detail": None} for i in range(num_unreadable)]
    pl.DataFrame(lost, UNREADABLE_SCHEMA).write_parquet(tmp_path / "u.parquet")
    return judge(tmp_path / "m.parquet", tmp_path / "u.parquet", expect)


def failures(verdict):
    return {item["column"] for item in verdict["expectations"] if not item["passed"]}


def test_good_table_passes_with_figures_beside_thresholds(tmp_path):
    verdict = verdict_on(tmp_path, rows(), num_unreadable=2)
    assert verdict["passed"] is True
    require_passed(verdict)
    assert (verdict["rows"], verdict["rows_judged_singly"]) == (10, 10)
    (found,) = [e for e in verdict["expectations"] if e["column"] == "unreadable_fraction"]
    assert found == {
        "name": "expect_column_max_to_be_between", "column": "unreadable_fraction", "passed": True,
        "observed": 0.166667, "threshold": {"max_value": 0.2},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "columns"),
    [
        ({"path": "002.png"}, {"path", "num_out_of_order"}),
        ({"path": "zzz.png"}, {"num_out_of_order"}),
        ({"sha256": "ABC"}, {"sha256", "num_malformed"}),
        ({"phash": "0"}, {"phash", "num_malformed"}),
        ({"split": "validation"}, {"split", "num_malformed"}),
        ({"mode": "CMYK"}, {"mode", "num_malformed"}),
        ({"bytes": 0}, {"bytes", "num_malformed"}),
        ({"width": -1}, {"width", "num_malformed"}),
        ({"licence": None}, {"licence", "num_nulls"}),
        ({"split": None}, {"split", "num_nulls"}),
    ],
)
def test_one_faulty_row_is_seen_in_the_rows_and_in_the_totals(tmp_path, fault, columns):
    table = rows()
    table[4] |= fault
    assert failures(verdict_on(tmp_path, table)) == columns


def test_fractions_are_judged_by_the_recipe(tmp_path):
    small, double = rows(), rows()
    for row in small[:3]:
        row["height"] = 7
    for row in double[:7]:
        row["pixel_sha256"] = "f" * 64
    assert failures(verdict_on(tmp_path, small)) == {"small_fraction"}
    assert failures(verdict_on(tmp_path, double)) == {"duplicate_fraction"}
    assert failures(verdict_on(tmp_path, rows(), num_unreadable=3)) == {"unreadable_fraction"}
    assert failures(verdict_on(tmp_path, rows(1))) == {"num_images"}


def test_failed_verdict_stops_with_every_figure(tmp_path):
    verdict = verdict_on(tmp_path, rows(1), num_unreadable=3)
    pattern = r"2 of \d+ expectations failed: num_images .*got 1, allowed \{'min_value': 2.*0\.75"
    with pytest.raises(JudgementFailed, match=pattern) as caught:
        require_passed(verdict)
    assert caught.value.exit_code == 3


def test_large_table_is_judged_by_totals_and_an_even_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "SAMPLE_ROWS", 10)
    monkeypatch.setattr(quality, "_BUCKET_ROWS", 7)
    table = rows(100)
    table[55]["split"] = "none"  # between the sampled rows
    table[56]["pixel_sha256"] = table[57]["pixel_sha256"]
    verdict = verdict_on(tmp_path, table)
    assert verdict["rows_judged_singly"] == 10
    assert failures(verdict) == {"num_malformed"}
    (found,) = [e for e in verdict["expectations"] if e["column"] == "duplicate_fraction"]
    assert found["observed"] == 0.01


def test_conversion_to_pandas_keeps_integers_text_and_nulls():
    frame = pl.DataFrame(
        {"n": [1, 2**62 + 1], "gap": [2**62 + 1, None], "f": [0.5, None], "b": [True, None],
         "t": ["é", None]}
    )  # fmt: skip
    converted = to_pandas(frame)
    kinds = {name: str(kind) for name, kind in converted.dtypes.items()}
    assert kinds == {"n": "int64", "gap": "Int64", "f": "float64", "b": "boolean", "t": "str"}
    assert converted["n"].tolist() == [1, 2**62 + 1]
    assert converted["gap"][0] == 2**62 + 1
    assert converted.isna().to_numpy().tolist() == [[False] * 5, [False, True, True, True, True]]
    with pytest.raises(TypeError, match="x: no pandas type is agreed for List"):
        to_pandas(pl.DataFrame({"x": [[1]]}))
    assert isinstance(converted, pd.DataFrame)


def test_judging_is_silent_and_leaves_nothing_in_the_home_folder(tmp_path):
    verdict_on(tmp_path, rows())
    (tmp_path / "home").mkdir()
    code = (
        "from pathlib import Path; from tests.unit.test_quality import EXPECT, judge; "
        "judge(Path('m.parquet'), Path('u.parquet'), EXPECT)"
    )
    environment = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "home").iterdir()) == []
