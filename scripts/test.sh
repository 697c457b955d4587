#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing and runs the tests. --slow runs the slow ones too; everything else goes to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
arguments=()
for argument in "$@"; do
    if [ "$argument" = "--slow" ]; then
        arguments+=(-m "")
    else
        arguments+=("$argument")
    fi
done
# One thread each: several engines and their tests share the cores, and threads that wait for each other are slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest ${arguments[@]+"${arguments[@]}"}
