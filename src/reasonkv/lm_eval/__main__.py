"""lm-eval's own command line with the model `reasonkv`, for versions of lm-eval that read no entry points of others."""

from __future__ import annotations

import sys

from reasonkv.errors import ReasonKVError


def main() -> None:
    """Run `lm_eval` with the arguments of this process."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import reasonkv.lm_eval.model  # noqa: F401 - registers the model
    except ImportError as error:
        sys.exit(f'Error: lm-eval cannot be imported ({error}); run pip install "reasonkv[lm-eval]".')
    try:
        cli_evaluate()
    except (ReasonKVError, ConnectionError) as error:  # the latter: a dataset without network
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
