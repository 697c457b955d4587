# SPDX-License-Identifier: Apache-2.0
"""Which prompts and completions take part in the loss: groups without variance, prompts that are solved.

A rollout has ``P`` prompts with ``G`` completions each, ``N = P * G`` rows over all processes in the order of the
processes, so that a group may lie on two of them. Everything here is computed from what all processes know, hence
alike on each of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Rewards closer than this, relative to the largest, are the same: sums of equal parts may round differently.
_REWARD_TOLERANCE = 1e-6

#: Entries of a rollout that are padded on the left. All other entries per token are padded on the right.
_LEFT_PADDED = ("prompt_ids", "prompt_mask")

#: What entries of a rollout are padded with that are neither ids nor take zero: -1 is no expert.
_PADDING = {"expert_routes": -1}


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums [N] of the rewards [N, F] of F functions; NaN where none of them applies."""
    totals = (rewards * weights.to(rewards)).nansum(dim=1)
    return totals.masked_fill(rewards.isnan().all(dim=1), math.nan)


def zero_variance_groups(rewards: Tensor, weights: Tensor, num_generations: int, *, each: bool = False) -> Tensor:
    """Groups whose rewards do not differ, so that every advantage is zero. bool [P].

    Args:
        rewards: rewards [N, F] by function; NaN where a function does not apply to a completion.
        weights: weight of each function [F].
        num_generations: G.
        each: look at each function on its own, as advantages do that are normalised before they are summed.
    """
    columns = rewards[:, weights.to(rewards) != 0] if each else total_rewards(rewards, weights)[:, None]
    grouped = columns.view(-1, num_generations, columns.shape[1]).double()
    low = grouped.nan_to_num(nan=math.inf).amin(dim=1)
    high = grouped.nan_to_num(nan=-math.inf).amax(dim=1)
    largest = torch.maximum(low.abs(), high.abs())
    same = (high - low <= _REWARD_TOLERANCE * largest.clamp(min=_REWARD_TOLERANCE)) | (high < low)
    return same.all(dim=1)


def pass_rates(rewards: Tensor, weights: Tensor, num_generations: int, solved_reward: float) -> list[float]:
    """Share of each group's completions whose total reward reaches ``solved_reward``. Arguments as above."""
    solved = total_rewards(rewards, weights) >= solved_reward - _REWARD_TOLERANCE
    return solved.view(-1, num_generations).double().mean(dim=1).tolist()


class PromptPool:
    """The prompts of a dataset: those that are solved, and an endless stream of the others.

    The stream goes through the dataset again and again, in a new order each time. It is apart from the data loader's,
    so that resuming needs no more than :meth:`state_dict`.

    Args:
        dataset: indexable rows with a ``"prompt"``.
        seed: of the orders.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.solved: set[str] = set()
        self._dataset = dataset
        self._seed = seed
        self._position = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, count: int, avoid: Collection[str] = ()) -> list[dict[str, Any]]:
        """The next ``count`` rows that are not solved, as far as possible none whose key is in ``avoid``.

        Fewer only where every prompt is solved, then none.
        """
        rows: list[dict[str, Any]] = []
        for forbidden in (set(avoid), set[str]()):
            misses = 0
            while len(rows) < count and misses < len(self._dataset):
                row = self._next()
                key = prompt_key(row)
                usable = key not in self.solved and key not in forbidden
                misses = 0 if usable else misses + 1
                if usable:
                    rows.append(row)
        return rows

    def retire(self, keys: Sequence[str], rates: Sequence[float], threshold: float) -> None:
        """Take the prompts whose pass rate reached ``threshold`` for solved."""
        self.solved.update(key for key, rate in zip(keys, rates, strict=True) if rate >= threshold)

    def replace_solved(
        self, rows: list[dict[str, Any]], keys: Sequence[str], first_group: int, num_generations: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Put unsolved prompts in the place of solved ones.

        Args:
            rows: rows of this process.
            keys: key of the prompt of every row of all processes [N].
            first_group: number of the rows on processes before this one.
            num_generations: G.

        Returns:
            The rows, and how many prompts of all processes stayed although they are solved, for want of others.
        """
        group_keys = keys[::num_generations]
        retired = [group for group, key in enumerate(group_keys) if key in self.solved]
        if not retired:
            return rows, 0
        replacements = dict(zip(retired, self.draw(len(retired), group_keys), strict=False))
        groups = [(first_group + row) // num_generations for row in range(len(rows))]
        new = [dict(replacements.get(group, row)) for group, row in zip(groups, rows, strict=True)]
        return new, len(retired) - len(replacements)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"position": self._position, "solved": sorted(self.solved)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._position = state["position"]
        self.solved = set(state["solved"])

    def _next(self) -> dict[str, Any]:
        turn, offset = divmod(self._position, len(self._dataset))
        if self._order[0] != turn:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + turn + 1)
            self._order = (turn, torch.randperm(len(self._dataset), generator=generator).tolist())
        self._position += 1
        return dict(self._dataset[self._order[1][offset]])


