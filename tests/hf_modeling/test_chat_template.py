# SPDX-License-Identifier: Apache-2.0
"""The packaged chat template beside the one of the released checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from minimax_plugin.templates import chat_template

TOOL = {"type": "function", "function": {"name": "f", "description": "é<&>", "parameters": {"type": "object"}}}


def render(template: str, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    return render_jinja_template([messages], chat_template=template, **kwargs)[0][0]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.fixture(scope="module")
def released(checkpoint_dir: Path) -> str:
    return json.loads((checkpoint_dir / "tokenizer_config.json").read_text())["chat_template"]


MESSAGES = st.lists(
    st.one_of(
        st.builds(
            lambda role, text: {"role": role, "content": parts(text)}, st.sampled_from(["system", "user"]), st.text()
        ),
        st.builds(lambda texts: {"role": "assistant", "content": parts(*texts)}, st.lists(st.text(), max_size=3)),
        st.builds(
            lambda results: {"role": "tool", "content": [{"type": "text", "name": n, "text": t} for n, t in results]},
            st.lists(st.tuples(st.text(min_size=1), st.text()), max_size=3),
        ),
    ),
    max_size=6,
)


@settings(max_examples=100)
@given(messages=MESSAGES, add_generation_prompt=st.booleans())
def test_equals_the_released_template_where_that_one_works(
    released: str, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    kwargs = {"add_generation_prompt": add_generation_prompt}
    assert render(chat_template(), messages, **kwargs) == render(released, messages, **kwargs)


def test_tools_differ_only_in_the_quotes_that_the_released_template_loses(released: str) -> None:
    messages = [{"role": "user", "content": parts("hi")}]
    ours, theirs = (render(template, messages, tools=[TOOL]) for template in (chat_template(), released))
    lost = "{name: <tool-name-1>, arguments: <args-json-object-1>}"
    assert lost in theirs
    assert ours == theirs.replace(lost, '{"name": <tool-name-1>, "arguments": <args-json-object-1>}')


@settings(max_examples=50)
@given(messages=MESSAGES)
def test_string_and_list_content_give_the_same_text(messages: list[dict[str, Any]]) -> None:
    chat = [message for message in messages if message["role"] != "tool"]
    as_strings = [{**m, "content": "".join(part["text"] for part in m["content"])} for m in chat]
    assert render(chat_template(), as_strings) == render(chat_template(), chat)


def test_every_text_part_is_kept() -> None:
    assert "onetwo<end_of_sentence>" in render(chat_template(), [{"role": "user", "content": parts("one", "two")}])


@pytest.mark.parametrize("arguments", [{"city": "Zürich"}, '{"city": "Zürich"}'], ids=["object", "string"])
@pytest.mark.parametrize("text", [None, "", "Let me see."])
def test_tool_calls_and_results(text: str | None, arguments: object) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    rendered = render(
        chat_template(),
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call-1", "content": "sunny"},
        ],
        add_generation_prompt=True,
    )
    before = f"{text}\n" if text else ""
    assert rendered == (
        "<begin_of_document><beginning_of_sentence>user name=user\nWeather?<end_of_sentence>\n"
        f"<beginning_of_sentence>ai name=assistant\n{before}<tool_calls>\n"
        '{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_calls><end_of_sentence>\n'
        "<beginning_of_sentence>tool name=tools\ntool name: weather\ntool result: sunny\n\n<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )


def test_generated_text_is_marked() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "second"},
    ]
    rendered, spans = render_jinja_template(
        [messages], chat_template=chat_template(), return_assistant_tokens_mask=True
    )
    marked = [rendered[0][start:end] for start, end in spans[0]]
    assert marked == ["first<end_of_sentence>", "second<end_of_sentence>"]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "text only, got a content part of type image"),
        ({"role": "critic", "content": "x"}, "got critic"),
    ],
    ids=["image", "unknown-role"],
)
def test_what_the_model_cannot_take_is_refused(message: dict[str, Any], error: str) -> None:
    with pytest.raises(Exception, match=error):
        render(chat_template(), [message])
