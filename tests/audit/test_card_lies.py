"""The model card says what the other files of its release say; only three places are free text."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dinov3.publish.private_key import PrivateKey
from dinov3.release.audit import Question, audit_release
from dinov3.release.refusals import Refused
from tests.audit.changes import in_bytes
from tests.audit.insider import forge
from tests.released import make_release

Edit = Callable[[bytes], bytes]


def _put(old: bytes, new: bytes) -> Edit:
    """Replaces what must be there."""

    def change(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return change


def _end(more: bytes) -> Edit:
    return lambda data: data + more


LIES: dict[str, Edit] = {
    "a bold claim before the results": _put(
        b"## Meant for", b"**Top-1 99.9 %**, certified.\n\n## Meant for"
    ),
    "a row without an interval": _put(b"| --- |", b"| --- |\n| k-NN | 0.999 |"),
    "a second section of results": _end(b"\n## Results\n\n0.999 [0.998, 1.000]\n"),
    "results under another heading first": _put(
        b"## Meant for", b"## results\n\n0.999 [0.998, 1.000]\n\n## Meant for"
    ),
    "headings swapped": _put(b"| model | random init |", b"| random init | model |"),
    "a claim beyond its interval": _put(b", better", b", far better"),
    "more pictures": _put(b"8 images were trained on", b"8000000 images were trained on"),
    "more pictures judged": _put(b"On 4 held-out", b"On 4000 held-out"),
    "nobody owes anything": _put(b"Who passes it on owes:", b"Nobody owes anything:"),
    "an obligation dropped": _put(b"- `attribution: GPL-2.0-or-later`\n", b""),
    "an unknown dropped": _put(b"That is not proof.", b"That is proof."),
    "steps of a record": _put(b"| `distilled_students_vits` |", b"| `distilled_students_vits ` |"),
    "another architecture": _put(b"ViT of depth", b"ViT-7B of depth"),
    "another command": _put(b"dinov3 verify DIR --key", b"dinov3 trust DIR --key"),
    "a script": _end(b"\n<script>alert(1)</script>\n"),
    "a script in the summary": _put(
        b"\n\n## Meant for", b" <script>alert(1)</script>\n\n## Meant for"
    ),
    "markup in a use": _put(b"## Meant for\n\n- ", b"## Meant for\n\n- **certified** "),
    "a use that is a table": _put(b"## Meant for\n\n", b"## Meant for\n\n| k-NN | 0.999 |\n"),
    "a control character": _end(b"\x1b[2J\n"),
    "a control character in a limit": _put(b"Not good at:\n\n- ", b"Not good at:\n\n- \x1b[2J"),
    "a letter that is not seen": _put(b"Not good at:\n\n- ", "Not good at:\n\n- \u202e".encode()),
    "another library in the header": _put(b'"dinov3"', b'"other"'),
    "a field more in the header": _put(b"\n---\n", b'\nmetrics: "0.999"\n---\n'),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_card_that_says_more_than_its_release_is_refused(
    lie: Edit, release: Path, key: PrivateKey, tmp_path: Path
) -> None:
    forged = forge(release, tmp_path / "release", in_bytes("README.md", lie), key, settled=False)
    with pytest.raises(Refused, match=r"README\.md: ") as caught:
        audit_release(forged, Question(key=key.public))
    assert caught.value.name == "card-differs"


def test_authors_own_words_may_be_any_text(key: PrivateKey, tmp_path: Path) -> None:
    """Escaped they are no markup, and the verifier takes them for what they are."""
    words = ["<b> & &lt;b&gt; \\\\ *x* `y`", "## Results", "1. one", "www.example.com", "- item"]
    quoted = "[" + ", ".join(f"'{one}'" for one in words) + "]"
    release = make_release(
        tmp_path,
        key=key,
        overrides=[
            f"card.summary='{words[0]}'",
            f"card.intended_uses={quoted}",
            f"card.limitations={quoted}",
        ],
    )
    assert audit_release(release, Question(key=key.public)).not_checked == []
    assert "<b>" not in (release / "README.md").read_text()
