# SPDX-License-Identifier: Apache-2.0
"""``minimax-plugin tiny DIR``: a small, complete checkpoint in the format of the released MiniMax-M1.

The weights are random but scaled like those of a trained model: every block sees inputs of about unit size, logits
have a standard deviation of about 3 and greedy decoding has margins far above fp32 noise. The same options give the
same bytes on every machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from minimax_plugin.architecture import ORIGINAL_ARCHITECTURES, Architecture, TensorSpec
from minimax_plugin.checkpoint import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from minimax_plugin.cli import tiny_tokenizer
from minimax_plugin.config_fields import require_field
from minimax_plugin.templates import chat_template

_ARCHITECTURES = {"m1": "MiniMaxM1ForCausalLM", "text01": "MiniMaxText01ForCausalLM"}
_LOGIT_STD = 3.0

#: Largest checkpoint that is written. Beyond it a size was mistyped, or a disk is about to be filled with noise.
MAX_TOTAL_SIZE = 2**31

#: Values that are drawn at once; memory beside the tensor itself is about 32 bytes for each.
_BLOCK = 2**20
_TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class TinyOptions:
    """Sizes of a tiny checkpoint.

    The defaults run in both backends; vLLM's CPU kernels want ``hidden_size`` and ``intermediate_size`` in multiples
    of 32. ``attn_type_list`` None makes every eighth layer and the last one softmax. ``shard_size`` is in bytes.
    """

    architecture: str = "m1"
    num_hidden_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 192
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 32
    num_local_experts: int = 4
    num_experts_per_tok: int = 2
    shared_intermediate_size: int = 0
    vocab_size: int = 768
    max_position_embeddings: int = 4096
    attn_type_list: tuple[int, ...] | None = None
    shard_size: int = 1_000_000
    seed: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = TinyOptions()
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write; must be absent or empty")
    parser.add_argument("--architecture", choices=sorted(_ARCHITECTURES), default=defaults.architecture)
    for flag, name, text in (
        ("--layers", "num_hidden_layers", "number of layers"),
        ("--hidden", "hidden_size", "hidden size (a multiple of 32 for vLLM on a CPU)"),
        ("--intermediate", "intermediate_size", "size of one expert (a multiple of 32 for vLLM on a CPU)"),
        ("--heads", "num_attention_heads", "attention heads"),
        ("--kv-heads", "num_key_value_heads", "key and value heads of the softmax layers"),
        ("--head-dim", "head_dim", "size of one head"),
        ("--rotary-dim", "rotary_dim", "rotated part of a head"),
        ("--experts", "num_local_experts", "experts per layer"),
        ("--top-k", "num_experts_per_tok", "experts per token"),
        ("--shared-expert", "shared_intermediate_size", "size of a shared expert, 0 for none"),
        ("--vocab", "vocab_size", f"vocabulary size, at least {tiny_tokenizer.MIN_VOCAB_SIZE}"),
        ("--max-positions", "max_position_embeddings", "context length"),
        ("--shard-size", "shard_size", "bytes per safetensors file"),
        ("--seed", "seed", "seed of the weights"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(
            flag, dest=name, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--attn-types",
        dest="attn_type_list",
        type=_parse_attn_types,
        metavar="0,0,1",
        help="comma-separated layer pattern, 0 = lightning, 1 = softmax (default: every eighth layer and the last)",
    )
    parser.add_argument("--force", action="store_true", help="replace the checkpoint files of a non-empty directory")


def run(args: argparse.Namespace) -> int:
    options = TinyOptions(**{name: getattr(args, name) for name in TinyOptions.__dataclass_fields__})
    try:
        architecture = write_tiny_checkpoint(args.directory, options, force=args.force)
    except (ValueError, OSError) as error:
        print(f"minimax-plugin tiny: {error}", file=sys.stderr)
        return 1
    pattern = "".join("L" if layer == "linear_attention" else "S" for layer in architecture.layer_types)
    print(
        f"{args.directory}: {_ARCHITECTURES[options.architecture]}, layers {pattern} (L lightning, S softmax), "
        f"{architecture.num_parameters:,} parameters, {len(architecture.tensors())} tensors, "
        f"{architecture.total_size:,} bytes"
    )
    return 0


def write_tiny_checkpoint(
    directory: str | Path, options: TinyOptions | None = None, *, force: bool = False
) -> Architecture:
    """Write config, sharded weights with index, tokenizer and generation config into ``directory``.

    Args:
        directory: created if absent.
        options: sizes and seed.
        force: accept a directory that is not empty and replace the checkpoint in it.

    Everything is written beside its place and moved there at the end: where that fails, by a full disk or by Ctrl-C,
    nothing is left behind and an earlier checkpoint stays as it was.

    Returns:
        The architecture that was written.

    Raises:
        FileExistsError: the directory is not empty and ``force`` is not set.
        ValueError: sizes that no such model can have, or a checkpoint of more than :data:`MAX_TOTAL_SIZE` bytes.
        OSError: the files cannot be written.
    """
    options = options or TinyOptions()
    directory = Path(directory)
    config = tiny_config(options)
    architecture = Architecture.from_config(config)
    if options.shard_size <= 0:
        raise ValueError(f"shard_size is {options.shard_size}, expected a positive number of bytes")
    _check_total_size(architecture)
    tokenizer = tiny_tokenizer.build_tokenizer(options.vocab_size)
    with _written_beside(directory, force=force) as target:
        _write_json(target / CONFIG_FILE, config)
        tiny_tokenizer.write_tokenizer(target, tokenizer, chat_template=chat_template())
        special_ids = {
            "bos_token_id": tokenizer.token_to_id(tiny_tokenizer.BOS_TOKEN),
            "eos_token_id": tokenizer.token_to_id(tiny_tokenizer.EOS_TOKEN),
            "pad_token_id": tokenizer.token_to_id(tiny_tokenizer.PAD_TOKEN),
        }
        _write_json(target / "generation_config.json", special_ids)
        printable = torch.zeros(options.vocab_size, 1)
        printable[tiny_tokenizer.printable_ids(tokenizer)] = 1.0
        _write_weights(target, architecture, options, printable)
    return architecture


def tiny_config(options: TinyOptions) -> dict[str, Any]:
    """``config.json`` with exactly the keys of the released one."""
    if options.architecture not in _ARCHITECTURES:
        raise ValueError(f"architecture is {options.architecture!r}, expected one of {sorted(_ARCHITECTURES)}")
    name = _ARCHITECTURES[options.architecture]
    model_type = ORIGINAL_ARCHITECTURES[name]
    require_field("num_hidden_layers", options.num_hidden_layers)
    pattern = options.attn_type_list
    if pattern is None:
        pattern = _default_pattern(options.num_hidden_layers)
    return {
        "architectures": [name],
        "attention_dropout": 0.0,
        "attn_type_list": list(pattern),
        "auto_map": {
            "AutoConfig": f"configuration_{model_type}.{name.removesuffix('ForCausalLM')}Config",
            "AutoModelForCausalLM": f"modeling_{model_type}.{name}",
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": options.head_dim,
        "hidden_act": "silu",
        "hidden_size": options.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": options.intermediate_size,
        "layernorm_full_attention_alpha": 3.5565588200778455,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_alpha": 3.5565588200778455,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_alpha": 3.5565588200778455,
        "layernorm_mlp_beta": 1.0,
        "max_position_embeddings": options.max_position_embeddings,
        "model_type": model_type,
        "num_attention_heads": options.num_attention_heads,
        "num_experts_per_tok": options.num_experts_per_tok,
        "num_hidden_layers": options.num_hidden_layers,
        "num_key_value_heads": options.num_key_value_heads,
        "num_local_experts": options.num_local_experts,
        "output_router_logits": False,
        "postnorm": True,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000000,
        "rotary_dim": options.rotary_dim,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "shared_intermediate_size": options.shared_intermediate_size,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.45.2",
        "use_cache": True,
        "vocab_size": options.vocab_size,
    }


def _default_pattern(num_layers: int) -> tuple[int, ...]:
    return tuple(int((i + 1) % 8 == 0 or i == num_layers - 1) for i in range(num_layers))


def _parse_attn_types(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(code) for code in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of 0 and 1") from None


def _check_total_size(architecture: Architecture) -> None:
    if architecture.total_size > MAX_TOTAL_SIZE:
        name, spec = max(architecture.tensors().items(), key=lambda item: item[1].nbytes)
        raise ValueError(
            f"these sizes make a checkpoint of {architecture.total_size:,} bytes, expected at most "
            f"{MAX_TOTAL_SIZE:,}; the largest tensor is {name} {list(spec.shape)}"
        )


@contextlib.contextmanager
def _written_beside(directory: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write into, whose files move into ``directory`` if the block ends well, and vanish otherwise."""
    if directory.is_dir():
        if any(directory.iterdir()) and not force:
            raise FileExistsError(f"{directory} is not empty; choose another directory or pass --force")
        made: list[Path] = []
    else:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True)
    # Inside of the directory, which may be a file system of its own.
    target = Path(tempfile.mkdtemp(prefix=".tiny-", dir=directory))
    try:
        yield target
        # Weights of an earlier checkpoint must not survive beside the new index. Other files that are called alike may.
        for stale in (directory / SINGLE_FILE, *directory.glob("model-[0-9]*-of-[0-9]*.safetensors")):
            stale.unlink(missing_ok=True)
        for file in target.iterdir():
            file.replace(directory / file.name)
        target.rmdir()
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _write_weights(directory: Path, architecture: Architecture, options: TinyOptions, printable: Tensor) -> None:
    shards = list(_plan_shards(architecture.tensors(), options.shard_size))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        # Numbered from zero, like the released files.
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random_tensor(name, spec, options.seed) for name, spec in shard.items()}
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] *= printable.to(tensors["lm_head.weight"].dtype)
        (directory / file).write_bytes(save(tensors, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(shard, file)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": architecture.total_size}, "weight_map": weight_map})


def _plan_shards(tensors: dict[str, TensorSpec], shard_size: int) -> Iterator[dict[str, TensorSpec]]:
    shard: dict[str, TensorSpec] = {}
    size = 0
    for name, spec in tensors.items():
        if shard and size + spec.nbytes > shard_size:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += spec.nbytes
    yield shard


def _random_tensor(name: str, spec: TensorSpec, seed: int) -> Tensor:
    """Uniform weights of the size that a trained model has. Each tensor has a generator of its own, seeded by its name.

    Drawn as integers, block by block: unlike ``torch.randn``, they are the same on every CPU.
    """
    # The CPU generator reads no more than the lower 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    scale = 0.2 if "norm" in name else math.sqrt(3.0) * _standard_deviation(name, fan_in=spec.shape[-1])
    mean = 1.0 if "norm" in name else 0.0
    steps = 1 << 20
    values = torch.empty(spec.numel, dtype=_TORCH_DTYPES[spec.dtype])
    for block in values.split(_BLOCK):
        uniform = torch.randint(-steps, steps + 1, block.shape, generator=generator).double() / steps
        block.copy_(mean + scale * uniform)
    return values.view(spec.shape)


def _standard_deviation(name: str, *, fan_in: int) -> float:
    if name == "model.embed_tokens.weight":
        return 1.0
    if name == "lm_head.weight":
        return _LOGIT_STD / math.sqrt(fan_in)
    # Gating (SiLU, sigmoid) about halves the input of these projections; doubled, a block adds as much as it reads.
    gated = name.endswith(("out_proj.weight", "w2.weight", "down_proj.weight"))
    return (2.0 if gated else 1.0) / math.sqrt(fan_in)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
