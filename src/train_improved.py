"""Trains one model; torchrun starts this script on every rank. `--help` lists the options."""

import sys

try:
    from gpt2.cli.train import train_main
except KeyboardInterrupt:  # imports take a while
    sys.exit(130)
except ModuleNotFoundError as missing:
    print(f"error: {missing}; first: source .venv/bin/activate (make install)", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(train_main())
