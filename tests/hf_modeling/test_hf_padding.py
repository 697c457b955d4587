# SPDX-License-Identifier: Apache-2.0
"""Batches of text: the pad token that no file of the release names, on the side where generation wants it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import load_fp32
from transformers import AutoTokenizer

from minimax_plugin.cli.tiny import TinyOptions, write_tiny_checkpoint

TEXTS = ["The river carries every boat", "1", "They'd walked for hours through the quiet forest before"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("padding") / "tiny"
    write_tiny_checkpoint(directory, TinyOptions(num_hidden_layers=2))
    return directory


@pytest.fixture
def changed(tiny: Path, tmp_path: Path) -> Any:
    """Write a copy of the tokenizer, its settings or its whole description changed, and load it."""

    def change(old: str = "", new: str = "", **settings: Any) -> Any:
        shutil.copy(tiny / "config.json", tmp_path)
        text = (tiny / "tokenizer.json").read_text(encoding="utf-8")
        (tmp_path / "tokenizer.json").write_text(text.replace(old, new) if old else text, encoding="utf-8")
        config = json.loads((tiny / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | settings))
        return AutoTokenizer.from_pretrained(tmp_path)

    return change


def test_the_files_name_no_pad_token(tiny: Path, checkpoint_dir: Path) -> None:
    """As in the release; otherwise the tests below would show nothing."""
    for folder in (tiny, checkpoint_dir):
        assert not {"pad_token", "padding_side"} & json.loads((folder / "tokenizer_config.json").read_text()).keys()


def test_pad_token_of_the_vocabulary_on_the_left(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    added = json.loads((tiny / "tokenizer.json").read_text())["added_tokens"]
    pad_id = next(token["id"] for token in added if token["content"] == "<pad>")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", pad_id)
    batch = tokenizer(TEXTS, padding=True)
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    for ids, mask, length in zip(batch.input_ids, batch.attention_mask, lengths, strict=True):
        assert ids[: len(ids) - length] == [pad_id] * (max(lengths) - length)
        assert mask == [0] * (max(lengths) - length) + [1] * length


def test_what_a_checkpoint_or_a_caller_states_wins(changed: Any, tiny: Path) -> None:
    tokenizer = changed(pad_token="<end_of_document>", padding_side="right")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<end_of_document>", "right")
    tokenizer = AutoTokenizer.from_pretrained(tiny, padding_side="right", pad_token="<fim_pad>")
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<fim_pad>", "right")


def test_vocabulary_without_the_token(changed: Any) -> None:
    tokenizer = changed("<pad>", "<unused>")
    size = len(tokenizer)
    assert tokenizer.pad_token is None
    assert "<pad>" not in tokenizer.get_vocab() and len(tokenizer) == size


def test_a_batch_generates_what_each_text_does_alone(tiny: Path) -> None:
    model, tokenizer = load_fp32(tiny), AutoTokenizer.from_pretrained(tiny)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    together = model.generate(**batch, **options)[:, batch.input_ids.shape[1] :]
    for row, text in zip(together, TEXTS, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        alone = model.generate(**inputs, **options)[0, inputs.input_ids.shape[1] :]
        assert torch.equal(row[: len(alone)], alone)
        assert (row[len(alone) :] == tokenizer.pad_token_id).all()
