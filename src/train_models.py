"""Trains several models on the same data, side by side. `--help` lists the options."""

import sys

if __name__ == "__main__":  # worker processes import this file, too
    try:
        from gpt2.cli.models import models_main
    except KeyboardInterrupt:  # imports take a while
        sys.exit(130)
    except ModuleNotFoundError as missing:
        print(f"error: {missing}; first: source .venv/bin/activate (make install)", file=sys.stderr)
        sys.exit(2)
    sys.exit(models_main())
