#!/usr/bin/env bash
# Trains several named experiments side by side: `gpt2 experiments run` with the Python of .venv.
# --help lists the arguments; docs/experiments.md has an example.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3 || true)
[[ -n $python ]] || { echo "error: Python is not installed" >&2; exit 2; }
"$python" -c 'import sys; from importlib import util; sys.exit(not util.find_spec("tyro"))' ||
    { echo "error: $python lacks the packages of this project; first: make install" >&2; exit 2; }
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -P -m gpt2 experiments run "$@"
