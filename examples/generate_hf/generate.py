# SPDX-License-Identifier: Apache-2.0
"""Answer one question with transformers and stream the answer to the terminal."""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import minimax_plugin  # noqa: F401 - registers the model with transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="checkpoint directory or repository id")
    parser.add_argument("question")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--device-map", help='"auto" spreads a large model over all devices (needs accelerate)')
    parser.add_argument("--sample", action="store_true", help="temperature 1.0, top-p 0.95 instead of greedy")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=args.device_map)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95} if args.sample else {"do_sample": False}
    model.generate(
        **inputs.to(model.device),
        **sampling,
        max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )


if __name__ == "__main__":
    main()
