# SPDX-License-Identifier: Apache-2.0
"""A tiny MiniMax-M1 through transformers and through vLLM's OpenAI server; the greedy tokens must be the same.

Run by ``scripts/demo.sh``. Exit status 0 when every answer agrees, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = (
    "A long memory does not need to keep each word;",
    "The river carries every boat past",
    "1, 2, 3",
)
MESSAGES = [
    {"role": "system", "content": "You are a tiny model with random weights."},
    {"role": "user", "content": "What do you see?"},
]
NEW_TOKENS = 24
SERVER_START_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write checkpoint and server log here and keep them")
    args = parser.parse_args()
    # Nothing is downloaded or reported. The libraries read these variables when they are imported, which comes later.
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minimax-demo-")))
        return demonstrate(folder)


def demonstrate(folder: Path) -> int:
    """The whole story, told on stdout; returns the exit status."""
    model_dir = folder / "tiny-minimax-m1"
    step("1. A tiny checkpoint in the format of the released MiniMax-M1")
    minimax_plugin("tiny", str(model_dir))
    step("2. Is the machine ready, and is the checkpoint complete?")
    minimax_plugin("doctor", str(model_dir))
    step("3. transformers: AutoModelForCausalLM, greedy, fp32")
    completions, chat = generate(model_dir)
    step("4. vLLM: the OpenAI server on the same checkpoint, greedy, fp32")
    with serve(model_dir, folder / "server.log") as url:
        differences = ask(url, model_dir.name, completions, chat)
    step("5. Result")
    if differences:
        print(f"DIFFERENT: {', '.join(differences)}")
        return 1
    print("The same: every greedy token of every answer is equal in transformers and vLLM.")
    return 0


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def minimax_plugin(*arguments: str) -> None:
    print(f"$ minimax-plugin {' '.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "minimax_plugin.cli", *arguments]).returncode
    if status:
        raise SystemExit(status)  # the command has said why


class Answer:
    """One greedy continuation by transformers: the prompt's ids, the new ids and their text."""

    def __init__(self, prompt_ids: list[int], token_ids: list[int], text: str) -> None:
        self.prompt_ids, self.token_ids, self.text = prompt_ids, token_ids, text


def generate(model_dir: Path) -> tuple[list[Answer], Answer]:
    """Continue every prompt and answer the chat with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import minimax_plugin  # noqa: F401 - registers the model with transformers

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    print(f"{type(model).__module__}.{type(model).__name__}, {model.num_parameters():,} parameters")

    def answer(prompt_ids: list[int]) -> Answer:
        output = model.generate(torch.tensor([prompt_ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
        token_ids = output[0, len(prompt_ids) :].tolist()
        return Answer(prompt_ids, token_ids, tokenizer.decode(token_ids, skip_special_tokens=True))

    completions = [answer(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    chat_ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    chat = answer(chat_ids)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        print(f"  {prompt!r} -> {completion.text!r}")
    print(f"  chat: {MESSAGES[-1]['content']!r} -> {chat.text!r}")
    return completions, chat


@contextlib.contextmanager
def serve(model_dir: Path, log_path: Path) -> Iterator[str]:
    """The OpenAI server on a free port, stopped with everything it started. Yields the base URL of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The script `vllm serve` of the CPU build stops for want of metadata named "vllm"; the module it runs does not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    command += ["--served-model-name", model_dir.name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    print(f"$ python {' '.join(command[1:])}", flush=True)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        # On a CPU vLLM compiles small functions of its own even when it is asked to run eagerly.
        environment["TORCHDYNAMO_DISABLE"] = "1"
    with log_path.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            seconds = wait_until_healthy(server, f"http://127.0.0.1:{port}/health", log_path)
            print(f"the server answers after {seconds:.0f} s", flush=True)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            stop(server)


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, log_path: Path) -> float:
    """Seconds until the server answered.

    Raises:
        SystemExit: it ended or did not answer in time; the end of its log is printed.
    """
    start = time.monotonic()
    while server.poll() is None and time.monotonic() - start < SERVER_START_SECONDS:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=5),
        ):
            return time.monotonic() - start
        time.sleep(1)
    print("\n".join(log_path.read_text(errors="replace").splitlines()[-40:]))
    state = "did not answer in time" if server.poll() is None else f"ended with status {server.returncode}"
    raise SystemExit(f"error: the server {state}; the end of its log is above")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and the engine processes of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def ask(url: str, model: str, completions: list[Answer], chat: Answer) -> list[str]:
    """Ask for what transformers answered, as completion, chat and stream; returns what came out differently."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    options: dict[str, Any] = {"model": model, "max_tokens": NEW_TOKENS, "temperature": 0}
    options["extra_body"] = {"return_token_ids": True}
    differences = []

    def compare(name: str, same: bool, text: str) -> None:
        print(f"  {'same' if same else 'DIFFERENT':10}{name}: {text!r}", flush=True)
        if not same:
            differences.append(name)

    for prompt, expected in zip(PROMPTS, completions, strict=True):
        choice = client.completions.create(prompt=prompt, **options).choices[0]
        compare(f"completion of {prompt!r}", choice.token_ids == expected.token_ids, choice.text)
    response = client.chat.completions.create(messages=MESSAGES, **options)
    choice = response.choices[0]
    same = (response.prompt_token_ids, choice.token_ids) == (chat.prompt_ids, chat.token_ids)
    compare("chat", same, choice.message.content)
    token_ids: list[int] = []
    text = ""
    for chunk in client.completions.create(prompt=PROMPTS[0], stream=True, **options):
        token_ids += chunk.choices[0].token_ids or []
        text += chunk.choices[0].text
    compare("stream", (token_ids, text) == (completions[0].token_ids, completions[0].text), text)
    return differences


if __name__ == "__main__":
    sys.exit(main())
