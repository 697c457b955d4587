# SPDX-License-Identifier: Apache-2.0
"""An independent float64 implementation of the whole model, and random checkpoints to run it on.

Everything here is written from the reports and the released checkpoint layout, and imports nothing of the package under
test, so that no mistake can be made twice in the same way. Lightning layers are the recurrence token by token.

Shapes: ``T`` tokens of one sequence, ``H`` heads, ``D`` head_dim, ``E`` experts, ``L`` layers, ``V`` vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recurrence import recurrence, split_heads
from safetensors.torch import load_file, save_file
from torch import Tensor

LIGHTNING_EPS = 1e-6


@dataclass
class OracleOutput:
    """Results of one call, all float64.

    Attributes:
        logits: [T, V].
        hidden_states: L + 1 tensors [T, hidden]; the first is the embedding, the last is after the final norm.
        router_logits: [L, T, E].
    """

    logits: Tensor
    hidden_states: list[Tensor]
    router_logits: Tensor


@dataclass
class OracleCache:
    """What a sequence leaves behind: recurrent states [H, D, D] and keys and values [T, KV heads, D] by layer."""

    states: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    length: int = 0


class Oracle:
    """The model in float64 on one sequence at a time.

    Args:
        config: contents of ``config.json`` in the original format.
        tensors: checkpoint tensors by their original names, any dtype.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config = dict(config)
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.rotary_dim = config.get("rotary_dim") or self.head_dim
        self.eps = config.get("rms_norm_eps", 1e-5)

    @classmethod
    def from_dir(cls, path: Path) -> Oracle:
        """Load ``config.json`` and every ``*.safetensors`` file of a folder, golden results left out."""
        return cls(*load_checkpoint(path))

    def __call__(self, tokens: Sequence[int], cache: OracleCache | None = None) -> OracleOutput:
        """Run tokens that follow what is in ``cache``, which is updated."""
        cache = OracleCache() if cache is None else cache
        hidden = self.weights["model.embed_tokens.weight"][list(tokens)]
        hidden_states, router_logits = [hidden], []
        for layer in range(self.num_layers):
            hidden, router = self._layer(layer, hidden, cache)
            hidden_states.append(hidden)
            router_logits.append(router)
        hidden = self.norm("model.norm", hidden)
        hidden_states[-1] = hidden
        cache.length += len(tokens)
        return OracleOutput(self.head(hidden), hidden_states, torch.stack(router_logits))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [T, V]."""
        name = "model.embed_tokens.weight" if self.config.get("tie_word_embeddings") else "lm_head.weight"
        return hidden @ self.weights[name].T

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """Token ids that greedy decoding appends to ``tokens``."""
        cache, generated = OracleCache(), []
        logits = self(tokens, cache).logits
        for _ in range(num_tokens):
            generated.append(int(logits[-1].argmax()))
            logits = self(generated[-1:], cache).logits
        return generated

    def _layer(self, layer: int, hidden: Tensor, cache: OracleCache) -> tuple[Tensor, Tensor]:
        prefix = f"model.layers.{layer}"
        kind = "full" if self.config["attn_type_list"][layer] == 1 else "linear"
        postnorm = self.config.get("postnorm", False)
        normed = self.norm(f"{prefix}.input_layernorm", hidden)
        residual = normed if postnorm else hidden
        attend = self.softmax_attention if kind == "full" else self._lightning_attention
        hidden = self.combine(f"{kind}_attention", residual, attend(layer, normed, cache))
        normed = self.norm(f"{prefix}.post_attention_layernorm", hidden)
        residual = normed if postnorm else hidden
        output, router_logits = self.routed_experts(layer, normed)
        if self.config.get("shared_intermediate_size"):
            share = self.share_of_shared_expert(layer, normed)
            output = output * (1 - share) + self.shared_expert(layer, normed) * share
        return self.combine("mlp", residual, output), router_logits

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last dim with the weight of the module ``name``."""
        return rms_norm(x, self.weights[f"{name}.weight"], self.eps)

    def combine(self, part: str, residual: Tensor, output: Tensor) -> Tensor:
        """``alpha * residual + beta * output`` with the factors of ``part``."""
        alpha = self.config.get(f"layernorm_{part}_alpha", 1.0)
        beta = self.config.get(f"layernorm_{part}_beta", 1.0)
        return residual * alpha + output * beta

    def _lightning_attention(self, layer: int, hidden: Tensor, cache: OracleCache) -> Tensor:
        q, k, v = split_heads(self.lightning_projection(layer, hidden))
        out, cache.states[layer] = recurrence(q, k, v, self.slopes(layer), cache.states.get(layer))
        return self.lightning_output(layer, hidden, out)

    def slopes(self, layer: int) -> Tensor:
        return slopes(self.num_heads, layer, self.num_layers)

    def lightning_projection(self, layer: int, hidden: Tensor) -> Tensor:
        """q, k and v of each head [T, H, 3D] before the activation."""
        projected = hidden @ self.weights[f"model.layers.{layer}.self_attn.qkv_proj.weight"].T
        return projected.view(-1, self.num_heads, 3 * self.head_dim)

    def lightning_output(self, layer: int, hidden: Tensor, out: Tensor) -> Tensor:
        """What follows the recurrence, whose output is ``out`` [T, H, D]: norm over all heads, gate, projection."""
        prefix = f"model.layers.{layer}.self_attn"
        normed = rms_norm(out.flatten(1), self.weights[f"{prefix}.norm.weight"], LIGHTNING_EPS)
        gate = torch.sigmoid(hidden @ self.weights[f"{prefix}.output_gate.weight"].T)
        return (gate * normed) @ self.weights[f"{prefix}.out_proj.weight"].T

    def softmax_attention(self, layer: int, hidden: Tensor, cache: OracleCache) -> Tensor:
        """The whole of a softmax layer on its normed input; ``cache.length`` tokens came before."""
        prefix = f"model.layers.{layer}.self_attn"
        num_tokens, dim = hidden.shape[0], self.head_dim
        q, k, v = (
            (hidden @ self.weights[f"{prefix}.{name}_proj.weight"].T).view(num_tokens, -1, dim) for name in "qkv"
        )
        positions = torch.arange(cache.length, cache.length + num_tokens, dtype=torch.float64)
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        if layer in cache.keys:
            k, v = torch.cat([cache.keys[layer], k]), torch.cat([cache.values[layer], v])
        cache.keys[layer], cache.values[layer] = k, v
        group = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        visible = torch.arange(k.shape[0])[None, :] <= positions[:, None]
        probabilities = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
        output = torch.einsum("hqk,khd->qhd", probabilities, v).reshape(num_tokens, -1)
        return output @ self.weights[f"{prefix}.o_proj.weight"].T

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        rotary, half = self.rotary_dim, self.rotary_dim // 2
        theta = self.config.get("rope_theta", 1e6)
        frequencies = theta ** -(torch.arange(half, dtype=torch.float64) * 2 / rotary)
        angles = positions[:, None, None] * frequencies
        first, second, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
        return torch.cat(
            [
                first * angles.cos() - second * angles.sin(),
                second * angles.cos() + first * angles.sin(),
                rest,
            ],
            dim=-1,
        )

    def routed_experts(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the routed experts [T, hidden] and router logits [T, E]."""
        moe = f"model.layers.{layer}.block_sparse_moe"
        router_logits, weights, chosen = self.route(layer, hidden)
        output = torch.zeros_like(hidden)
        for t in range(hidden.shape[0]):
            for weight, expert in zip(weights[t], chosen[t].tolist(), strict=True):
                w1, w2, w3 = (self.weights[f"{moe}.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
                output[t] += weight * (w2 @ (silu(w1 @ hidden[t]) * (w3 @ hidden[t])))
        return output, router_logits

    def route(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [T, E], weights [T, K] and indices [T, K] of the chosen experts, the best first."""
        logits = hidden @ self.weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"].T
        weights, chosen = torch.softmax(logits, dim=-1).topk(self.config["num_experts_per_tok"], dim=-1)
        return logits, weights / weights.sum(dim=-1, keepdim=True), chosen

    def shared_expert(self, layer: int, hidden: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}.shared_mlp"
        gate, up, down = (self.weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T

    def share_of_shared_expert(self, layer: int, hidden: Tensor) -> Tensor:
        """The part [T, 1] that the shared expert has in the output, the routed experts having the rest."""
        logit = hidden @ self.weights[f"model.layers.{layer}.coefficient.weight"].T
        softmax = self.config.get("shared_moe_mode", "sigmoid") == "softmax"
        return torch.softmax(logit, dim=-1) if softmax else torch.sigmoid(logit)


def slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Decay rates [H] of a layer: ALiBi rates times ``1 - layer / (num_layers - 1) + 1e-5``, rounded to fp32 once."""

    def rates(count: int) -> list[float]:
        if count & (count - 1) == 0:
            return [2 ** (-(2 ** -(math.log2(count) - 3)) * (i + 1)) for i in range(count)]
        below = 2 ** math.floor(math.log2(count))
        return rates(below) + rates(2 * below)[0::2][: count - below]

    factor = 1 + 1e-5 if num_layers == 1 else 1 - layer / (num_layers - 1) + 1e-5
    return torch.tensor([rate * factor for rate in rates(num_heads)], dtype=torch.float64).float().double()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Contents of a small ``config.json`` in the original format; ``hidden_size != heads * head_dim`` on purpose."""
    num_layers = changes.get("num_hidden_layers", 4)
    config: dict[str, Any] = {
        "architectures": ["MiniMaxM1ForCausalLM"],
        "model_type": "minimax_m1",
        "auto_map": {
            "AutoConfig": "configuration_minimax_m1.MiniMaxM1Config",
            "AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM",
        },
        "attn_type_list": [int(layer % 4 == 3) for layer in range(num_layers)],
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 40,
        "layernorm_full_attention_alpha": 3.5565588200778455,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": 3.5565588200778455,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_alpha": 3.5565588200778455,
        "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "postnorm": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000_000,
        "rotary_dim": 16,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 128,
    }
    return config | changes


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a checkpoint in the original format."""
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    inner = config["num_attention_heads"] * config["head_dim"]
    kv_inner = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer, code in enumerate(config["attn_type_list"]):
        if code == 1:
            attention = {"q_proj": (inner, hidden), "k_proj": (kv_inner, hidden), "v_proj": (kv_inner, hidden)}
            attention["o_proj"] = (hidden, inner)
        else:
            attention = {"qkv_proj": (3 * inner, hidden), "output_gate": (inner, hidden), "out_proj": (hidden, inner)}
            attention["norm"] = (inner,)  # type: ignore[assignment]
        parts: dict[str, tuple[int, ...]] = {f"self_attn.{name}": shape for name, shape in attention.items()}
        parts["input_layernorm"] = parts["post_attention_layernorm"] = (hidden,)
        parts["block_sparse_moe.gate"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            parts[f"block_sparse_moe.experts.{expert}.w1"] = (inter, hidden)
            parts[f"block_sparse_moe.experts.{expert}.w2"] = (hidden, inter)
            parts[f"block_sparse_moe.experts.{expert}.w3"] = (inter, hidden)
        if shared := config.get("shared_intermediate_size"):
            parts["shared_mlp.gate_proj"] = parts["shared_mlp.up_proj"] = (shared, hidden)
            parts["shared_mlp.down_proj"] = (hidden, shared)
            parts["coefficient"] = (1, hidden)
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return shapes


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights with the dtypes of the released checkpoint: routers F32, everything else BF16.

    The scale gives logits with a standard deviation of about 3, so that argmax is decided by clear margins.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            tensor = 1 + 0.1 * torch.randn(shape, generator=generator)
        elif name == "model.embed_tokens.weight":
            tensor = torch.randn(shape, generator=generator)
        else:
            gain = 3.0 if name == "lm_head.weight" else 1.5
            tensor = torch.randn(shape, generator=generator) * gain / math.sqrt(shape[-1])
        tensors[name] = tensor if name.endswith(".gate.weight") else tensor.bfloat16()
    return tensors


def write_checkpoint(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, *, num_shards: int = 1
) -> Path:
    """Write ``config.json`` and safetensors files in the original layout, with an index where there are shards."""
    tensors = random_tensors(config) if tensors is None else tensors
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(dict(config), indent=2))
    if num_shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        members = names[shard::num_shards]
        save_file({name: tensors[name] for name in members}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and all tensors of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("model*.safetensors")):
        tensors |= load_file(file)
    return json.loads((path / "config.json").read_text()), tensors
