# SPDX-License-Identifier: Apache-2.0
"""The oracle against the golden data of the original implementation."""

from pathlib import Path

from goldens import golden_cases, load_golden, stored
from oracle import Oracle, OracleCache


@golden_cases()
def test_oracle_reproduces_golden(case: Path) -> None:
    oracle = Oracle.from_dir(case)
    batches = load_golden(case)
    # The first and the shortest batches are enough: the oracle has no notion of a batch or of a block.
    for batch in batches[:2]:
        ids, mask, original = batch["input_ids"], batch["attention_mask"].bool(), stored(batch, "logits")
        for row in range(ids.shape[0]):
            cache = OracleCache()
            output = oracle(ids[row][mask[row]].tolist(), cache)
            # Stored for every token, or for the last token of each row only.
            expected = batch["logits_fp64"].view(ids.shape[0], -1, output.logits.shape[-1])[row]
            assert (output.logits[-expected.shape[0] :] - expected).abs().max() <= 2e-4
            # Stored for every position or for the last eight; a row may begin with padding.
            expected = original[row][mask[row, -original.shape[1] :]]
            assert (output.logits[-expected.shape[0] :] - expected).abs().max() <= 1e-3
            assert cache.states.keys() == {int(key.split(".")[1]) for key in batch if key.startswith("state.")}
            for layer, state in cache.states.items():
                reference = batch[f"state.{layer}"][row]
                assert (state - reference).norm() <= 1e-5 * reference.norm()
    rows = (batches[0][name][:2] for name in ("input_ids", "attention_mask", "greedy_ids"))
    for ids, mask, greedy in zip(*rows, strict=True):
        assert oracle.greedy(ids[mask.bool()].tolist(), len(greedy)) == greedy.tolist()
