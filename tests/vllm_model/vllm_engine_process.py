# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in a process of its own, driven over a pipe.

Engines do not clean up after themselves well enough to follow one another inside one pytest process, and starting one
takes most of the time of a test. So each configuration gets one process that several tests share.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any
from unittest import mock

#: Engine arguments of every test: exact arithmetic, nothing that needs a tokenizer.
COMMON_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
}

HAS_CPP_COMPILER = shutil.which(os.environ.get("CXX", "g++")) is not None

#: One process and one thread: with more, the in-process engine is many times slower on a busy machine.
COMMON_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
if not HAS_CPP_COMPILER:
    # On a CPU vLLM compiles small functions of its own even when it is asked to run eagerly.
    COMMON_ENV["TORCHDYNAMO_DISABLE"] = "1"

#: Environment that runs Model Runner V2, the default on a GPU, with its Triton kernels interpreted.
INTERPRETED_TRITON_ENV = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

#: Set to 1: the engine runs with :func:`use_torch_experts`.
TORCH_EXPERTS_VARIABLE = "MINIMAX_TEST_TORCH_EXPERTS"


@dataclass(frozen=True)
class Completion:
    """Generated token ids, their log probabilities, and how many tokens of the prompt were found in the cache."""

    tokens: list[int]
    logprobs: list[float]
    cached: int


class EngineProcess:
    """Start an engine, send it prompts, ask it about itself; a context manager.

    Args:
        model: checkpoint folder.
        cache_root: folder for vLLM's caches.
        env: environment variables on top of :data:`COMMON_ENV`.
        args: engine arguments on top of :data:`COMMON_ARGS`.
    """

    def __init__(self, model: Path, cache_root: Path, *, env: dict[str, str] | None = None, **args: Any) -> None:
        requests_read, self._requests = os.pipe()
        self._replies, replies_write = os.pipe()
        self._log = (cache_root / f"engine-{model.name}.log").open("w+b")
        environment = os.environ | COMMON_ENV | {"VLLM_CACHE_ROOT": str(cache_root)} | (env or {})
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(requests_read), str(replies_write)],
            pass_fds=(requests_read, replies_write),
            env=environment,
            cwd=cache_root,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        os.close(requests_read)
        os.close(replies_write)
        self._reader = os.fdopen(self._replies, "r")
        self._call("start", COMMON_ARGS | {"model": str(model)} | args)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._requests)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.close()
        self._log.close()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        lora: str | None = None,
        extra_args: Sequence[dict[str, Any]] | None = None,
        stop: int | None = None,
    ) -> list[Completion]:
        """Greedy continuations of all prompts in one batch.

        ``extra_args`` are those of the sampling parameters, one per prompt; ``stop`` is a token that ends a completion.
        """
        request: dict[str, Any] = {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens}
        request |= {"lora": lora, "extra_args": extra_args or [{}] * len(prompts), "stop": stop}
        return [Completion(**item) for item in self._call("generate", request)]

    def prompt_logprobs(self, prompt: Sequence[int]) -> list[list[float]]:
        """[T - 1, V]: log probabilities of every token id after each token of the prompt but the last.

        The engine must be started with ``max_logprobs=-1``.
        """
        return self._call("prompt_logprobs", {"prompt": list(prompt)})

    def record(
        self, prompt: Sequence[int], max_tokens: int, file: Path, fault: str = ""
    ) -> tuple[list[int], list[int]]:
        """Generate and write what every part of the model gave to ``file``, as ``bf16_layers.check_layers`` reads it.

        Args:
            prompt: the only sequence that runs.
            max_tokens: how many to generate.
            file: a safetensors file.
            fault: name of a function in ``bf16_faults``, planted for the time of the call; empty for none.

        Returns:
            the tokens that were fed, and how many in each step.
        """
        request = {"prompt": list(prompt), "max_tokens": max_tokens, "file": str(file), "fault": fault}
        tokens, steps = self._call("record", request)
        return tokens, steps

    def facts(self) -> dict[str, Any]:
        """Preemptions and accepted drafts so far, module of the runner, compilation mode, cache mode, block size."""
        return self._call("facts", {})

    def _call(self, command: str, argument: dict[str, Any]) -> Any:
        # A process that died is noticed below, with what it said.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._requests, (json.dumps([command, argument]) + "\n").encode())
        reply = self._reader.readline()
        if not reply:
            self._process.wait(timeout=60)
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").splitlines()
            raise RuntimeError("the engine process died:\n" + "\n".join(lines[-60:]))
        return json.loads(reply)


def pretend_triton_backend() -> None:
    """List a CPU backend for Triton, whose absence is why vLLM leaves Triton off without a GPU.

    With ``TRITON_INTERPRET=1`` no backend is ever used: kernels run in Triton's interpreter. 0.31 also asks for the
    version of the distribution ``vllm``, which the CPU wheel does not have.
    """
    from triton.backends import backends

    def version(distribution_name: str) -> str:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return find_version(distribution_name)
        return find_version(f"{distribution_name}-cpu") + "+cpu"

    find_version = importlib.metadata.version
    importlib.metadata.version = version

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = SimpleNamespace(driver=Driver)


