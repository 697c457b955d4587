# SPDX-License-Identifier: Apache-2.0
"""The packaged chat template beside the one of the released checkpoint."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError, nodes
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

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


def call(**parts: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [parts]}


NAMED = {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "text only, got a content part of type image"),
        ({"role": "critic", "content": "x"}, "got critic"),
        ({"role": "user", "content": 5}, "content of a message of role user is 5, expected text or a list"),
        ({"role": "system", "content": True}, "content of a message of role system is True"),
        ({"role": "assistant", "content": 0}, "content of a message of role assistant is 0"),
        ({"role": "user", "content": {"text": "x"}}, "content of a message of role user is {'text': 'x'}"),
        ({"role": "user", "content": ["x"]}, "a content part of a message of role user is x, expected an object"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "text of a content part .* user is 5"),
        ({"role": "tool", "content": None}, "content of a message of role tool is None, expected the result"),
        ({"role": "tool"}, "content of a message of role tool is , expected the result"),
        ({"role": "tool", "content": 5}, "content of a message of role tool is 5"),
        ({"role": "tool", "content": ["x"]}, "a tool result is x, expected an object with a text"),
        ({"role": "tool", "content": [{"text": None}]}, "a tool result is None, expected a string"),
        ({"role": "tool", "content": "x", "name": 5}, "name of a tool result is 5, expected a string"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "tool_call_id of a message is 5, expected a string"),
        (call(id=5, function=NAMED), "id of a tool call is 5, expected a string"),
        (call(id="1", function={"arguments": {}}), "a tool call has no name: {"),
        (call(id="1", function={"name": 5}), "a tool call has no name: {"),
        (call(id="1", function=None), "a tool call has no name: {"),
        (call(function={"name": "f", "arguments": 5}), "arguments of a call of f is 5, expected an object"),
        ({"role": "assistant", "content": "x", "tool_calls": 5}, "tool_calls of a message is 5, expected a list"),
        ({"role": "assistant", "content": "x", "tool_calls": {"id": "1"}}, "tool_calls of a message is {"),
    ],
)
def test_what_the_model_cannot_take_is_refused(message: Any, error: str) -> None:
    with pytest.raises(TemplateError, match=error):
        render(chat_template(), [message])


def test_a_message_that_is_no_object_is_refused() -> None:
    """Where nothing looks at messages before the template does, as transformers 5.23 does."""
    with pytest.raises(TemplateError, match="a message is hello, expected an object"):
        _compile_jinja_template(chat_template()).render(messages=["hello"])


@pytest.mark.parametrize("tool", [{"type": "function", "function": {"description": "d"}}, {"name": 5}, {"name": ""}])
def test_a_tool_without_a_name_is_refused(tool: dict[str, Any]) -> None:
    with pytest.raises(TemplateError, match="a tool has no name: {"):
        render(chat_template(), [{"role": "user", "content": "x"}], tools=[tool])


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_absent_text_renders_nothing(role: str) -> None:
    nothing = {"type": "text", "text": None}
    expected = render(chat_template(), [{"role": role, "content": "ab"}])
    assert render(chat_template(), [{"role": role, "content": [*parts("a"), nothing, *parts("b")]}]) == expected
    empty = render(chat_template(), [{"role": role, "content": ""}])
    assert render(chat_template(), [{"role": role, "content": [nothing]}]) == empty
    assert render(chat_template(), [{"role": role, "content": None}]) == empty
    assert render(chat_template(), [{"role": role}]) == empty


def test_the_latest_call_of_an_id_names_its_result() -> None:
    """Clients number the calls of every turn anew."""
    calls = [call(id="1", function={"name": name, "arguments": {}}) for name in ("first", "second")]
    result = {"role": "tool", "tool_call_id": "1", "content": "x"}
    rendered = render(chat_template(), [calls[0], result, calls[1], result, {**result, "tool_call_id": "2"}])
    assert re.findall(r"(?:tool name: (\w+)\n)?tool result: x", rendered) == ["first", "second", ""]


#: What the Jinja engine of llama.cpp reads (common/jinja: parser.cpp for syntax, value.cpp for filters, tests and
#: functions; as in llama-cpp-python 0.3.36), as far as the template uses it. It has no ``**`` and no ``\u`` escapes.
LLAMA_CPP_NODES = {
    *("Add", "And", "Assign", "Call", "CallBlock", "Compare", "Concat", "CondExpr", "Const", "Dict"),
    *("ExtensionAttribute", "Filter", "For", "Getattr", "Getitem", "If", "Keyword", "List", "Macro", "NSRef", "Name"),
    *("Not", "Operand", "Or", "Output", "Template", "TemplateData", "Test"),
}
LLAMA_CPP_FILTERS = {"tojson"}
LLAMA_CPP_TESTS = {"defined", "iterable", "mapping", "none", "string"}
LLAMA_CPP_FUNCTIONS = {"namespace", "raise_exception"}
LLAMA_CPP_ESCAPES = {"\\n", "\\'"}


def beyond_llama_cpp(template: str) -> Iterator[str]:
    """The constructs of a template that are not on the lists above."""
    environment = _compile_jinja_template(template).environment
    tree = environment.parse(template)
    macros = {macro.name for macro in tree.find_all(nodes.Macro)}
    for node in tree.find_all(nodes.Node):
        if type(node).__name__ not in LLAMA_CPP_NODES:
            yield type(node).__name__
        if isinstance(node, nodes.Filter) and node.name not in LLAMA_CPP_FILTERS:
            yield f"filter {node.name}"
        if isinstance(node, nodes.Test) and node.name not in LLAMA_CPP_TESTS:
            yield f"test {node.name}"
        if isinstance(node, nodes.Getattr) and getattr(node.node, "name", None) != "ns":
            yield f"attribute {node.attr}"
        if isinstance(node, nodes.Call) and (node.dyn_args is not None or node.dyn_kwargs is not None):
            yield "unpacked arguments"
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
            if node.node.name not in LLAMA_CPP_FUNCTIONS | macros:
                yield f"function {node.node.name}"
        elif isinstance(node, nodes.Call) and not isinstance(node.node, nodes.ExtensionAttribute):
            yield "method call"
    for _, kind, text in environment.lex(template):
        if kind == "string":
            yield from set(re.findall(r"\\.", text)) - LLAMA_CPP_ESCAPES


def test_llama_cpp_reads_the_template() -> None:
    assert list(beyond_llama_cpp(chat_template())) == []


@pytest.mark.parametrize(
    ("source", "construct"),
    [
        ("{{ dict(a, **b) }}", "unpacked arguments"),
        ("{{ f(*a) }}", "unpacked arguments"),
        ("{{ a.get('b') }}", "method call"),
        ("{{ a | xmlattr }}", "filter xmlattr"),
        ("{{ a is boolean }}", "test boolean"),
        ("{{ 'a\\u200b' }}", "\\u"),
        ("{% include 'a' %}", "Include"),
        ("{{ a ** 2 }}", "Pow"),
    ],
)
def test_constructs_are_told_apart(source: str, construct: str) -> None:
    assert construct in list(beyond_llama_cpp(source))
