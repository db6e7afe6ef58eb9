"""Forecasts how long training takes: of the newest run, or from flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))
try:
    from gpt2.cli.estimate import estimate_main
except ModuleNotFoundError as missing:
    print(f"error: {missing}; first: source .venv/bin/activate (make install)", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(estimate_main())
