"""The picture of each metric over the releases, and the reports it is read from."""

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from dinov3.errors import DataError
from dinov3.publish.history import SCHEMA, draw_history, history_of, read_reports

SVG = "{http://www.w3.org/2000/svg}"


def row(value, *, released=0.8, protocol="k-NN", metric="top-1", **names):
    fell = released - value > 0.1
    figures = {"value": value, "released": released, "tolerance": 0.1, "regressed": fell}
    return {"protocol": protocol, "metric": metric, **names, **figures}


def report(version, date, *metrics):
    benchmark = {"sha256": "b" * 64}
    release = {"model": "vits", "version": version}
    return {
        "schema": SCHEMA,
        "date": date,
        "release": release,
        "benchmark": benchmark,
        "metrics": list(metrics),
    }


def write(folder, content, name="one"):
    path = folder / content["release"]["version"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def drawn(*reports):
    return ElementTree.fromstring(draw_history("vits", history_of(reports)))


def test_columns_come_by_version_as_a_number_and_dots_by_date(tmp_path):
    for number, (version, date) in enumerate([("0.10.0", "1"), ("0.9.0", "2"), ("0.9.0", "1")]):
        write(tmp_path, report(version, date, row(0.8)), f"r{number}")
    now = report("0.9.0", "3", row(0.7))  # the newest measurement is of an old release
    (series,) = history_of([*read_reports(tmp_path), now])
    found = [(one.version, [dot.date for dot in one.measured]) for one in series.columns]
    assert found == [("0.9.0", ["1", "2", "3"]), ("0.10.0", ["1"])]


def test_first_measurement_of_an_old_release_stands_before_newer_ones():
    newer, older = report("0.10.0", "1", row(0.8)), report("0.9.0", "2", row(0.8))
    (series,) = history_of([newer, older])
    assert [one.version for one in series.columns] == ["0.9.0", "0.10.0"]


def test_a_model_without_reports_has_no_history(tmp_path):
    assert history_of(read_reports(tmp_path / "absent")) == []


def test_each_metric_has_a_column_per_release_with_its_measurements():
    first, second = row(0.8, k=5), row(0.6, k=5)
    reports = [
        report("0.1.0", "1", first, row(0.5, metric="mAP", protocol="instance retrieval")),
        report("0.1.0", "2", second),
        report("0.2.0", "3", row(0.9, released=0.95, k=5)),
    ]
    knn, retrieval = history_of(reports)
    assert (knn.title, retrieval.title) == ("k-NN top-1, k = 5", "instance retrieval mAP")
    assert [(one.version, one.released) for one in knn.columns] == [("0.1.0", 0.8), ("0.2.0", 0.95)]
    assert [one.value for one in knn.columns[0].measured] == [0.8, 0.6]
    assert [one.regressed for one in knn.columns[0].measured] == [False, True]


def test_picture_shows_every_measurement_and_marks_regressions():
    root = drawn(report("0.1.0", "1", row(0.8)), report("0.2.0", "2", row(0.6), row(0.7, k=5)))
    dots = root.findall(f".//{SVG}circle")
    assert len(dots) == 3
    assert len({dot.get("fill") for dot in dots}) == 2
    (low,) = [dot for dot in dots if "0.6000" in dot.find(f"{SVG}title").text]
    (high,) = [dot for dot in dots if "0.8000" in dot.find(f"{SVG}title").text]
    assert float(low.get("cy")) > float(high.get("cy"))
    said = "".join(root.itertext())
    assert "0.1.0" in said
    assert "0.2.0" in said


def test_names_of_many_releases_do_not_run_into_each_other():
    versions = [f"1.{number}.0" for number in range(50)]
    root = drawn(*(report(version, "1", row(0.8)) for version in versions))
    texts = [one for one in root.iter(f"{SVG}text") if one.text in versions]
    places = sorted((float(one.get("x")), one.text) for one in texts)
    assert places[-1][1] == "1.49.0"
    assert len(places) > 3
    gaps = [after - before for (before, _), (after, _) in pairwise(places)]
    assert min(gaps) > 6 * len("1.49.0")  # pixels of a letter
    assert len(root.findall(f".//{SVG}circle")) == 50


def test_marks_stay_inside_their_panel():
    root = drawn(report("0.1.0", "1", row(0.0, released=1.0)), report("0.2.0", "2", row(1.0)))
    for dot in root.findall(f".//{SVG}circle"):
        assert 0 < float(dot.get("cx")) < 380
        assert 26 < float(dot.get("cy")) < 146


def test_markup_in_a_name_is_text():
    hostile = '<script>alert(1)</script>&"'
    root = drawn(report("0.1.0", hostile, row(0.8, protocol=hostile)))
    assert not root.findall(f".//{SVG}script")
    assert hostile in "".join(root.itertext())


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"schema":"dinov3.report/1"}',
        json.dumps(report("latest", "1", row(0.8))).encode(),
        json.dumps(report("0.1.0", "1", {"protocol": "k-NN"})).encode(),
    ],
)
def test_what_is_no_report_is_named(tmp_path, content):
    path = write(tmp_path, report("0.1.0", "1", row(0.8)))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"one\.json: not a report of a re-evaluation"):
        read_reports(tmp_path)
