# SPDX-License-Identifier: Apache-2.0
"""Registration with the auto classes, tokenizers, and the defaults of generation."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hf_helpers import random_ids
from oracle import random_tensors, tiny_config, write_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from minimax_plugin.architecture import EOS_TOKEN_ID, PAD_TOKEN_ID, RELEASED_VOCAB_SIZE, VOCAB_PADDING_START
from minimax_plugin.hf_modeling.modeling_minimax_m1 import MiniMaxM1ForCausalLM, MiniMaxText01ForCausalLM
from minimax_plugin.templates import chat_template

#: The split of o200k_base, published with tiktoken, which the released merges were trained with: digits in groups of up
#: to three, contractions attached, camelCase apart.
O200K_SPLIT = "|".join(
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
TEXT = "The company's 1234567 camelCase tokens won't cost $12.50 in 2025 中文字符 don't"


@pytest.mark.parametrize("trust_remote_code", [None, True, False])
@pytest.mark.parametrize(
    ("model_type", "model_class"),
    [
        ("minimax_m1", MiniMaxM1ForCausalLM),
        ("MiniMaxM1", MiniMaxM1ForCausalLM),
        ("minimax_text_01", MiniMaxText01ForCausalLM),
    ],
)
def test_auto_classes_need_no_remote_code(
    tmp_path: Path,
    model_type: str,
    model_class: type[PreTrainedModel],
    trust_remote_code: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(prompt: str = "") -> str:
        raise AssertionError(f"asked the user: {prompt}")

    monkeypatch.setattr("builtins.input", refuse)
    config = tiny_config(model_type=model_type)
    assert "auto_map" in config
    path = write_checkpoint(tmp_path, config)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code)
    assert type(model) is model_class
    assert type(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)) is model_class.config_class
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["architectures"] == [model_class.__name__]
    assert saved["model_type"] == model_class.config_class.model_type


def test_import_registers_and_leaves_vllm_alone() -> None:
    program = (
        "import sys, minimax_plugin; from transformers import CONFIG_MAPPING; "
        "assert 'minimax_m1' in CONFIG_MAPPING; assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_registering_twice_changes_nothing() -> None:
    from minimax_plugin.hf_modeling import registration

    registration._registered = False
    registration.register()
    registration.register()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with the split of the released tokenizer, described as the released checkpoint describes it."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>", "<end_of_document>"],
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    tokenizer.model.save(str(path))
    (path / "config.json").write_text(json.dumps(tiny_config(vocab_size=512)))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_prefix_space": False,
                "bos_token": "<beginning_of_sentence>",
                "eos_token": "<end_of_sentence>",
                "unk_token": "<end_of_document>",
                "tokenizer_class": "GPT2Tokenizer",
            }
        )
    )
    return path


@pytest.fixture
def released_template(checkpoint_dir: Path) -> str:
    return json.loads((checkpoint_dir / "tokenizer_config.json").read_text())["chat_template"]


def variants(path: Path) -> Iterator[Path]:
    """The tokenizer under every model type."""
    for model_type in ("minimax_m1", "MiniMaxM1", "minimax_text_01"):
        (path / "config.json").write_text(json.dumps(tiny_config(vocab_size=512, model_type=model_type)))
        yield path


def test_tokenizer_splits_as_its_file_says(tokenizer_dir: Path, tmp_path: Path) -> None:
    expected = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(TEXT).ids
    for path in variants(tokenizer_dir):
        assert AutoTokenizer.from_pretrained(path)(TEXT).input_ids == expected
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tokenizer_dir / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == expected
    assert tokenizer.decode(expected) == TEXT


def test_tokenizer_of_a_converted_checkpoint_splits_as_its_file_says(tokenizer_dir: Path, tmp_path: Path) -> None:
    """vLLM serves those whose names end in ``-hf`` with this package's model."""
    for file in tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimax", "vocab_size": 512}))
    expected = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids == expected


def test_class_named_by_the_checkpoint_would_split_differently(tokenizer_dir: Path) -> None:
    """The trap itself; if this fails, transformers has changed and the registration may be simplified."""
    from transformers import GPT2Tokenizer

    expected = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(TEXT).ids
    assert GPT2Tokenizer.from_pretrained(tokenizer_dir)(TEXT).input_ids != expected


def test_released_template_is_replaced_and_others_are_kept(
    tokenizer_dir: Path, tmp_path: Path, released_template: str
) -> None:
    for name, template, expected in (("released", released_template, chat_template()), ("own", "{{ 1 }}", "{{ 1 }}")):
        path = tmp_path / name
        path.mkdir()
        for file in tokenizer_dir.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        assert AutoTokenizer.from_pretrained(path).chat_template == expected


def released_vocabulary() -> dict[str, object]:
    return tiny_config(vocab_size=RELEASED_VOCAB_SIZE, hidden_size=16, num_hidden_layers=1, attn_type_list=[0])


def test_generation_defaults_that_the_release_leaves_out(tmp_path: Path) -> None:
    config = released_vocabulary()
    tensors = random_tensors(config)
    # A head that prefers a padding row, then the end of sentence.
    tensors["lm_head.weight"].zero_()
    tensors["model.norm.weight"].fill_(1.0)
    path = write_checkpoint(tmp_path / "a", config, tensors)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.generation_config.eos_token_id == EOS_TOKEN_ID
    assert model.generation_config.pad_token_id == PAD_TOKEN_ID
    assert not model.generation_config.do_sample
    with torch.no_grad():
        last = model.model(random_ids(1, 4)).last_hidden_state[0, -1]
        model.lm_head.weight[VOCAB_PADDING_START + 3] = 4 * last
        model.lm_head.weight[EOS_TOKEN_ID] = 2 * last
    generated = model.generate(random_ids(1, 4), max_new_tokens=5)
    assert generated[0, 4:].tolist() == [EOS_TOKEN_ID]
    model.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == EOS_TOKEN_ID
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").generation_config.eos_token_id == EOS_TOKEN_ID


def test_generation_defaults_of_a_checkpoint_win(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, released_vocabulary())
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "pad_token_id": 8}))
    generation_config = AutoModelForCausalLM.from_pretrained(path).generation_config
    assert (generation_config.eos_token_id, generation_config.pad_token_id) == (7, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_ids_without_an_embedding_are_not_generated(tmp_path: Path, tied: bool) -> None:
    """The rest of a vocabulary that was rounded up: with a tied head its logit is 0, which may be the highest."""
    config = tiny_config(tie_word_embeddings=tied)
    tensors = random_tensors(config)
    unused = [90, *range(120, 128)]
    tensors["model.embed_tokens.weight"][unused] = 0
    path = write_checkpoint(tmp_path, config, tensors)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.generation_config.suppress_tokens == unused
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.index_fill(-1, torch.tensor(unused), 1e4))
    generated = model.generate(random_ids(1, 4, 64), max_new_tokens=8)
    assert not set(generated[0, 4:].tolist()) & set(unused)
    config |= {"mask_vocab_padding": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.suppress_tokens is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": [5]}))
    assert AutoModelForCausalLM.from_pretrained(path).generation_config.suppress_tokens == [5]


def test_other_vocabularies_get_no_defaults(tmp_path: Path) -> None:
    generation_config = AutoModelForCausalLM.from_pretrained(
        write_checkpoint(tmp_path, tiny_config())
    ).generation_config
    assert generation_config.eos_token_id is None
    assert generation_config.suppress_tokens is None
