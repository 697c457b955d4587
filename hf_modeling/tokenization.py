# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the family: split text as ``tokenizer.json`` says, and render chats with the packaged template."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minimax_plugin.hf_modeling.compat import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS, TOKENIZER_MAPPING_NAMES
from minimax_plugin.hf_modeling.configuration_minimax_m1 import CONFIG_CLASSES
from minimax_plugin.templates import chat_template

#: What the template of the released checkpoint does and no other has reason to: it takes the first part of a list and
#: nothing else, so that content given as a string fails and a second part is lost.
_FIRST_PART_ONLY = "message['content'][0]['text']"


class MiniMaxM1Tokenizer(PreTrainedTokenizerFast):
    """What ``AutoTokenizer`` resolves for the family; :meth:`from_pretrained` returns a plain fast tokenizer.

    The class must have no ``__init__``: transformers takes one as a sign that the tokenizer is to be built anew from
    vocabulary and merges.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedTokenizerFast:
        """Load ``tokenizer.json``; the released chat template is replaced by the packaged one, any other is kept."""
        tokenizer = PreTrainedTokenizerFast.from_pretrained(*args, **kwargs)
        if isinstance(tokenizer.chat_template, str) and _FIRST_PART_ONLY in tokenizer.chat_template:
            tokenizer.chat_template = chat_template()
        return tokenizer


def register_tokenizers() -> None:
    """Make ``AutoTokenizer`` read ``tokenizer.json`` although the checkpoint says ``GPT2Tokenizer``.

    That class rebuilds the tokenizer with the text splitting of GPT-2 and gives other ids without a word. Registering
    a tokenizer class alone does not help: transformers goes by the name in ``tokenizer_config.json`` unless the model
    type is on its list of wrong names.
    """
    for config_class in CONFIG_CLASSES:
        AutoTokenizer.register(config_class, fast_tokenizer_class=MiniMaxM1Tokenizer, exist_ok=True)
        TOKENIZER_MAPPING_NAMES[config_class.model_type] = MiniMaxM1Tokenizer.__name__
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config_class.model_type)
