"""Starts one server of vLLM for trainers elsewhere: python -m megavlm.vllm.serve my.yaml --port 8000."""

import argparse
import os
import sys
from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.config.load import load_settings
from megavlm.convert.hf_shapes import shapes_of
from megavlm.runtime.adapter_start import with_stored_adapter
from megavlm.vllm.environment import check_environment, command, python_of


def main() -> None:
    """Becomes the server. With wrong settings it exits with status 2: starting again would not help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configuration", type=Path, help="configuration of the trainer, without rollout.vllm.url")
    parser.add_argument("overrides", nargs="*", help="NAME=VALUE")
    parser.add_argument("--host", default="0.0.0.0", help="address on which it listens")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    try:
        settings = load_settings(options.configuration, options.overrides)
        settings = with_stored_adapter(settings, shapes_of(settings.model.hf))
        check_environment(python_of(settings))
        words = command(settings, options.port, host=options.host)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    os.execv(words[0], words)


if __name__ == "__main__":
    main()
