"""Every seed of every point of a grid, on all GPUs at once. `--help` lists the options."""

import sys

try:
    from gpt2.cli_experiments import seeds_main
except ModuleNotFoundError as missing:
    print(f"error: {missing}; first: source .venv/bin/activate (make install)", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(seeds_main())
