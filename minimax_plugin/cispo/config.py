# SPDX-License-Identifier: Apache-2.0
"""Arguments of the CISPO trainer."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from minimax_plugin.cispo.repetition import RepetitionRule
from minimax_plugin.cispo.schedule import LengthBiasMonitor, LengthSchedule

TOKEN_MASKS = ("none", "ppo", "dual")
LOSS_AGGREGATIONS = ("token", "sample", "prompt")
IMPORTANCE_BASES = ("train", "sampler")
ZERO_VARIANCE_MODES = ("keep", "drop", "refill")
ROLLOUT_CHECKS = ("warn", "error", "off")
ROUTER_REPLAY_MODES = ("off", "train", "rollout")


@dataclass
class CISPOConfig(GRPOConfig):
    """Arguments of ``CISPOTrainer``: those of TRL's ``GRPOConfig`` and the following.

    Symbols are those of arXiv 2506.13585: ``r`` is the probability of a token under the policy over its probability
    under the old policy, and the loss weighs tokens with ``clip(r, 1 - epsilon_is_low, 1 + epsilon_is_high)`` (eq. 5).

    Other projects state the cap in other ways. A cap of 5.0 is ``epsilon_is_high=4.0`` here and in verl (``clip[1 -
    clip_ratio_low, 1 + clip_ratio_high]``), SkyRL (the same; its defaults became 1 and 4) and open-instruct (``1 +
    clip_higher``), but ``epsilon_high=5.0`` in TRL's ``loss_type="cispo"`` (``clamp(r, max=epsilon_high)``), which
    otherwise takes ``epsilon = 0.2`` for the cap. verl and SkyRL have a lower bound too: ``epsilon_is_low``.

    Raises:
        ValueError: a value that cannot be meant; the message names the field, its value and what was expected.
    """

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["vllm_llm_kwargs", "reward_weight_schedule"]

    # Defaults of TRL and transformers that the report sets otherwise
    loss_type: str = field(default="cispo", metadata={"help": "'cispo', the only loss of this trainer."})
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL divergence to the reference model. The report has none."}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "First moment decay of AdamW (section 3.2)."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second moment decay of AdamW (section 3.2)."})
    adam_epsilon: float = field(
        default=1e-15,
        metadata={"help": "Epsilon of AdamW: gradients range from 1e-18 to 1e-5, most below 1e-14 (section 3.2)."},
    )
    cast_lm_head_to_fp32: bool = field(
        default=True, metadata={"help": "Compute logits in fp32 from fp32 weights (section 3.2). Not for tied heads."}
    )
    router_aux_loss_coef: float | None = field(
        default=0.0,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts. 0.0 switches it off; None takes the "
            "model config's (0.001 in MiniMax-M1), which moves weights even when every group has zero variance."
        },
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How the ratio of trainer to vLLM probabilities corrects the loss. TRL's default multiplies the "
            "ratios of a sequence, which masks most sequences once they are long."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=2.0, metadata={"help": "Cap of that ratio. TRL's default is 3.0."}
    )

    # The loss
    epsilon_is_high: float = field(
        default=4.0,
        metadata={
            "help": "Importance weights are capped at 1 + epsilon_is_high (eq. 5); inf for no cap. TRL's cap X is "
            "epsilon_is_high = X - 1; verl, SkyRL and open-instruct state it as here."
        },
    )
    epsilon_is_low: float | None = field(
        default=None,
        metadata={
            "help": "Importance weights are at least 1 - epsilon_is_low (eq. 5). None for no lower bound, as in the "
            "report's runs, TRL and open-instruct; verl and SkyRL have one."
        },
    )
    token_mask: str = field(
        default="none",
        metadata={
            "help": "Tokens left out of the loss. 'none'; 'ppo': those that PPO's clipping leaves out, eq. 7 with the "
            "bounds 1 - epsilon and 1 + epsilon_high (epsilon if unset); 'dual': also those with a negative advantage "
            "and a ratio above dual_clip_ratio."
        },
    )
    dual_clip_ratio: float | None = field(
        default=None, metadata={"help": "Upper ratio for negative advantages of token_mask='dual', above 1."}
    )
    loss_aggregation: str = field(
        default="token",
        metadata={
            "help": "'token': mean over the tokens of the batch, as TRL and verl read eq. 4. 'sample': mean over "
            "completions of the mean over tokens. 'prompt': mean over prompts of the mean over the tokens of their "
            "group, eq. 4 to the letter, and ScaleRL's choice."
        },
    )
    sample_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "w in (1 - w) * token mean + w * sample mean. The report combines the two late in training "
            "(section 5) without saying how."
        },
    )
    importance_base: str = field(
        default="train",
        metadata={
            "help": "Denominator of the ratio. 'train': the policy before the first update on the batch, as the "
            "trainer computes it; the mismatch with vLLM is corrected by a factor outside the cap, as in TRL. "
            "'sampler': the probabilities vLLM sampled with, one ratio and one cap, no forward pass for the old policy."
        },
    )
    log_ratio_bound: float = field(
        default=20.0, metadata={"help": "log r is kept within plus and minus this before exp. verl: 20."}
    )

    # Rollouts
    rollout_check: str = field(
        default="warn",
        metadata={
            "help": "What to do when the first rollout's probabilities differ from the trainer's: 'warn', 'error' or "
            "'off'."
        },
    )
    rollout_check_pearson: float = field(
        default=0.99, metadata={"help": "Lowest accepted correlation of token probabilities (Figure 3)."}
    )
    vllm_llm_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of vllm.LLM in colocate mode, which TRL has no field for."}
    )
    repetition_stop_tokens: int | None = field(
        default=3000,
        metadata={
            "help": "Stop a completion after this many consecutive tokens above repetition_stop_prob (section 3.2). "
            "None: never."
        },
    )
    repetition_stop_prob: float = field(
        default=0.99, metadata={"help": "Probability above which a token counts as repetition."}
    )
    zero_variance: str = field(
        default="drop",
        metadata={
            "help": "Groups whose completions all have the same reward: 'keep' in the loss normaliser, as TRL does; "
            "'drop' from it; 'refill': replace them by other prompts (DAPO's dynamic sampling)."
        },
    )
    max_refill_rounds: int = field(
        default=4, metadata={"help": "Further rounds of generation per batch with zero_variance='refill'."}
    )
    retire_solved_at: float | None = field(
        default=None,
        metadata={"help": "Train no more on prompts whose share of solved completions reached this. ScaleRL: 0.9."},
    )
    solved_reward: float = field(
        default=1.0, metadata={"help": "Total reward from which a completion counts as solved."}
    )
    length_stages: list[int] | None = field(
        default=None, metadata={"help": "Ascending completion lengths, one per stage (section 5)."}
    )
    length_stage_p99_share: float = field(
        default=0.9,
        metadata={"help": "Move on when the 99th percentile of lengths is at least this share of the window."},
    )
    length_stage_patience: int = field(
        default=8, metadata={"help": "Rollouts over which the perplexity of generated text must have converged."}
    )
    length_stage_tolerance: float = field(
        default=0.02, metadata={"help": "Share by which its older and newer half may differ."}
    )
    reward_weight_schedule: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Weights of the reward functions by update, linear between them: {0: [1, 0], 200: [1, 0.5]}."
        },
    )
    length_bias_threshold: float = field(
        default=0.5,
        metadata={"help": "Warn when rewards correlate with length within groups by this much (section 4.2)."},
    )
    late_stage_epsilon_is_high: float | None = field(
        default=None, metadata={"help": "epsilon_is_high of the last stage (section 5)."}
    )
    late_stage_max_grad_norm: float | None = field(
        default=None, metadata={"help": "max_grad_norm of the last stage (section 5)."}
    )

    # The log-probability pass
    router_replay: str = field(
        default="off",
        metadata={
            "help": "Experts of each token in the loss: 'off': chosen anew; 'train': those of the old-policy pass; "
            "'rollout': those that vLLM sampled with, where it returns them (Model Runner V2), else as 'train'. "
            "Their weights are always computed anew."
        },
    )
    router_module: str = field(
        default="block_sparse_moe.gate",
        metadata={"help": "How the names of the model's routers end, for router_replay. Qwen3-MoE: mlp.gate."},
    )
    pack_sequences: bool = field(
        default=False, metadata={"help": "Score completions packed into one row, without padding."}
    )
    pack_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "With pack_sequences: tokens of a packed row at most; a batch becomes as many rows as it takes, "
            "one after the other. A longer sequence has a row of its own. None: no bound."
        },
    )
    head_chunk_tokens: int | None = field(
        default=256,
        metadata={
            "help": "Tokens whose logits exist at once when completions are scored. None for TRL's own head, which "
            "takes up to 4096 tokens and an eighth of the vocabulary at once."
        },
    )

    # Reports and checkpoints
    mismatch_plot_steps: int = field(
        default=0,
        metadata={"help": "Plot rollout against training probabilities every so many steps; 0: never."},
    )
    save_rollout_buffer: bool = field(
        default=True, metadata={"help": "Save the current rollout in checkpoints, so that resuming within it is exact."}
    )

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_loss()
        self._check_token_mask()
        self._check_rollouts()
        self._check_schedules()
        self._check_scoring()
        super().__post_init__()
        RepetitionRule.from_config(self)

    @property
    def importance_cap(self) -> float:
        """Largest importance weight, ``1 + epsilon_is_high``."""
        return 1.0 + self.epsilon_is_high

    def _check_choices(self) -> None:
        for name, choices in (
            ("token_mask", TOKEN_MASKS),
            ("loss_aggregation", LOSS_AGGREGATIONS),
            ("importance_base", IMPORTANCE_BASES),
            ("zero_variance", ZERO_VARIANCE_MODES),
            ("rollout_check", ROLLOUT_CHECKS),
            ("router_replay", ROUTER_REPLAY_MODES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, choices))}")

    def _check_loss(self) -> None:
        if self.loss_type != "cispo":
            raise ValueError(
                f"loss_type is {self.loss_type!r}, expected 'cispo'; use trl.GRPOTrainer for the other losses"
            )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level is {self.importance_sampling_level!r}, expected 'token': this loss weighs "
                "tokens"
            )
        if self.delta is not None:
            raise ValueError(
                f"delta is {self.delta}, which is not of this loss; for dual clipping set token_mask='dual' and "
                f"dual_clip_ratio={self.delta}"
            )
        if not self.epsilon_is_high > 0:
            raise ValueError(
                f"epsilon_is_high is {self.epsilon_is_high}, expected a positive number (inf for no cap): importance "
                "weights are capped at 1 + epsilon_is_high"
            )
        if self.epsilon_is_low is not None and not self.epsilon_is_low > 0:
            raise ValueError(
                f"epsilon_is_low is {self.epsilon_is_low}, expected a positive number or None: importance weights are "
                "at least 1 - epsilon_is_low"
            )
        if not 0.0 <= self.sample_loss_weight <= 1.0:
            raise ValueError(f"sample_loss_weight is {self.sample_loss_weight}, expected a share from 0 to 1")
        if not 0.0 < self.log_ratio_bound <= 80.0:
            raise ValueError(
                f"log_ratio_bound is {self.log_ratio_bound}, expected a number above 0 and at most 80, so that its "
                "exponential is finite in fp32"
            )
        if not self.beta >= 0.0:
            raise ValueError(f"beta is {self.beta}, expected 0 or more")

    def _check_token_mask(self) -> None:
        if self.token_mask == "none":
            if self.epsilon_high is not None:
                raise ValueError(
                    f"epsilon_high is {self.epsilon_high}, but without a token_mask nothing uses it. The cap of "
                    "importance weights is 1 + epsilon_is_high; TRL's cispo cap X is epsilon_is_high = X - 1, here "
                    f"{self.epsilon_high - 1:g}"
                )
            if self.epsilon != GRPOConfig.epsilon:
                raise ValueError(
                    f"epsilon is {self.epsilon}, but without a token_mask nothing uses it. The lower bound of "
                    "importance weights is 1 - epsilon_is_low, the upper one 1 + epsilon_is_high"
                )
        for name in ("epsilon", "epsilon_high"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a positive number: it bounds token_mask")
        if (self.dual_clip_ratio is not None) != (self.token_mask == "dual"):
            raise ValueError(
                f"dual_clip_ratio is {self.dual_clip_ratio} and token_mask is {self.token_mask!r}: token_mask='dual' "
                "needs a ratio above 1, for example 3.0, and the other masks have none"
            )
        if self.dual_clip_ratio is not None and not self.dual_clip_ratio > 1.0:
            raise ValueError(f"dual_clip_ratio is {self.dual_clip_ratio}, expected a ratio above 1, for example 3.0")

    def _check_rollouts(self) -> None:
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(
                f"num_generations is {self.num_generations}, expected at least 2: the advantage of a completion is "
                "relative to the others of its prompt"
            )
        if not -1.0 <= self.rollout_check_pearson <= 1.0:
            raise ValueError(f"rollout_check_pearson is {self.rollout_check_pearson}, expected a correlation, -1 to 1")
        if self.max_refill_rounds < 1:
            raise ValueError(
                f"max_refill_rounds is {self.max_refill_rounds}, expected at least 1; zero_variance='drop' never "
                "refills"
            )
        if self.retire_solved_at is not None and not 0.0 < self.retire_solved_at <= 1.0:
            raise ValueError(
                f"retire_solved_at is {self.retire_solved_at}, expected a pass rate above 0 and at most 1, or None"
            )
        if not math.isfinite(self.solved_reward):
            raise ValueError(f"solved_reward is {self.solved_reward}, expected a finite reward")
        if self.mismatch_plot_steps < 0:
            raise ValueError(f"mismatch_plot_steps is {self.mismatch_plot_steps}, expected 0 (never) or more")

    def _check_schedules(self) -> None:
        LengthBiasMonitor(self.length_bias_threshold)
        LengthSchedule.from_config(self)
        for name in ("late_stage_epsilon_is_high", "late_stage_max_grad_norm"):
            value = getattr(self, name)
            if value is not None and self.length_stages is None:
                raise ValueError(f"{name} is {value}, but without length_stages there is no last stage; set both")
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected a positive number")

    def _check_scoring(self) -> None:
        for name in ("head_chunk_tokens", "pack_max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1, or None")
        if self.pack_sequences and self.head_chunk_tokens is None:
            raise ValueError(
                "pack_sequences is True and head_chunk_tokens is None, but TRL's head scores padded batches only; set "
                "head_chunk_tokens, for example to 256"
            )
        if self.pack_max_tokens is not None and not self.pack_sequences:
            raise ValueError(
                f"pack_max_tokens is {self.pack_max_tokens}, but without pack_sequences nothing is packed; set "
                "pack_sequences=True"
            )
        if self.router_replay == "train" and self.importance_base == "sampler":
            raise ValueError(
                "router_replay is 'train', which takes routes from the old-policy pass, but importance_base='sampler' "
                "leaves that pass out; set router_replay='rollout' or importance_base='train'"
            )
        if self.router_replay == "rollout" and not self.use_vllm:
            raise ValueError(
                "router_replay is 'rollout', which takes routes from vLLM; set use_vllm=True or router_replay='train'"
            )
