# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of the family: split text as ``tokenizer.json`` says, and render chats that nobody can forge."""

from __future__ import annotations

import logging
import os
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from minimax_plugin.hf_modeling import compat
from minimax_plugin.hf_modeling.chat import control_tokens
from minimax_plugin.hf_modeling.configuration_minimax_m1 import CONFIG_CLASSES
from minimax_plugin.templates import chat_template

logger = logging.getLogger(__name__)

#: What the template of the released checkpoint does and no other has reason to: it takes the first part of a list and
#: nothing else, so that content given as a string fails and a second part is lost.
_FIRST_PART_ONLY = "message['content'][0]['text']"

#: Id 200000 of the released vocabulary, named in no file of the released checkpoint.
PAD_TOKEN = "<pad>"

#: What the packaged template writes, control tokens even if a ``tokenizer.json`` does not flag them as special.
_TURN_TOKENS = ("<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>", "<end_of_document>")


_CLASS_NAME = "MiniMaxM1Tokenizer"

#: Model types whose folders hold this tokenizer; "minimax" are the converted checkpoints (``-hf``), which vLLM serves
#: with this package and transformers with a model of its own.
_MODEL_TYPES = (*(config_class.model_type for config_class in CONFIG_CLASSES), "minimax")


class MiniMaxM1Tokenizer(PreTrainedTokenizerFast):
    """What ``AutoTokenizer`` gives for the family: ``tokenizer.json`` as it is, and chats without forged turns.

    Pads on the left, because generation goes on from the last column of a batch.

    The class must have no ``__init__``: transformers takes one as a sign that the tokenizer is to be built anew from
    vocabulary and merges. Without this package its folders load as a plain fast tokenizer.
    """

    padding_side = "left"

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MiniMaxM1Tokenizer:
        """Load ``tokenizer.json``; the released chat template is replaced by the packaged one, any other is kept.

        Args:
            control_tokens_in_content: True lets control tokens in messages act as such, see
                :attr:`control_tokens_in_content`. Also an entry of ``tokenizer_config.json``.
        """
        tokenizer = super().from_pretrained(*args, **kwargs)
        if isinstance(tokenizer.chat_template, str) and _FIRST_PART_ONLY in tokenizer.chat_template:
            tokenizer.chat_template = chat_template()
        if tokenizer.pad_token is None and tokenizer.backend_tokenizer.token_to_id(PAD_TOKEN) is not None:
            tokenizer.pad_token = PAD_TOKEN
        # Saved with the tokenizer, for loaders without this class.
        tokenizer.init_kwargs.setdefault("padding_side", tokenizer.padding_side)
        return tokenizer

    @property
    def control_tokens_in_content(self) -> bool:
        """Whether control tokens in messages, tools and documents keep their meaning; False unless set.

        No argument of :meth:`apply_chat_template`, because servers pass on what a request asks for.
        """
        return bool(self.__dict__.get("init_kwargs", {}).get("control_tokens_in_content", False))

    @control_tokens_in_content.setter
    def control_tokens_in_content(self, value: bool) -> None:
        self.init_kwargs["control_tokens_in_content"] = bool(value)

    @property
    def control_tokens(self) -> frozenset[str]:
        """The special tokens of the vocabulary, and what the template writes between messages."""
        added = self.added_tokens_decoder.values()
        flagged = {token.content for token in added if token.special or token.content in _TURN_TOKENS}
        return frozenset(flagged | set(self.all_special_tokens))

    def apply_chat_template(
        self, conversation: Any, tools: Any = None, documents: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Render a chat, or a list of chats, see ``PreTrainedTokenizerBase.apply_chat_template``.

        Control tokens in messages, tools and documents are broken by a zero-width space, so that no text opens or ends
        a turn; tokens of any other text are those that the tokenizer gives it.

        Raises:
            ValueError: no list of messages, something in it that is not JSON, or what the template refuses.
        """
        control = control_tokens(frozenset() if self.control_tokens_in_content else self.control_tokens)
        try:
            batched = isinstance(conversation, list | tuple) and any(map(_is_chat, conversation[:1]))
            chats = [control.neutral_chat(chat) for chat in (conversation if batched else [conversation])]
            _check_final_messages(chats, kwargs.get("continue_final_message"))
            conversation = chats if batched else chats[0]
            tools, documents = control.neutral_tools(tools), control.neutral(documents)
            return super().apply_chat_template(conversation, tools, documents, *args, **kwargs)
        except TemplateError as error:
            raise ValueError(str(error)) from error
        except RecursionError:
            raise ValueError("a chat is nested too deeply to be rendered") from None


def register_tokenizers() -> None:
    """Make ``AutoTokenizer`` read ``tokenizer.json`` although the checkpoint says ``GPT2Tokenizer``.

    That class rebuilds the tokenizer with the text splitting of GPT-2 and gives other ids without a word. Registering
    a tokenizer class alone does not help: transformers goes by the name in ``tokenizer_config.json`` unless the model
    type is on its list of wrong names, and by that list only if the file has no ``auto_map``.
    """
    for config_class in CONFIG_CLASSES:
        AutoTokenizer.register(config_class, fast_tokenizer_class=MiniMaxM1Tokenizer, exist_ok=True)
    for model_type in _MODEL_TYPES:
        compat.TOKENIZER_MAPPING_NAMES[model_type] = _CLASS_NAME
        compat.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(model_type)
    compat.wrap_tokenizer_config(_own_tokenizer_config)


def _is_chat(value: Any) -> bool:
    """Whether an element of a conversation is a chat of its own, as transformers tells it."""
    return isinstance(value, list | tuple) or hasattr(value, "messages")


def _check_final_messages(chats: list[list[Any]], key: Any) -> None:
    """transformers adds a mark to the text that is to be continued, whatever that is.

    Raises:
        ValueError: there is no such text.
    """
    if not key:
        return
    key = key if isinstance(key, str) else "content"
    for chat in chats:
        text = chat[-1].get(key) if chat else None
        if isinstance(text, list):
            parts = [part["text"] for part in text if isinstance(part, dict) and "text" in part]
            text = parts[-1] if parts else None
        if not isinstance(text, str):
            raise ValueError(f"continue_final_message: {key} of the last message is {text!r}, expected text")


def _own_tokenizer_config(path: Any, tokenizer_config: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """The contents of a ``tokenizer_config.json`` as ``AutoTokenizer`` is to see them.

    For a folder of the family they name this package's class and no code of the folder. The tables of
    :func:`register_tokenizers` do the same where there is no ``auto_map``, so a hub is not asked again for those.
    """
    if not (os.path.isdir(str(path)) or "auto_map" in tokenizer_config) or not _is_of_the_family(path, kwargs):
        return tokenizer_config
    if "auto_map" in tokenizer_config:
        logger.warning(
            "tokenizer_config.json of %s names code (auto_map); it is not run, %s is used", path, _CLASS_NAME
        )
    kept = {key: value for key, value in tokenizer_config.items() if key != "auto_map"}
    return kept | {"tokenizer_class": _CLASS_NAME}


def _is_of_the_family(path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the config.json beside a tokenizer states one of our model types; a file that is read, not run."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    except (OSError, ValueError):
        return False
    return config.get("model_type") in _MODEL_TYPES
