"""Texts of licences are found wherever they may lie; what fails names its own remedy."""

import pytest

from dinov3.errors import ReleaseRefused
from dinov3.publish.build import build_release
from dinov3.publish.licence_texts import OURS, licence_remedy, licence_texts
from dinov3.release.licences import RULES
from dinov3.release.policy import Verdict
from tests.released import a_request, make_chain


@pytest.fixture
def folders(tmp_path):
    """Two folders of texts; the first is asked first."""
    for name in ("given", "log"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ISC.txt").write_text(name)
    return tmp_path / "given", tmp_path / "log"


def test_the_first_folder_that_has_a_text_counts_and_ours_last(folders):
    given, log = folders
    (log / "EPL-2.0.txt").write_text("a licence we do not ship")
    (log / "MIT.txt").write_text("a better text")
    found = licence_texts(["ISC", "EPL-2.0 OR MIT", "Apache-2.0"], given, log)
    assert found == {
        "Apache-2.0": OURS / "Apache-2.0.txt",
        "EPL-2.0": log / "EPL-2.0.txt",
        "ISC": given / "ISC.txt",
        "MIT": log / "MIT.txt",
    }
    assert licence_texts(["ISC", "MIT"], None) == {"ISC": None, "MIT": OURS / "MIT.txt"}


def test_terms_of_ones_own_have_a_text_too(folders):
    _, log = folders
    (log / "LicenseRef-ours.txt").write_text("only within the house")
    found = licence_texts(["LicenseRef-ours", "LicenseRef-theirs AND CC0-1.0"], None, log)
    assert found == {
        "CC0-1.0": OURS / "CC0-1.0.txt",
        "LicenseRef-ours": log / "LicenseRef-ours.txt",
        "LicenseRef-theirs": None,
    }


def test_later_versions_share_a_text_and_an_addition_brings_what_it_adds_to():
    found = licence_texts(["GPL-2.0-or-later", "LGPL-3.0-only", "no licence at all"])
    assert found == {
        "GPL-2.0-or-later": OURS / "GPL-2.0-only.txt",
        "GPL-3.0-only": OURS / "GPL-3.0-only.txt",
        "LGPL-3.0-only": OURS / "LGPL-3.0-only.txt",
    }


def test_what_ships_is_of_licences_that_can_be_released_under():
    shipped = {path.stem for path in OURS.glob("*.txt")}
    assert "MIT" in shipped
    assert all(RULES[name].forbids is None for name in shipped)
    assert all(len(path.read_text()) > 900 for path in OURS.glob("*.txt"))


def remedy(tmp_path, *, inputs=("MIT",), unknown=(), conflicts=(), absent=()):
    result = {"inputs": inputs, "unknown": unknown, "conflicts": conflicts}
    verdict = Verdict("licences", False, result, "MIT", "…")
    return licence_remedy(verdict, absent, tmp_path / "release_log")


@pytest.mark.parametrize(
    ("failure", "says", "says_not"),
    [
        ({"inputs": ()}, ['manifest: "licence=…"'], ["Unknown", "Not allowed", "No text"]),
        (
            {"unknown": ("who knows",)},
            ["Unknown (who knows)", "LicenseRef-NAME", "manifest: ", "release: "],
            ["No licence at all", "Not allowed", "No text"],
        ),
        (
            {"conflicts": ("GPL-2.0-only: …",)},
            ['release: "policy.licence=…"'],
            ["No licence at all", "Unknown", "No text", "manifest: "],
        ),
        (
            {"absent": ("LicenseRef-ours",)},
            ["release_log/licences/LicenseRef-ours.txt"],
            ["No licence at all", "Unknown", "Not allowed", "params.yaml"],
        ),
    ],
)
def test_each_failure_names_its_own_remedy(tmp_path, failure, says, says_not):
    said = remedy(tmp_path, **failure)
    assert all(text in said for text in says)
    assert not any(text in said for text in says_not)


def test_several_failures_name_all_their_remedies(tmp_path):
    said = remedy(tmp_path, unknown=("x",), conflicts=("y",), absent=("B", "A"))
    assert said.index("Unknown") < said.index("Not allowed") < said.index("A.txt")
    assert said.index("A.txt") < said.index("B.txt")


OURS_ALONE = "LicenseRef-internal"


def test_pictures_of_ones_own_are_released_once_their_text_lies_in_the_log(tmp_path):
    chain = make_chain(tmp_path / "data", licence=OURS_ALONE)
    asked = a_request(chain, overrides=[f"policy.licence={OURS_ALONE}"])
    text = chain.log / "licences" / f"{OURS_ALONE}.txt"
    with pytest.raises(ReleaseRefused, match=rf"No text: put it into {text} and commit it\."):
        build_release(asked)
    text.parent.mkdir()
    text.write_text("For use within the house.\n")
    release = build_release(asked)
    assert (release / "licences" / text.name).read_bytes() == text.read_bytes()
    assert f"pass on its terms: {OURS_ALONE}" in (release / "README.md").read_text()


def test_pictures_of_ones_own_go_out_under_no_other_terms(tmp_path):
    chain = make_chain(tmp_path / "data", licence=OURS_ALONE)
    asked = a_request(chain, overrides=["policy.licence=MIT"])
    with pytest.raises(ReleaseRefused, match="asks for the same licence") as raised:
        build_release(asked)
    assert 'release: "policy.licence=…"' in str(raised.value)


def test_a_waiver_that_cannot_count_is_named_in_the_refusal(tmp_path):
    chain = make_chain(tmp_path / "data", committed=False)
    (chain.log / "waivers.yaml").write_text(
        "- {gate: clean_code, model: vits, version: 0.1.0, who: author, why: trial,"
        " until: 2026-11-21}\n"
    )
    with pytest.raises(ReleaseRefused, match="the waiver of clean_code does not count"):
        build_release(a_request(chain, overrides=["policy.waivable=[]"]))
