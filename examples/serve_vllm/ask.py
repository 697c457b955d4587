# SPDX-License-Identifier: Apache-2.0
"""Ask a running OpenAI server one question and stream the answer to the terminal."""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="base URL of the server's API")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": args.question}]
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=args.max_tokens, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
