# SPDX-License-Identifier: Apache-2.0
"""Chats before they are rendered: no text in them can act as a control token.

A tokenizer finds its special tokens in any text, so ``<end_of_sentence>`` typed by a user would end that user's turn
and let the rest pass for another one. Between rendering a chat and encoding it there is nothing but text, and vLLM
takes the two steps apart, so the text itself is made harmless: a zero-width space goes behind the first character of
every control token that stands in a message, a tool or a document. Other text is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import reprlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers.utils import get_json_schema

logger = logging.getLogger(__name__)

#: ZERO WIDTH SPACE: shows as nothing, is no whitespace to ``strip``, and is part of no token that a template writes.
BREAK = "\u200b"


class ControlTokens:
    """The strings that must not appear in what a user, a tool or a model has said.

    Args:
        tokens: at least two characters each; nothing fits into shorter ones, which are left alone.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted({token for token in tokens if len(token) > 1}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def break_up(self, pieces: Sequence[str]) -> list[str]:
        """Break every control token in texts that a template may join without anything between them.

        Raises:
            ValueError: a text cannot be encoded, it holds half of a surrogate pair.
        """
        pieces, joined = list(pieces), "".join(pieces)
        if not joined.isascii():
            _require_encodable(joined)
        while self._pattern is not None and (matches := list(self._pattern.finditer(joined))):
            for token in {match[0] for match in matches}:
                _warn_once(token)
            pieces = _insert_breaks(pieces, [match.start() + 1 for match in matches])
            joined = "".join(pieces)
        return pieces

    def neutral(self, value: Any) -> Any:
        """A copy of ``value`` in which every string, keys of dictionaries too, is free of control tokens.

        Raises:
            ValueError: something that is neither text, number, list nor dictionary: what a template would make of it
                cannot be checked.
        """
        if isinstance(value, str):
            return self.break_up([value])[0]
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self._neutral_key(key): self.neutral(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.neutral(item) for item in value]
        if callable(getattr(value, "model_dump", None)):  # messages of the OpenAI client
            return self.neutral(value.model_dump())
        raise ValueError(
            f"a chat holds {reprlib.repr(value)} of type {type(value).__name__}, expected text, numbers, lists and "
            "dictionaries"
        )

    def _neutral_key(self, key: Any) -> Any:
        if key is None or isinstance(key, str | bool | int | float):
            return self.neutral(key)
        raise ValueError(f"a chat holds the key {reprlib.repr(key)} of type {type(key).__name__}, expected text")

    def neutral_chat(self, messages: Any) -> list[Any]:
        """A copy of one chat, list of messages, free of control tokens, however a template joins its texts.

        Text parts of a message are joined by the packaged template, and so are all system messages.

        Raises:
            ValueError: no list of messages, or see :meth:`neutral` and :meth:`break_up`.
        """
        messages = getattr(messages, "messages", messages)
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise ValueError(f"a chat is {reprlib.repr(messages)}, expected a list of messages")
        chat = [self.neutral(message) for message in messages]
        for message in chat:
            if not isinstance(message, dict):
                raise ValueError(f"a message is {reprlib.repr(message)}, expected an object with a role and a content")
        slots_of_system: list[tuple[Any, Any]] = []
        groups = [slots_of_system]
        for message in chat:
            slots = list(_text_slots(message))
            if message.get("role") == "system":
                slots_of_system += slots
            else:
                groups.append(slots)
        for slots in groups:
            texts = self.break_up([holder[key] for holder, key in slots])
            for (holder, key), text in zip(slots, texts, strict=True):
                holder[key] = text
        return chat

    def neutral_tools(self, tools: Any) -> Any:
        """Tool schemas free of control tokens; functions become schemas as in transformers."""
        if not isinstance(tools, list | tuple):
            return self.neutral(tools)
        is_code = [inspect.isfunction(tool) or inspect.ismethod(tool) for tool in tools]
        return [self.neutral(get_json_schema(t) if code else t) for t, code in zip(tools, is_code, strict=True)]


@functools.lru_cache(maxsize=32)
def control_tokens(tokens: frozenset[str]) -> ControlTokens:
    """:class:`ControlTokens`, compiled once per set."""
    return ControlTokens(tokens)


def _text_slots(message: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Where the text of a message stands, as (container, key)."""
    content = message.get("content")
    if isinstance(content, str):
        yield message, "content"
    elif isinstance(content, list):
        for index, part in enumerate(content):
            if isinstance(part, str):
                yield content, index
            elif isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part, "text"


def _insert_breaks(pieces: list[str], positions: list[int]) -> list[str]:
    """Put :data:`BREAK` at ascending ``positions`` of the joined text, at the end of a piece rather than before one."""
    broken, start, done = [], 0, 0
    for piece in pieces:
        upto = bisect_right(positions, start + len(piece), lo=done)
        cuts = [0, *(position - start for position in positions[done:upto]), len(piece)]
        broken.append(BREAK.join(piece[a:b] for a, b in pairwise(cuts)))
        start, done = start + len(piece), upto
    return broken


def _require_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a chat holds {text[error.start]!r} (character {error.start} of a text), half of a surrogate pair, which "
            "stands for no character; decode the text anew"
        ) from None


@functools.lru_cache(maxsize=1024)
def _warn_once(token: str) -> None:
    logger.warning(
        "a chat holds the control token %s; it is encoded as plain text (control_tokens_in_content of the tokenizer "
        "turns that off)",
        token,
    )
