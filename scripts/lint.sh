#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Style, format and types. Nothing is changed; `ruff check --fix` and `ruff format` repair most findings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
ruff check .
ruff format --check .
mypy
