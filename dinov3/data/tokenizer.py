"""Captions to token ids: CLIP's byte-level BPE as open-clip-torch ships it, vocabulary included.

open_clip spells the two special tokens otherwise than CLIP and dino.txt do, so a caption that
holds either spelling literally would become other ids; the tokenizer here uses CLIP's spelling.
Loading takes seconds (open_clip imports its models), so it waits for the first use.
"""

# B captions, N ids of a caption

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dinov3.errors import DataError

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

CONTEXT_LENGTH = 77
_SPELLINGS = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def tokenize(texts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
    """Token ids [B, N] of captions: start, text, end, then zeros.

    A longer caption is cut, and its last id is the end of the text all the same.

    Args:
        texts: B captions, in any case and spacing.
        context_length: N.

    Raises:
        DataError: A single string instead of a sequence of them, or no room for both ends.
    """
    if isinstance(texts, str):
        msg = f"texts: must be a sequence of captions, got {texts!r}. Put it in a list."
        raise DataError(msg)
    if context_length < 2:
        msg = f"context_length: start and end take 2 ids, got {context_length}. Enlarge it."
        raise DataError(msg)
    ids: Tensor = _tokenizer()(list(texts), context_length=context_length)
    return ids


def vocabulary_size() -> int:
    """Number of token ids, the two special ones included."""
    return int(_tokenizer().vocab_size)


@functools.cache
def _tokenizer() -> "SimpleTokenizer":
    import regex
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    pattern = tokenizer.pat.pattern
    for theirs, clip in _SPELLINGS.items():
        pattern = pattern.replace(theirs, regex.escape(clip))
        tokenizer.encoder[clip] = tokenizer.encoder.pop(theirs)
    tokenizer.decoder = {index: symbol for symbol, index in tokenizer.encoder.items()}
    tokenizer.cache = {clip: clip for clip in _SPELLINGS.values()}
    tokenizer.pat = regex.compile(pattern, regex.IGNORECASE)
    return tokenizer