def use_torch_experts() -> None:
    """Put plain torch experts in place of vLLM's, whose LoRA path needs kernels that CPU wheels lack."""
    import torch

    from minimax_plugin.vllm_model import experts

    class TorchExperts(torch.nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            count, hidden, width = (options[key] for key in ("num_experts", "hidden_size", "intermediate_size"))
            self.top_k = options["top_k"]
            self.w1, self.w2, self.w3 = (
                torch.nn.Parameter(torch.empty(count, *shape), requires_grad=False)
                for shape in ((width, hidden), (hidden, width), (width, hidden))
            )

        def load_weights(self, weights: Any) -> Any:
            for name, tensor in weights:
                expert, part = name.split(".")[:2]
                getattr(self, part).data[int(expert)] = tensor
                yield part

        def forward(self, hidden: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
            weights, chosen = router_logits.softmax(-1).topk(self.top_k)
            weights = weights / weights.sum(-1, keepdim=True)
            gate, up = (torch.einsum("th,tkih->tki", hidden, part[chosen]) for part in (self.w1, self.w3))
            output = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, self.w2[chosen])
            return (output * weights[..., None]).sum(1)

    experts.FusedMoEFactory = TorchExperts


def _serve(requests_fd: int, replies_fd: int) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pretend_triton_backend()
    if os.environ.get(TORCH_EXPERTS_VARIABLE) == "1":
        use_torch_experts()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm: Any = None
    with os.fdopen(requests_fd) as requests, os.fdopen(replies_fd, "w") as replies:
        for line in requests:
            command, argument = json.loads(line)
            result: Any = None
            if command == "start":
                llm = LLM(**argument)
            elif command == "generate":
                sampling = [
                    SamplingParams(
                        temperature=0,
                        max_tokens=argument["max_tokens"],
                        ignore_eos=True,
                        stop_token_ids=[] if argument["stop"] is None else [argument["stop"]],
                        detokenize=False,
                        logprobs=1,
                        extra_args=extra_args,
                    )
                    for extra_args in argument["extra_args"]
                ]
                outputs = llm.generate(
                    [{"prompt_token_ids": prompt} for prompt in argument["prompts"]],
                    sampling,
                    use_tqdm=False,
                    lora_request=LoRARequest("adapter", 1, argument["lora"]) if argument["lora"] else None,
                )
                result = [_completion(output) for output in outputs]
            elif command == "prompt_logprobs":
                everything = SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=-1)
                (output,) = llm.generate([{"prompt_token_ids": argument["prompt"]}], everything, use_tqdm=False)
                rows = output.prompt_logprobs[1:]
                result = [[row[token].logprob for token in range(len(row))] for row in rows]
            elif command == "record":
                result = _record(llm, **argument)
            elif command == "facts":
                result = _facts(llm)
            replies.write(json.dumps(result) + "\n")
            replies.flush()


def _record(llm: Any, prompt: list[int], max_tokens: int, file: str, fault: str) -> tuple[list[int], list[int]]:
    sys.path.append(str(Path(__file__).parents[1]))
    import bf16_faults
    from bf16_layers import Record, recorded
    from safetensors.torch import save_file
    from vllm import SamplingParams

    record = Record()
    (model,) = llm.collective_rpc(_model)
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    planted = getattr(bf16_faults, fault)(model) if fault else contextlib.nullcontext()
    with planted, recorded(model, record), _recorded_states(model, record):
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    save_file(record.tensors(), file)
    return prompt + list(output.outputs[0].token_ids)[:-1], record.steps()


@contextlib.contextmanager
def _recorded_states(model: Any, record: Any) -> Iterator[None]:
    """The state of the one sequence after every step, from the block pool, and what the LM head was given and gave."""
    from minimax_plugin.vllm_model.lightning import LightningAttention

    def attend(layer: Any, qkv: Any, out: Any, sumsq: Any, metadata: Any) -> None:
        run(layer, qkv, out, sumsq, metadata)
        slots = metadata.state_indices_tensor_p if metadata.num_prefills else metadata.state_indices_tensor_d
        record.add(f"{layer.prefix.split('.')[-2]}.state", layer.state_pool.states[slots.flatten()[:1].long()])

    def head(module: Any, inputs: Any, output: Any) -> None:
        record.add("head_input", inputs[1])
        record.add("logits", output)

    run = LightningAttention.attend
    hook = model.logits_processor.register_forward_hook(head)
    with mock.patch.object(LightningAttention, "attend", attend):
        yield
    hook.remove()


def _completion(output: Any) -> dict[str, Any]:
    generated = output.outputs[0]
    logprobs = [step[token].logprob for token, step in zip(generated.token_ids, generated.logprobs, strict=True)]
    return {"tokens": list(generated.token_ids), "logprobs": logprobs, "cached": output.num_cached_tokens or 0}


def _facts(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    runners = llm.collective_rpc(_runner_module)
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        "preemptions": counters["vllm:num_preemptions"],
        "accepted_drafts": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
        "runner": runners[0],
        "compilation_mode": int(config.compilation_config.mode),
        "cache_mode": config.cache_config.mamba_cache_mode,
        "block_size": config.cache_config.block_size,
    }


def _model(worker: Any) -> Any:
    return worker.model_runner.get_model()


def _runner_module(worker: Any) -> str:
    return type(worker.model_runner).__module__


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
