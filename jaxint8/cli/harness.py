"""Lets lm-evaluation-harness drive our models: `jaxint8-lm-eval run --model jaxint8 --tasks ...` (the extra `eval`).

  jaxint8-lm-eval run --model jaxint8 --model_args pretrained=DIR,quantization=relative --tasks lambada_openai

The arguments are the harness's own. The surprising fact: the harness knows models by a list of its own modules, so it
has to be started from here, where ours is added to the list.
"""

import sys


def main() -> int:
    """The harness's own command line, with our models in its list; returns the exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from jaxint8.cli import harness_model  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":  # installed, but not whole
            raise
        print("jaxint8-lm-eval: needs lm-eval: pip install 'jaxint8[eval]'", file=sys.stderr)
        return 2
    cli_evaluate()
    return 0
