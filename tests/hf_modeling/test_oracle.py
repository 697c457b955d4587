# SPDX-License-Identifier: Apache-2.0
"""The oracle against the golden data of the original implementation."""

from pathlib import Path

import pytest
from oracle import Oracle, OracleCache
from safetensors.torch import load_file

GOLDEN_CASES = ["a_hybrid8", "c_lengths", "e_leftpad", "f_text01_shared", "g_smooth_bf16"]


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_oracle_reproduces_golden(golden_dir: Path, case: str) -> None:
    oracle = Oracle.from_dir(golden_dir / case)
    golden = load_file(golden_dir / case / "golden.safetensors")
    # The first and the shortest batches are enough: the oracle has no notion of a batch or of a block.
    for batch in sorted({key.split(".")[0] for key in golden})[:2]:
        ids, mask = golden[f"{batch}.input_ids"], golden[f"{batch}.attention_mask"].bool()
        for row in range(ids.shape[0]):
            tokens = ids[row][mask[row]].tolist()
            cache = OracleCache()
            output = oracle(tokens, cache)
            # Stored for every token, or for the last token of each row only.
            expected = golden[f"{batch}.logits_fp64"].view(ids.shape[0], -1, output.logits.shape[-1])[row]
            assert (output.logits[-expected.shape[0] :] - expected).abs().max() <= 2e-4
            original = golden[f"{batch}.logits"][row][mask[row]]
            assert (output.logits - original).abs().max() <= 1e-3
            for layer, state in cache.states.items():
                reference = golden[f"{batch}.state.{layer}"][row]
                assert (state - reference).norm() <= 1e-5 * reference.norm()
    greedy = golden["b0.greedy_ids"]
    for row in range(min(greedy.shape[0], 2)):
        tokens = golden["b0.input_ids"][row][golden["b0.attention_mask"][row].bool()].tolist()
        assert oracle.greedy(tokens, greedy.shape[1]) == greedy[row].tolist()
