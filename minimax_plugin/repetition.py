# SPDX-License-Identifier: Apache-2.0
"""Stop a generation that repeats itself: after N consecutive tokens, each with probability above p.

The rule of the MiniMax-M1 report (arXiv 2506.13585, section 3.2) is N = 3,000 and p = 0.99: once a model is in a loop,
every token of it is nearly certain. Probabilities are those of the model itself, before temperature and truncation.

Only the most probable token of a step can have a probability above one half. So a step keeps that token and whether it
passes, and the next step, which knows what was sampled, counts. Nothing here waits for the device.

Shapes: ``S`` sequences that are counted, ``R`` of them in one step, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: The report's values.
DEFAULT_TOKENS = 3000
DEFAULT_PROBABILITY = 0.99

_NEVER = torch.iinfo(torch.int64).min // 2


def check_repetition_values(tokens: int, probability: float, *, names: tuple[str, str]) -> None:
    """Check N and p, called ``names`` in messages.

    Raises:
        ValueError: N is not a positive whole number, or p is outside [0.5, 1).
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"{names[0]} is {tokens!r}, expected a whole number of at least 1")
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0.5 <= probability < 1:
        raise ValueError(f"{names[1]} is {probability!r}, expected a number of at least 0.5 and below 1")


def repetition_end(logprobs: Sequence[float | None], tokens: int, probability: float) -> int | None:
    """How many tokens of a finished sequence come before the stop: up to the end of the first run of ``tokens``.

    Args:
        logprobs: log-probability of every generated token before temperature; None (not known) ends a run.
        tokens: N.
        probability: p.

    Returns:
        None for a sequence that the rule does not stop.
    """
    threshold, run = math.log(probability), 0
    for index, logprob in enumerate(logprobs):
        run = run + 1 if logprob is not None and logprob > threshold else 0
        if run == tokens:
            return index + 1
    return None


class RunLengths:
    """Current run of probable tokens of S sequences, updated one step at a time.

    Args:
        size: S.
        device: where the counts live.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self._run = torch.zeros(size, dtype=torch.int64, device=device)
        self._top = torch.full((size,), -1, dtype=torch.int64, device=device)
        self._is_probable = torch.zeros(size, dtype=torch.bool, device=device)
        self._position = torch.full((size,), _NEVER, dtype=torch.int64, device=device)

    @property
    def size(self) -> int:
        return self._run.shape[0]

    def grow(self, size: int) -> None:
        """Make room for more sequences."""
        larger = RunLengths(size, self._run.device)
        for name, tensor in vars(self).items():
            getattr(larger, name)[: self.size] = tensor
        vars(self).update(vars(larger))

    def forget(self, sequence: int) -> None:
        """Start over with a new sequence in place of number ``sequence``."""
        self._run[sequence] = 0
        self._is_probable[sequence] = False
        self._position[sequence] = _NEVER

    def advance(
        self, sequences: Tensor, positions: Tensor, previous: Tensor, logits: Tensor, log_probability: Tensor
    ) -> Tensor:
        """Count the tokens that were sampled last and look at the next ones.

        A step that is repeated (a request that went on after it was interrupted) counts once; one that lies further
        back than what was counted changes nothing; where steps are missing, the run starts anew.

        Args:
            sequences: [R] numbers of the sequences.
            positions: [R] how many tokens each has generated so far; negative inside the prompt.
            previous: [R] its last token.
            logits: [R, V] of the model for the next token.
            log_probability: [R] or scalar, log p.

        Returns:
            [R] length of the run that ends with ``previous``.
        """
        run, position = self._run[sequences], self._position[sequences]
        follows = (positions == position + 1) & (positions > 0)
        counts = follows & self._is_probable[sequences] & (previous == self._top[sequences])
        run = torch.where(counts, run + 1, torch.where(positions == position, run, 0))
        is_old = positions < position

        top_logit, top = logits.max(dim=-1)
        top_log_probability = top_logit.float() - torch.logsumexp(logits.float(), dim=-1)
        for state, value in (
            (self._run, run),
            (self._top, top),
            (self._is_probable, top_log_probability > log_probability),
            (self._position, positions),
        ):
            state[sequences] = torch.where(is_old, state[sequences], value)
        return torch.where(is_old, 0, run)


def force_token(logits: Tensor, rows: Tensor, token: Tensor | int) -> Tensor:
    """Leave ``token`` as the only choice in some rows, unless it is forbidden there (a grammar, a minimum length).

    Args:
        logits: [R, V], changed in place.
        rows: [R] bool.
        token: [R] or one for all.

    Returns:
        [R] bool, the rows where it is the only choice.
    """
    column = torch.as_tensor(token, dtype=torch.int64, device=logits.device).expand(logits.shape[0]).unsqueeze(1)
    allowed = logits.gather(1, column)
    rows = rows & (allowed.squeeze(1) != -torch.inf)
    logits.masked_fill_(rows.unsqueeze(1), -torch.inf)
    logits.scatter_(1, column, torch.where(rows.unsqueeze(1), 0.0, allowed))
    return rows


class RepetitionStop:
    """A logits processor of transformers: forces the end token once a sequence has repeated itself for long enough.

    Give one instance to one call of ``generate(logits_processor=[...])``, sampling or greedy, no beams. transformers
    applies it before temperature, top-k and top-p.

    Args:
        tokens: N.
        probability: p.
        eos_token_id: the token that ends a sequence.

    Raises:
        ValueError: N is not positive, or p is outside [0.5, 1).
    """

    def __init__(self, tokens: int, probability: float, eos_token_id: int) -> None:
        check_repetition_values(tokens, probability, names=("tokens", "probability"))
        self._tokens = tokens
        self._probability = probability
        self._eos_token_id = eos_token_id
        self._prompt_length = 0
        self._runs: RunLengths | None = None
        self._forced_at = torch.empty(0, dtype=torch.int64)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` [S, T] with the prompt, ``scores`` [S, V]; new scores [S, V]."""
        batch, length = input_ids.shape
        if self._runs is None:
            self._runs = RunLengths(batch, scores.device)
            self._prompt_length = length
            self._forced_at = torch.full((batch,), -1, dtype=torch.int64, device=scores.device)
            self._sequences = torch.arange(batch, device=scores.device)
            self._log_probability = torch.tensor(math.log(self._probability), device=scores.device)
        if batch != self._runs.size:
            raise ValueError(
                f"RepetitionStop got {batch} sequences after {self._runs.size}; make one for each call of generate"
            )
        position = length - self._prompt_length
        run = self._runs.advance(
            self._sequences,
            torch.full_like(self._sequences, position),
            input_ids[:, -1],
            scores,
            self._log_probability,
        )
        if position < self._tokens:
            return scores
        scores = scores.clone()
        forced = force_token(scores, run >= self._tokens, self._eos_token_id)
        self._forced_at = torch.where(forced & (self._forced_at < 0), position, self._forced_at)
        return scores

    def kept_tokens(self) -> list[int | None]:
        """Per sequence how many tokens it generated before the end token was forced, None where it was not.

        A sequence that had ended before by itself counts on through its padding, so a number may lie beyond its end.
        """
        return [None if index < 0 else index for index in self._forced_at.tolist()]
