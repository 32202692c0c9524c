"""The command line: ``flash-moe train | generate | bench | plot | tune | trace | env``, or ``python -m flash_moe``."""

import os
import sys
from importlib.util import find_spec

# The extra "train" brings these; the library itself needs none of them.
NEEDED = ("typer", "rich", "safetensors")


def main() -> None:
    """Run the command in ``sys.argv``. What the user can put right is one line and exit code 2, never a traceback."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        sys.exit(_complain(f"the command line needs {', '.join(missing)}: pip install 'flash_moe[train]'"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a model may write what the terminal cannot show
    try:
        _run()
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        if os.environ.get("FLASH_MOE_DEBUG") == "1":
            raise
        sys.exit(_complain(str(error)))


def env() -> None:
    """Print what a bug report needs to say about this machine."""
    from flash_moe.training.environment import describe_environment

    for name, value in describe_environment().items():
        print(f"{name + ':':<20} {value}")


def _run() -> None:
    import typer

    from flash_moe.bench.commands import bench, plot, tune
    from flash_moe.bench.tracing import trace
    from flash_moe.training.commands import generate, train

    app = typer.Typer(
        help="Train a small FlashMoE language model, generate text with it, measure and tune the ops, "
        "trace a decode call, describe this machine.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (train, generate, bench, plot, tune, trace, env):
        app.command()(command)
    app(prog_name="flash-moe")


def _complain(message: str) -> int:
    print(f"flash-moe: error: {message}", file=sys.stderr)
    return 2