def prompt_key(row: Mapping[str, Any]) -> str:
    """Names the prompt of a row by its content."""
    text = json.dumps(row["prompt"], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def groups_to_draw(free_rows: int, num_generations: int, num_processes: int) -> int:
    """Prompts to generate for ``free_rows`` rows: as few as fill them and can be shared out evenly."""
    step = num_processes // math.gcd(num_generations, num_processes)
    return math.ceil(free_rows / num_generations / step) * step


def groups_that_fit(usable: Sequence[bool], free: Sequence[int], num_generations: int) -> list[bool]:
    """Which of freshly generated groups take free rows, each row on the process it was generated on.

    Args:
        usable: whether each group has variance.
        free: free rows of each process.
        num_generations: G.

    Returns:
        One flag per group; a group is taken whole or not at all.
    """
    rows_per_process = len(usable) * num_generations // len(free)
    left = list(free)
    taken = []
    for group, wanted in enumerate(usable):
        need = [0] * len(free)
        for row in range(group * num_generations, (group + 1) * num_generations):
            need[row // rows_per_process] += 1
        fits = wanted and all(n <= f for n, f in zip(need, left, strict=True))
        if fits:
            left = [f - n for f, n in zip(left, need, strict=True)]
        taken.append(fits)
    return taken


def replace_rows(
    batch: dict[str, Any], slots: Tensor, fresh: Mapping[str, Any], sources: Tensor, pad_token_id: int
) -> dict[str, Any]:
    """Put rows of ``fresh`` into ``batch``, both of TRL's form, and pad where one has longer rows than the other.

    Args:
        batch: entries per row, padded to a common length; numbers for the whole batch are left as they are.
        slots: rows to overwrite.
        fresh: entries of the same names.
        sources: rows of ``fresh``, as many as slots.
        pad_token_id: fills ``*_ids``.

    Raises:
        ValueError: entries that cannot be merged.
    """
    rows = len(batch["prompt_ids"])
    if batch.keys() != fresh.keys():
        raise ValueError(
            f"rollouts differ in {sorted(batch.keys() ^ fresh.keys())}; zero_variance='refill' needs equal"
        )
    merged = dict(batch)
    for name, old in batch.items():
        new = fresh[name]
        if isinstance(old, list):
            merged[name] = list(old)
            for slot, source in zip(slots.tolist(), sources.tolist(), strict=True):
                merged[name][slot] = new[source]
        elif isinstance(old, Tensor) and old.ndim > 0:
            if len(old) != rows:
                raise ValueError(f"{name} has {len(old)} entries for {rows} completions; use zero_variance='drop'")
            pad = pad_token_id if name.endswith("_ids") else _PADDING.get(name, 0)
            old, new = (
                _pad_to(name, entry, source, batch, fresh, pad) for entry, source in ((old, batch), (new, fresh))
            )
            merged[name] = old.index_copy(0, slots, new[sources])
    return merged


def select_rows(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """The given rows of every entry per row."""
    count = len(batch["prompt_ids"])

    def select(entry: Any) -> Any:
        if isinstance(entry, Tensor) and entry.ndim > 0 and len(entry) == count:
            return entry[rows]
        if isinstance(entry, list) and len(entry) == count:
            return [entry[row] for row in rows.tolist()]
        return entry

    return {name: select(entry) for name, entry in batch.items()}


def _pad_to(
    name: str, entry: Tensor, source: Mapping[str, Any], batch: Mapping[str, Any], fresh: Mapping[str, Any], pad: int
) -> Tensor:
    """``entry`` of ``source`` with the width that the longer of both rollouts has."""
    if entry.ndim < 2 or batch[name].shape[1] == fresh[name].shape[1] == 1:  # one value per completion
        return entry
    prompt, completion = (source[key].shape[1] for key in ("prompt_ids", "completion_ids"))
    left, right = (
        max(batch[key].shape[1], fresh[key].shape[1]) - width
        for key, width in (("prompt_ids", prompt), ("completion_ids", completion))
    )
    if name in _LEFT_PADDED:
        right = 0
    elif entry.shape[1] == completion:
        left = 0
    elif entry.shape[1] != prompt + completion:
        raise ValueError(
            f"{name} has {entry.shape[1]} columns, expected one per completion token ({completion}) or one per token "
            f"({prompt + completion}); use zero_variance='drop'"
        )
    return torch.nn.functional.pad(entry, (0, 0) * (entry.ndim - 2) + (left, right), value=pad)
