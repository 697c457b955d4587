# SPDX-License-Identifier: Apache-2.0
"""Registration: cheap, repeatable, and complete in every process of vLLM."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import tiny_config, write_checkpoint

pytest.importorskip("vllm", reason="vLLM is not installed")

from minimax_plugin.registration import register  # noqa: E402
from minimax_plugin.vllm_model import compat  # noqa: E402
from minimax_plugin.vllm_model.registration import MODEL_CLASSES  # noqa: E402

_CHEAP = """
import sys
import torch, transformers, vllm
from vllm import ModelRegistry
from vllm.config import CompilationConfig
from minimax_plugin.registration import register, register_hf
register_hf()
calls = []
register_model = ModelRegistry.register_model
ModelRegistry.register_model = lambda *args: (calls.append(args[0]), register_model(*args))
before = set(sys.modules)
register()
once = len(calls)
register()
assert not torch.cuda.is_initialized()
assert CompilationConfig._attention_ops.count("minimax_plugin::lightning_layer") == 1
print(once, len(calls), *sorted(set(sys.modules) - before))
"""


def test_registration_is_cheap_and_imports_no_model_code() -> None:
    result = subprocess.run([sys.executable, "-c", _CHEAP], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    once, twice, *imported = result.stdout.splitlines()[-1].split()
    # vLLM calls it in each of its processes: the work is one entry per class, done once, and no library is imported.
    assert int(once) == int(twice) == len(MODEL_CLASSES)
    own = [f"minimax_plugin.vllm_model{name}" for name in ("", ".compat", ".registration")]
    assert imported == ["minimax_plugin.versions", *own, "vllm.model_executor.models.config"]


def test_architectures_are_registered_lazily_by_package() -> None:
    from vllm import ModelRegistry

    register()
    assert set(MODEL_CLASSES) <= set(ModelRegistry.get_supported_archs())
    for path in MODEL_CLASSES.values():
        # A module path would let vLLM keep what it cached about a class whose base class has changed.
        assert path.partition(":")[0] == "minimax_plugin.vllm_model"


@pytest.mark.parametrize("flag", ["mamba_cache_dtype", "mamba_ssm_cache_dtype"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_smaller_state_is_refused_before_vllm_changes_the_option(
    flag: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU with AVX-512 BF16 vLLM swallows the refusal of the model class and puts float32 in its place."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    register()
    model = write_checkpoint(tmp_path, tiny_config())
    args = EngineArgs(model=str(model), skip_tokenizer_init=True, max_model_len=64, **{flag: dtype})
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} is '{dtype}', expected 'auto' or 'float32'"):
        args.create_engine_config()


def test_capabilities_that_vllm_reads_from_the_class() -> None:
    from vllm.model_executor.models.registry import _ModelInfo

    from minimax_plugin.vllm_model import MiniMaxM1ForCausalLM

    info = _ModelInfo.from_model_cls(MiniMaxM1ForCausalLM)
    assert info.is_hybrid and info.has_inner_state and info.supports_pp
    assert info.is_text_generation_model
    # It would unlock a cache mode in which states are kept at every block border (0.31 and 0.32; gone in 0.33).
    assert not getattr(info, "supports_mamba_prefix_caching", False)


def test_compiled_graphs_split_around_the_state() -> None:
    from vllm.compilation.partition_rules import should_split
    from vllm.config import CompilationConfig

    from minimax_plugin.vllm_model import lightning  # noqa: F401 - defines the operator

    register()
    config = CompilationConfig(mode=3)
    config.set_splitting_ops_for_v1(all2all_backend="naive", data_parallel_size=1)
    assert compat.LIGHTNING_OP in (config.splitting_ops or [])
    assert config.splitting_ops_contain_attention()
    node = torch.fx.Graph().call_function(torch.ops.minimax_plugin.lightning_layer.default)
    assert should_split(node, config.splitting_ops or [])


@pytest.mark.parametrize(
    ("splitting_ops", "refused"),
    [
        (["vllm::unified_attention_with_output"], True),
        (["vllm::unified_attention_with_output", compat.LIGHTNING_OP], False),
        ([], False),
        (None, False),
    ],
)
def test_graphs_that_split_elsewhere_only_are_refused(splitting_ops: list[str] | None, refused: bool) -> None:
    """By the user's hand, or in a release of vLLM that no longer reads the list the operator is put on."""
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(splitting_ops=splitting_ops))
    with pytest.raises(ValueError, match="without 'minimax_plugin::lightning_layer'") if refused else nullcontext():
        compat.require_splitting_op(config, compat.LIGHTNING_OP)


def test_the_splitting_operator_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CompilationConfig

    monkeypatch.setattr(CompilationConfig, "_attention_ops", ["vllm::other"])
    for _ in range(2):
        compat.add_splitting_op("minimax_plugin::test")
    assert CompilationConfig._attention_ops == ["vllm::other", "minimax_plugin::test"]


@pytest.mark.parametrize(
    ("caching", "unit", "hits"), [(True, 32, True), (True, 128, False), (True, None, False), (False, 32, False)]
)
def test_parts_of_blocks_are_hit_only_with_a_smaller_unit(caching: bool, unit: int | None, hits: bool) -> None:
    cache = SimpleNamespace(enable_prefix_caching=caching, prefix_match_unit=unit, block_size=128)
    config: Any = SimpleNamespace(cache_config=cache)
    assert compat.hits_parts_of_blocks(config) is hits


def test_breakable_graphs_run_the_operator_between_their_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.compilation import breakable_cudagraph

    from minimax_plugin.vllm_model import lightning

    monkeypatch.setattr(breakable_cudagraph, "is_breakable_cudagraph_enabled", lambda: True)
    body = lightning.lightning_layer
    wrapped = compat.eager_during_capture(body)
    assert wrapped is not body
    # vLLM registers the wrapped function, whose annotations are strings of another module.
    schema = torch.library.infer_schema(wrapped, mutates_args=["out", "sumsq"])
    assert schema == "(Tensor qkv, Tensor(a1!) out, Tensor(a2!) sumsq, str layer_name) -> ()"


@pytest.mark.parametrize(
    ("version", "outcome"),
    [
        ("0.30.1", "refused"),
        ("0.31.0", "quiet"),
        ("0.32.1", "quiet"),
        ("9.0.0", "warned"),
        ("dev", "warned"),
        ("0.1.dev1+g0123456", "warned"),
    ],
)
def test_version_check(
    version: str, outcome: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    if outcome == "refused":
        with pytest.raises(ImportError, match=r"needs vLLM 0\.31 or later, found 0\.30"):
            compat.warn_if_untested()
        return
    compat.warn_if_untested()
    assert bool(caplog.records) == (outcome == "warned")


def test_every_moving_name_is_where_this_release_has_it() -> None:
    for name in compat.__all__:
        assert getattr(compat, name) is not None


def test_nothing_of_vllm_is_imported_by_name_elsewhere_that_compat_provides() -> None:
    folder = Path(compat.__file__).parent
    for path in folder.glob("*.py"):
        if path.name == "compat.py":
            continue
        source = path.read_text()
        for module in set(compat._CLASSES.values()) | {"vllm.forward_context", "vllm.utils.torch_utils"}:
            assert f"from {module} import" not in source, f"{path.name} imports {module}; use compat"
