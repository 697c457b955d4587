#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a clone to exact tokens: installs, writes a tiny checkpoint, generates with transformers, serves the same
# checkpoint with vLLM, asks it over HTTP and compares the tokens. Exit status 1 when they differ.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
exec python scripts/demo.py "$@"
