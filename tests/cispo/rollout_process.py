# SPDX-License-Identifier: Apache-2.0
"""A process that holds a model of transformers and a vLLM engine that shares its weights, as a trainer does.

Engines do not clean up well enough to follow one another in one process, and starting one takes most of the time of a
test, so tests share a process and ask it for measurements over a pipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from minimax_plugin.cispo import weight_sync

ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

NEW_TOKENS = 160
#: Ragged batch: from one token to more than two of the model's blocks.
PROMPT_LENGTHS = (1, 2, 7, 31, 64, 129, 200, 300)


class RolloutProcess:
    """Starts the process; ``ask(command, **arguments)`` returns what the method of :class:`Worker` returns.

    Args:
        cache_root: folder for vLLM's caches.
        env: further environment variables.
        start: arguments of :meth:`Worker.start`; none for a process that is only to ``train``.
    """

    def __init__(self, cache_root: Path, env: dict[str, str] | None = None, **start: Any) -> None:
        requests_read, self._requests = os.pipe()
        replies, replies_write = os.pipe()
        self._log_path = cache_root / f"rollout-{os.getpid()}-{requests_read}.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(requests_read), str(replies_write)],
                pass_fds=(requests_read, replies_write),
                env=os.environ | ENV | {"VLLM_CACHE_ROOT": str(cache_root)} | (env or {}),
                cwd=cache_root,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        os.close(requests_read)
        os.close(replies_write)
        self._reader = os.fdopen(replies, "r")
        if start:
            self.ask("start", **start)

    def ask(self, command: str, **arguments: Any) -> Any:
        with suppress(BrokenPipeError):  # a process that died is noticed below, with what it said
            os.write(self._requests, (json.dumps([command, arguments]) + "\n").encode())
        reply = self._reader.readline()
        if not reply:
            self._process.wait(timeout=60)
            raise RuntimeError("the rollout process died:\n" + "\n".join(self.log().splitlines()[-60:]))
        return json.loads(reply)

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def close(self) -> None:
        os.close(self._requests)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.close()


class Worker:
    """The commands."""

    def start(self, model: str, engine: dict[str, Any], repetition: list[Any] | None = None, **options: Any) -> None:
        """Load the model in fp32 and start an engine on it.

        Args:
            model: checkpoint folder with a tokenizer.
            engine: ``engine_arguments``.
            repetition: N and p of the repetition stop.
            options: of ``VLLMGeneration``.
        """
        if os.environ.get("TRITON_INTERPRET") == "1":
            sys.path.append(str(Path(__file__).parents[1] / "vllm_model"))
            from vllm_engine_process import pretend_triton_backend

            pretend_triton_backend()
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from minimax_plugin.cispo.repetition import RepetitionRule
        from minimax_plugin.cispo.rollout import ExactVLLMGeneration

        self.path = model
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.generation = ExactVLLMGeneration(
            self.model,
            Accelerator(cpu=True),
            AutoTokenizer.from_pretrained(model, padding_side="left"),
            max_model_length=512,
            max_num_seqs=16,
            max_completion_length=NEW_TOKENS,
            engine_arguments={"enforce_eager": True} | engine,
            repetition=RepetitionRule(*repetition) if repetition else None,
            **options,
        )

    def parity(self) -> dict[str, float]:
        """How close the log-probabilities of 160 sampled tokens per prompt are to the training forward pass."""
        prompts = self._prompts()
        completions, logps = self._sample(prompts)
        return compare(logps, training_logps(self.model, prompts, completions))

    def parity_with_routes(self, dtype: str) -> dict[str, Any]:
        """As ``parity`` for a model in ``dtype`` and in fp32, with live routes and with those of the engine."""
        from minimax_plugin.cispo.router_replay import RouterReplay, rollout_routes

        prompts = self._prompts()
        completions, logps = self._sample(prompts)
        left, right = max(map(len, prompts)), max(map(len, completions))
        mask = torch.zeros(len(prompts), left + right, dtype=torch.int64)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            mask[row, left - len(prompt) : left + len(completion)] = 1
        routes = self.generation.routes
        result: dict[str, Any] = {"shapes": [list(each.shape) for each in routes or []]}
        for name in ("float32", dtype):
            model = self.model.to(getattr(torch, name))
            replay = RouterReplay(model)
            with torch.no_grad():
                result[f"{name} live"] = compare(logps, training_logps(model, prompts, completions))
                with replay.replaying(rollout_routes(routes or [], mask, replay.layers)):
                    result[f"{name} replayed"] = compare(logps, training_logps(model, prompts, completions))
            rerouted, all_ = replay.pop_counts().tolist()
            result[f"{name} rerouted"] = rerouted / all_
            replay.remove()
        return result

    def train(self, model: str, steps: int, repack: bool = True, **settings: Any) -> dict[str, Any]:
        """Train with colocated fp32 vLLM.

        Args:
            model: checkpoint folder with a tokenizer.
            steps: number of updates, each on a rollout of its own.
            repack: whether experts are packed anew after a sync.
            settings: of ``CISPOConfig``.

        Returns:
            ``log``, one entry per update, ``moved``, the largest change of a weight, and ``error``, what was raised.
        """
        from datasets import Dataset

        from minimax_plugin.cispo import CISPOConfig, CISPOTrainer

        def even_share(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
            return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

        words = ["river", "12 names", "the old stone bridge", "what do you see?"]
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, Any] = {
                "output_dir": folder,
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                "report_to": "none",
                "save_strategy": "no",
                "disable_tqdm": True,
                "logging_steps": 1,
                "max_steps": steps,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 24,
                "use_vllm": True,
                "vllm_mode": "colocate",
                "vllm_max_model_length": 128,
                "vllm_llm_kwargs": {"dtype": "float32", "enforce_eager": True},
                "rollout_check": "error",
            }
            trainer = CISPOTrainer(
                model=model,
                reward_funcs=even_share,
                args=CISPOConfig(**options | settings),
                train_dataset=Dataset.from_dict({"prompt": words * 4}),
            )
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        error = None
        with patched(weight_sync, "repack_experts", lambda model: 0) if not repack else nullcontext():
            try:
                trainer.train()
            except ValueError as raised:
                error = str(raised)
        moved = max((x - y).abs().max().item() for x, y in zip(before, trainer.model.parameters(), strict=True))
        steps_logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {"log": steps_logged, "moved": moved, "error": error}

    def sync_unchanged(self, times: int) -> float:
        """Largest change of a log-probability after syncing the weights that the engine has already."""
        before = self._scores()
        for _ in range(times):
            self.generation.sync_weights()
        return compare(before, self._scores())["max"]

    def sync_changed(self, names: str, repack: bool = True) -> dict[str, float]:
        """Change all weights by a tenth, send them to the engine, change and send them back.

        Args:
            names: "memory" (as transformers holds them), "shuffled" (the same, any order) or "checkpoint" (as saved,
                any order).
            repack: whether experts are packed anew.

        Returns:
            Largest difference to transformers before (``moved``) and after (``max``) the sync.
        """
        original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.1)
        result = {"moved": self._distance()["max"]}
        with patched(weight_sync, "repack_experts", lambda model: 0) if not repack else nullcontext():
            self._send(names)
        result |= self._distance()
        self.model.load_state_dict(original)
        self.generation.sync_weights()
        return result | {"back": self._distance()["max"]}

    def sync_adapter(self) -> dict[str, Any]:
        """LoRA on attention and experts: the engine gets the merged weights, and the frozen ones keep every bit."""
        from peft import LoraConfig, get_peft_model

        frozen = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        torch.manual_seed(4)
        model = get_peft_model(
            self.model,
            LoraConfig(
                r=4,
                lora_alpha=16,
                target_modules=["q_proj", "v_proj", "qkv_proj", "out_proj"],
                target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            ),
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        base, self.generation.model = self.generation.model, model
        result: dict[str, Any] = {"moved": self._distance(model)["max"]}
        for _ in range(3):
            self.generation.sync_weights()
        result |= self._distance(model)
        self.generation.model = base
        self.model = model.unload()
        result["changed"] = [
            name for name, tensor in self.model.state_dict().items() if not torch.equal(tensor, frozen[name])
        ]
        self.generation.sync_weights()
        return result | {"back": self._distance()["max"]}

    def generate_with_old_prefix(self) -> dict[str, float]:
        """Sample, change the weights, sample the same prompts again: the second rollout against transformers."""
        prompts = self._prompts()[-2:]
        original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._sample(prompts)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.05)
        self.generation.sync_weights()
        completions, logps = self._sample(prompts)
        result = compare(logps, training_logps(self.model, prompts, completions))
        self.model.load_state_dict(original)
        self.generation.sync_weights()
        return result

    def repetition(self, temperature: float, head: float) -> dict[str, Any]:
        """Sample sixteen prompts freely, with the stop of the trainer, and with another N for every second request.

        Args:
            temperature: of sampling.
            head: factor of the head's weights, which makes the model fall into loops.

        Returns:
            ``free`` and ``stopped`` completions, ``mixed`` ones with their N (None: not asked for) in ``limits``, the
            model's log-probabilities of the free ones, how many of the stopped ones were scored, flags and end token.
        """
        generator = torch.Generator().manual_seed(3)
        prompts = [torch.randint(10, 320, (n,), generator=generator).tolist() for n in range(1, 17)]
        weight = self.model.lm_head.weight.detach().clone()
        with torch.no_grad():
            self.model.lm_head.weight.mul_(head)
        self.generation.sync_weights()
        rule = self.generation._repetition
        assert rule is not None
        probability = rule.probability
        self.generation._repetition = None
        self.generation.temperature = temperature
        self.generation.generation_kwargs = {"seed": 7}
        free = self.generation.generate(prompts, None, 1)[1]
        self.generation._repetition = rule
        stopped = self.generation.generate(prompts, None, 1)
        flags = self.generation.stopped
        limits = [None if i % 2 else 5 + i for i in range(16)]
        result = {
            "free": [list(row) for row in free],
            "logps": training_logps(self.model, prompts, [list(row) for row in free]),
            "stopped": [list(row) for row in stopped[1]],
            "scored": [len(row) for row in stopped[2]],
            "flags": flags,
            "eos": self.generation.processing_class.eos_token_id,
            "limits": limits,
            "mixed": self._generate_mixed(prompts, limits, temperature, probability),
        }
        self.generation.temperature = 1.0
        with torch.no_grad():
            self.model.lm_head.weight.copy_(weight)
        self.generation.sync_weights()
        return result

    def _generate_mixed(
        self, prompts: list[list[int]], limits: list[int | None], temperature: float, probability: float
    ) -> list[list[int]]:
        from vllm import SamplingParams

        asked = [
            {} if limit is None else {"repetition_stop_tokens": limit, "repetition_stop_prob": probability}
            for limit in limits
        ]
        outputs = self.generation.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(temperature=temperature, seed=7, max_tokens=NEW_TOKENS, extra_args=each) for each in asked],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _send(self, names: str) -> None:
        if names == "memory":
            self.generation.sync_weights()
            return
        if names == "shuffled":
            tensors = dict(self.model.named_parameters())
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder)
                tensors = {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}
        shuffled = sorted(tensors, key=lambda name: name[::-1])
        runner = self.generation.llm.llm_engine.model_executor.driver_worker.model_runner
        weight_sync.reload_weights(runner, ((name, tensors[name].detach()) for name in shuffled))

    def _distance(self, model: Any = None) -> dict[str, float]:
        sequences = self._sequences()
        exact = training_logps(model or self.model, [ids[:1] for ids in sequences], [ids[1:] for ids in sequences])
        return compare(self._scores(), exact)

    def _scores(self) -> list[list[float]]:
        """The engine's log-probabilities of all tokens of fixed sequences but the first."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": ids} for ids in self._sequences()]
        outputs = self.generation.llm.generate(
            prompts, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False
        )
        return [
            [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(self._sequences(), outputs, strict=True)
        ]

    def _sequences(self) -> list[list[int]]:
        return [ids for ids in self._prompts() if len(ids) > 1]

    def _prompts(self) -> list[list[int]]:
        return ragged_prompts(self.model.config.vocab_size)

    def _sample(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        torch.manual_seed(1)  # requests with a seed of their own cannot be prefilled in chunks on a CPU
        self.generation.generation_kwargs = {"ignore_eos": True}
        with patched(self.generation, "_repetition", None):
            _, completions, logps, _ = self.generation.generate(prompts, None, 1)
        return [list(ids) for ids in completions], [[step[0] for step in steps] for steps in logps]


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def ragged_prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(10, vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def sample_with_transformers(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Left-padded sampling with transformers; completions and log-probabilities of the tokens."""
    torch.manual_seed(5)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[:, width:]
    logps = torch.stack(output.logits, 1).float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return tokens.tolist(), logps.tolist()


@torch.no_grad()
def training_logps(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of completions from one forward pass over left-padded prompts and right-padded completions."""
    left, right = max(map(len, prompts)), max(map(len, completions))
    rows, masks = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, after = left - len(prompt), right - len(completion)
        rows.append([0] * before + prompt + completion + [0] * after)
        masks.append([0] * before + [1] * (len(prompt) + len(completion)) + [0] * after)
    ids = torch.tensor(rows)
    logits = model(input_ids=ids, attention_mask=torch.tensor(masks)).logits[:, left - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, left:, None]).squeeze(-1)
    return [row[: len(completion)].tolist() for row, completion in zip(logps, completions, strict=True)]


def compare(first: list[list[float]], second: list[list[float]]) -> dict[str, float]:
    """Pearson correlation of probabilities, mean and maximum of the difference of log-probabilities, tokens."""
    x, y = (torch.tensor([value for row in rows for value in row], dtype=torch.float64) for rows in (first, second))
    difference = (x - y).abs()
    pearson = torch.corrcoef(torch.stack([x.exp(), y.exp()]))[0, 1]
    return {
        "pearson": pearson.item(),
        "mean": difference.mean().item(),
        "max": difference.max().item(),
        "tokens": len(x),
    }


def main(requests_fd: int, replies_fd: int) -> None:
    worker = Worker()
    with os.fdopen(requests_fd) as requests, os.fdopen(replies_fd, "w") as replies:
        for line in requests:
            command, arguments = json.loads(line)
            replies.write(json.dumps(getattr(worker, command)(**arguments)) + "\n")
            replies.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
