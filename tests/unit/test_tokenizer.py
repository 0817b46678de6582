"""Captions become the ids that CLIP and dino.txt were trained with."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov3.data.tokenizer import tokenize, vocabulary_size
from dinov3.errors import DataError

START, END = 49406, 49407


def ids_of(caption):
    """The ids between start and end."""
    (row,) = tokenize([caption]).tolist()
    assert row[0] == START
    end = row.index(END)
    assert not any(row[end + 1 :])
    return row[1:end]


@pytest.mark.parametrize(
    ("caption", "ids"),
    [
        ("a diagram", [320, 22697]),
        ("a dog", [320, 1929]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
    ],
)
def test_known_captions_have_the_known_ids(caption, ids):
    assert ids_of(caption) == ids


@pytest.fixture(scope="module")
def oracle():
    """An independent implementation over the same list of merges."""
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("open_clip.tokenizer")
    lines = gzip.decompress(Path(library.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    symbols = list(library.bytes_to_unicode().values())
    symbols += [f"{symbol}</w>" for symbol in symbols] + ["".join(merge) for merge in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)


@pytest.mark.parametrize(
    "caption",
    [
        "a photo of a cat",
        "A  Diagram!",
        "cat's 42 tails",
        "it's don't we'll café",
        "snake_case-and/slash...",
        "an extraordinarily uncharacteristic otorhinolaryngologist",
        "日本の猫 🐈",
        "",
    ],
)
def test_ids_equal_those_of_an_independent_implementation(oracle, caption):
    assert [START, *ids_of(caption), END] == oracle(caption)["input_ids"]


def test_ids_are_zero_padded_longs_in_the_order_of_the_captions():
    tokens = tokenize(["a dog", "a diagram"], context_length=6)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == [[START, 320, 1929, END, 0, 0], [START, 320, 22697, END, 0, 0]]


def test_the_context_is_77_unless_stated():
    assert tokenize(["a dog"]).shape == (1, 77)


def test_a_long_caption_is_cut_and_still_ends():
    (row,) = tokenize(["dog " * 200]).tolist()
    assert row == [START, *[1929] * 75, END]


def test_a_caption_that_just_fits_is_not_cut():
    (row,) = tokenize(["a dog"], context_length=4).tolist()
    assert row == [START, 320, 1929, END]


@pytest.mark.parametrize(
    "caption", ["A Photo OF a CAT", "  a photo\n\tof  a cat ", "a photo of a&amp;nbsp;cat"]
)
def test_case_spacing_and_markup_do_not_matter(caption):
    assert ids_of(caption) == ids_of("a photo of a cat")


def test_broken_unicode_is_mended():
    assert ids_of("a cafÃ©") == ids_of("a café")


def test_digits_stand_alone_and_contractions_split():
    assert ids_of("42") == ids_of("4 2")
    assert ids_of("cat's") == [*ids_of("cat"), 568]


def test_any_language_has_ids():
    assert all(0 < each < START for each in ids_of("日本の猫 🐈"))


def test_special_tokens_are_spelled_as_clip_does():
    (row,) = tokenize(["a <|endoftext|> dog"], context_length=7).tolist()
    assert row == [START, 320, END, 1929, END, 0, 0]
    assert END not in ids_of("a <end_of_text> dog")


def test_an_empty_caption_is_start_and_end():
    assert ids_of("") == []


def test_no_captions_are_no_rows():
    assert tokenize([]).shape == (0, 77)


def test_the_end_is_the_highest_id_of_the_vocabulary():
    assert vocabulary_size() == END + 1
    assert tokenize(["zebra 🦓"]).max() == END


def test_a_single_string_is_refused():
    with pytest.raises(DataError, match="texts: must be a sequence of captions, got 'a dog'"):
        tokenize("a dog")


def test_a_context_without_room_is_refused():
    with pytest.raises(DataError, match="context_length: start and end take 2 ids, got 1"):
        tokenize(["a dog"], context_length=1)


def test_importing_the_module_does_not_import_the_library():
    code = "import sys, dinov3.data.tokenizer; sys.exit('open_clip' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
