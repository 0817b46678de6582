"""The text of a model card, made of what the other files of the release say, and nothing else.

Who makes a release writes it with these functions, and who verifies one writes it again: only the
summary and the lists of uses and limits are the author's own words. The wording belongs to the
schema of the release: another wording is another schema.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinov3.release.card_facts import Facts, protocol_of
from dinov3.release.markdown import code, plain_words, prose
from dinov3.release.policy_terms import MODEL, NO_WEIGHTS

_USES, _LIMITS = "## Meant for\n\n", "\nNot good at:\n"


@dataclass(frozen=True)
class Words:
    """What the author says in words of their own, unescaped."""

    summary: str
    uses: Sequence[str]
    limits: Sequence[str]


def render_body(facts: Facts, words: Words) -> str:
    """All below the header."""
    parts = [*_head(facts, words), *_tail(facts)]
    return "\n" + "\n\n".join(parts) + "\n"


def find_words(facts: Facts, body: str) -> Words:
    """The author's own words in a body; in one of another shape, whatever stands in their place.

    A body holds nothing else than these words where `render_body` of them gives it back.
    """
    above, _, rest = body.partition(f"\n\n{_network(facts)}\n\n{_USES}")
    free, _, _ = rest.partition("\n\n## ")
    uses, _, limits = free.partition(_LIMITS)
    summary = above.removeprefix(f"\n# {code(facts.name)}\n\n")
    return Words(plain_words(summary), _texts(uses), _texts(limits))


def architecture_of(network: Mapping[str, Any]) -> tuple[str, str]:
    """Family of a network and a line on its size."""
    if network.get("arch") == "convnext":
        depths, dims = (", ".join(map(str, network[name])) for name in ("depths", "dims"))
        return "convolutional network", f"ConvNeXt of depths {depths} and widths {dims}"
    size = f"depth {network['depth']} and width {network['embed_dim']}"
    return "vision transformer", f"ViT of {size}, patches of {network['patch_size']} pixels"


def _head(facts: Facts, words: Words) -> list[str]:
    return [
        f"# {code(facts.name)}",
        prose(words.summary),
        _network(facts),
        "\n".join(
            [
                "## Meant for",
                "",
                *_items(map(prose, words.uses)),
                "",
                "Not good at:",
                "",
                *_items(map(prose, words.limits)),
            ]
        ),
    ]


def _tail(facts: Facts) -> list[str]:
    return [
        _results(facts),
        _making(facts),
        _licensing(facts),
        _unknowns(facts),
        _verifying(facts),
    ]


def _texts(block: str) -> list[str]:
    lines = block.strip("\n").split("\n")
    return [plain_words(line.removeprefix("- ")) for line in lines if line]


def _network(facts: Facts) -> str:
    """What is in the file, and the lines that open it."""
    _, architecture = architecture_of(facts.network)
    return "\n".join(
        [
            f"{prose(architecture)}; the EMA teacher, which is what to use, and the student stand "
            "in one file.",
            "",
            "    from dinov3 import hub",
            '    backbone = hub.load("DIR", key="PUBLISHER.pub")  # verifies what it opens',
        ]
    )


def _results(facts: Facts) -> str:
    """Figures with intervals beside their baselines, and what the intervals carry."""
    report = facts.report
    dataset = report.get("dataset", {})
    subjects = list(dict.fromkeys([MODEL, *(row["subject"] for row in report["rows"])]))
    lines = [
        "## Results",
        "",
        f"On {prose(str(dataset.get('num_test')))} held-out pictures, features frozen; in brackets "
        "the 95 % interval. Every figure stands in `evals.json`, which names these weights by "
        "digest.",
        "",
        *_table(["protocol", "metric", *map(prose, subjects)], _result_rows(report, subjects)),
    ]
    claims = [_claim(row) for row in report.get("differences", ())]
    if claims:
        lines += ["", "Paired differences:", "", *_items(claims)]
    return "\n".join(lines)


def _result_rows(report: Mapping[str, Any], subjects: Sequence[str]) -> Iterator[list[str]]:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in report.get("rows", ()):
        figure = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        cells.setdefault((protocol_of(row), row["metric"]), {})[row["subject"]] = figure
    for (protocol, metric), figures in cells.items():
        yield [prose(protocol), prose(metric), *(figures.get(name, "") for name in subjects)]


def _claim(row: Mapping[str, Any]) -> str:
    """No more than the interval carries."""
    figures = f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    what = f"{prose(protocol_of(row))} {prose(row['metric'])} against {prose(str(row['against']))}"
    if row["low"] > 0:
        verdict = "better"
    elif row["high"] < 0:
        verdict = "worse"
    else:
        verdict = "not told apart: the interval holds zero"
    return f"{what}: {figures}, {verdict}"


def _making(facts: Facts) -> str:
    rows = []
    for digest, record in facts.records.items():
        steps = record.steps.get("performed")
        licences = [code(name, in_table=True) for name in record.licences.get("out", ())]
        digests = [code(digest[:12]), code(record.code[:12])]
        cells = [
            code(record.stage, in_table=True),
            *digests,
            "" if steps is None else prose(str(steps)),
        ]
        rows.append([*cells, ", ".join(licences)])
    roots = [
        f"{prose(root.role)} {code(root.name)}, sha256 {code(root.sha256[:12])}"
        + ("" if root.role in NO_WEIGHTS else ": **training data unknown**")
        for root in facts.roots
    ]
    return "\n".join(
        [
            "## How it was made",
            "",
            "Each line is a record in `records/`, inputs first; digests are cut to 12 digits.",
            "",
            *_table(["stage", "record", "code", "steps", "licences of its inputs"], rows),
            "",
            "The chain begins at:",
            "",
            *_items(roots),
            *_counts(facts.num_images),
        ]
    )


def _counts(num_images: tuple[int, int] | None) -> list[str]:
    if num_images is None:
        return []
    trained, held_out = num_images
    return [
        "",
        f"{trained} images were trained on, {held_out} were held out to judge by; `images.bin` "
        "lists them by digest, or its own digest does.",
    ]


def _licensing(facts: Facts) -> str:
    return "\n".join(
        [
            "## Licence",
            "",
            f"{code(facts.licence)}, whose text is in `licences/`. Whether weights inherit the "
            "licences of pictures is not settled in law; this release is made as if they did. "
            "Who passes it on owes:",
            "",
            *_items([code(duty) for duty in facts.obligations] or ["nothing beyond that licence"]),
        ]
    )


def _unknowns(facts: Facts) -> str:
    claimed = facts.report.get("dataset", {}).get("contamination")
    known = "was looked for by digest and not found" if claimed == "none" else "is **unknown**"
    lines = [
        f"Whether pictures it is judged by were trained on: {known}; near-duplicates are told by "
        "a threshold, and some stay.",
        "Whether the training took place as the records say: they agree with each other, and are "
        "signed. That is not proof.",
        "When it was made: times are those of the machine's own clock.",
    ]
    lines += [
        f"What {code(name)} was trained on: nobody here knows." for name in facts.unknown_roots
    ]
    waived = [gate for gate in facts.gates if gate["waiver"] is not None]
    lines += [
        f"Gate {code(gate['name'])} failed and was waived by {code(gate['waiver']['who'])} until "
        f"{code(gate['waiver']['until'])}: {code(gate['waiver']['why'])}. It had found: "
        f"{prose(str(gate['reason']))}."
        for gate in waived
    ]
    return "\n".join(["## What is not known", "", *_items(lines)])


def _verifying(facts: Facts) -> str:
    return "\n".join(
        [
            "## How to verify it",
            "",
            f"    dinov3 verify DIR --key PUBLISHER.pub --expect {facts.name}",
            "",
            "Compare the fingerprint of the key with one you did not get from here. The command "
            "hashes every file, follows every record, and needs neither network nor torch.",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _items(texts: Iterable[str]) -> Iterator[str]:
    return (f"- {text}" for text in texts)
