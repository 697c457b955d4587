# SPDX-License-Identifier: Apache-2.0
"""Over HTTP, as users see it: the OpenAI server with its three processes answers with the golden tokens."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai", reason="the OpenAI client is not installed")

from goldens import M1  # noqa: E402
from vllm_engine_process import COMMON_ENV  # noqa: E402
from vllm_references import LOGPROB_TOLERANCE, VOCAB_SIZE, Expected, golden_case, link_checkpoint  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

#: Messages are joined without markers, so that a chat can ask for exactly the tokens of a golden prompt.
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Token ``i`` is the word ``wi``: the golden checkpoints come without a tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    fast.save_pretrained(folder)


def _words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


@pytest.fixture(scope="module")
def server(vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a server that was started as ``scripts/demo.py`` starts it."""
    model = link_checkpoint(M1, tmp_path_factory.mktemp("served"))
    _write_tokenizer(model, VOCAB_SIZE)
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in COMMON_ENV.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_CACHE_ROOT", str(vllm_cache))
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        with demo.serve(model, vllm_cache / "server.log") as url:
            yield url


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    return openai.OpenAI(base_url=server, api_key="none")


def _options(case: Expected) -> dict[str, Any]:
    return {
        "model": M1.name,
        "temperature": 0,
        "max_tokens": len(case.tokens),
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


@pytest.fixture(scope="module")
def cases() -> list[Expected]:
    return golden_case(M1)


def test_completions_at_the_same_time(client: Any, cases: list[Expected]) -> None:
    """Sixteen requests at once on eight seats."""

    def complete(case: Expected) -> Any:
        return client.completions.create(prompt=case.prompt, logprobs=1, **_options(case)).choices[0]

    requests = (cases * 6)[:16]
    with ThreadPoolExecutor(16) as pool:
        for case, choice in zip(requests, pool.map(complete, requests), strict=True):
            assert choice.token_ids == case.tokens
            assert choice.text.split() == _words(case.tokens).split()
            assert choice.logprobs.token_logprobs == pytest.approx(case.logprobs, abs=LOGPROB_TOLERANCE)


def test_chat(client: Any, cases: list[Expected]) -> None:
    for case in cases:
        half = len(case.prompt) // 2
        parts = [part for part in (case.prompt[:half], case.prompt[half:]) if part]
        roles = ("system", "user")[-len(parts) :]
        messages = [{"role": role, "content": _words(part)} for role, part in zip(roles, parts, strict=True)]
        choice = client.chat.completions.create(messages=messages, **_options(case)).choices[0]
        assert choice.message.content.split() == _words(case.tokens).split()


def test_streaming(client: Any, cases: list[Expected]) -> None:
    for case in cases:
        stream = client.completions.create(prompt=case.prompt, stream=True, **_options(case))
        chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
        assert [token for chunk in chunks for token in chunk.token_ids or []] == case.tokens
        assert "".join(chunk.text for chunk in chunks).split() == _words(case.tokens).split()
        assert len(chunks) > 1


def test_client_of_the_examples(server: str) -> None:
    """It samples, so that only the words are known to be words."""
    script = ROOT / "examples" / "serve_vllm" / "ask.py"
    command = [sys.executable, str(script), "w5 w6 w7", "--url", server, "--max-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"( ?w\d+){5}\n", done.stdout)
