# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files of a tiny checkpoint: a small byte-level BPE built like the released one.

Like the released tokenizer, ``tokenizer_config.json`` names ``GPT2Tokenizer`` although ``tokenizer.json`` splits text
by another rule, so that a loader which trusts the class name tokenises wrongly here too.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

#: How the released tokenizer splits text before BPE: the published ``o200k_base`` pattern (digits in groups of up to
#: three, contractions attached to their word, camelCase split).
SPLIT_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

BOS_TOKEN = "<beginning_of_sentence>"
EOS_TOKEN = "<end_of_sentence>"
UNK_TOKEN = "<end_of_document>"
PAD_TOKEN = "<pad>"

#: In the order of the released ids 200000 to 200025. ``<begin_of_document>``, which opens every chat, comes last: its
#: released id is not known.
SPECIAL_TOKENS = (
    PAD_TOKEN,
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<reponame>", "<filename>", "<gh_stars>"),
    *("<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>"),
    *(BOS_TOKEN, EOS_TOKEN, UNK_TOKEN),
    *("<function_call>", "<code_interpreter>", "<speech>", "<image>"),
    "<begin_of_document>",
)

#: Ids kept free of merges: the special tokens, and a few rows without a token as in the released vocabulary.
RESERVED_IDS = 32
MIN_VOCAB_SIZE = 256 + RESERVED_IDS

_CORPUS = """
The river carries every boat past the old stone bridge, and nobody on the shore remembers who built it.
Some say that it was the miller's daughter; others think it has always been there, as the hills have.
When lightning strikes the tower, the whole village counts the seconds until the thunder answers: one, two, three.
She wrote down 12 names, 365 days and the year 1984, then closed the book because there wasn't more to remember.
A long memory does not need to keep each word; it keeps what the words have done to it, and lets the rest decay.
They'd walked for hours through the quiet forest before the first light touched the highest branches.
"What do you see?" asked the teacher. "I see a question," said the child, "and behind it there's another question."
In the morning the market opens with bread, apples, salt and news from the coast, sold by weight or by the hour.
If a machine could read a thousand books in one afternoon, would it know which of them was worth the evening?
He isn't sure. We aren't either, but the answer we'll give tomorrow should be the same as the answer given today.
Rain falls on the garden, on the road and on the sea, and it makes no difference to the rain where it has fallen.
Good tools are simple: you learn them once, you trust them often, and you never think about them while you work.
The train left at 7:45 and came back at 23:10, which is late for a small town with only one clock and no hurry.
Under the window the cat watches the snow, patient as a stone, waiting for something that can't happen twice.
"""


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE with at most ``vocab_size - 32`` plain ids, followed by the special tokens.

    Raises:
        ValueError: ``vocab_size`` leaves no room for 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE} (256 bytes, special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - RESERVED_IDS,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.strip().splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def printable_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of plain tokens that are printable ASCII, so that any sequence of them decodes to readable text."""
    special = {tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    return [i for i in ids if (text := tokenizer.decode([i])) and text.isascii() and text.isprintable()]


def write_tokenizer(directory: Path, tokenizer: Tokenizer, *, chat_template: str) -> None:
    """Write ``tokenizer.json``, ``vocab.json``, ``merges.txt`` and ``tokenizer_config.json``."""
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.model.save(str(directory))
    config = {
        "add_prefix_space": False,
        "bos_token": BOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS_TOKEN,
        "model_max_length": 40960000,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": UNK_TOKEN,
        "chat_template": chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
