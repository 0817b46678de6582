"""`README.md` of a release: the model card, with the header that the Hugging Face hub reads.

Its text is made by `dinov3.release.card`, which whoever verifies the release makes it with again.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dinov3.publish.draft import Draft
from dinov3.release.card import Words, render_body
from dinov3.release.card_facts import Facts, header_of


def render_card(draft: Draft) -> str:
    """The whole card."""
    images, card = draft.images, draft.config.card
    facts = Facts(
        name=draft.name,
        licence=draft.licence,
        network=draft.network,
        report=draft.report,
        gates=draft.checks["gates"],
        records={node.digest: node.record for node in draft.evidence.nodes},
        final=draft.evidence.final.digest,
        evaluation=draft.evidence.evaluation.digest,
        num_images=None if images is None else (images.num_trained, images.num_evaluated),
    )
    header = yaml.dump(_quoted(header_of(facts)), Dumper=_Dumper, sort_keys=False, width=math.inf)
    words = Words(card.summary, card.intended_uses, card.limitations)
    return f"---\n{header}---\n{render_body(facts, words)}"


class _Quoted(str):
    """A value of the header, in quotes whatever it is: no reader takes it for anything but text."""


class _Dumper(yaml.SafeDumper):
    """Writes quoted text in double quotes, every other sign than ASCII escaped."""


_Dumper.add_representer(
    _Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def _quoted(value: Any) -> Any:
    if isinstance(value, str):
        return _Quoted(value)
    if isinstance(value, Mapping):
        return {name: _quoted(below) for name, below in value.items()}
    if isinstance(value, Sequence):
        return [_quoted(below) for below in value]
    return value
