# SPDX-License-Identifier: Apache-2.0
"""Over HTTP, as users see it: the OpenAI server with its three processes answers with the golden tokens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai", reason="the OpenAI client is not installed")

from vllm_engine_process import COMMON_ENV  # noqa: E402
from vllm_references import LOGPROB_TOLERANCE, Expected, golden_case, link_checkpoint  # noqa: E402

pytestmark = pytest.mark.slow

#: Messages are joined without markers, so that a chat can ask for exactly the tokens of a golden prompt.
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
START_SECONDS = 300


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
def client(golden_dir: Path, vllm_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = link_checkpoint(golden_dir, "c_lengths", tmp_path_factory.mktemp("served"))
    _write_tokenizer(model, 256)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The script `vllm serve` of the CPU wheels stops for want of metadata named "vllm"; the module it runs does not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "golden", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    env = os.environ | COMMON_ENV | {"VLLM_CACHE_ROOT": str(vllm_cache), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log_path = vllm_cache / "server.log"
    with log_path.open("w") as log:
        server = subprocess.Popen(
            command, cwd=vllm_cache, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log_path)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            _stop(server)


def _wait(server: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        unreachable = (urllib.error.URLError, ConnectionError, TimeoutError)
        with contextlib.suppress(*unreachable), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(1)
    pytest.fail("the server did not start:\n" + "\n".join(log_path.read_text().splitlines()[-60:]))


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes of its session."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, wanted)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=30)


def _options(case: Expected) -> dict[str, Any]:
    return {
        "model": "golden",
        "temperature": 0,
        "max_tokens": len(case.tokens),
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


@pytest.fixture(scope="module")
def cases(golden_dir: Path) -> list[Expected]:
    return golden_case(golden_dir, "c_lengths")


def test_completions_at_the_same_time(client: Any, cases: list[Expected]) -> None:
    """Sixteen requests at once on eight seats."""

    def complete(case: Expected) -> Any:
        return client.completions.create(prompt=case.prompt, logprobs=1, **_options(case)).choices[0]

    requests = (cases * 4)[:16]
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
