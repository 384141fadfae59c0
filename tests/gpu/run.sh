#!/usr/bin/env bash
# The checks that only a GPU can make: bash tests/gpu/run.sh [flags of pytest]
# Needs torch, numpy, pytest and what nanogpt.training.fit imports (rich, psutil, filelock); nothing is installed or fetched.
# NANOGPT_TEST_DEVICE=cpu runs the same checks on the CPU, which shows that they can be run, and nothing of a GPU.
# PYTHON=/path/to/python takes another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" bench/gpu/rows.py
"$python" -c '
import importlib.util, sys
missing = [name for name in ("pytest", "rich", "psutil", "filelock") if not importlib.util.find_spec(name)]
if missing:
    sys.exit("error: " + ", ".join(missing) + " missing: bench/gpu/README.md says how to bring packages along")'
exec "$python" -m pytest -p no:cacheprovider -rs tests/gpu "$@"
