"""`tutorloop COMMAND …`: the console script.

Commands import what they need when they run, so a wrong key is answered without loading torch or Ray.
"""

import os
import sys

import typer

from .. import __version__
from . import bank, evaluate, scale, status, strategies, train, verify
from .outcome import INTERRUPTED, ends_clearly

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("train", cls=train.TrainCommand)(ends_clearly(train.train))
app.command("eval")(ends_clearly(evaluate.evaluate))
app.command("verify")(ends_clearly(verify.verify))
app.command("status")(ends_clearly(status.status))
app.command("scale")(ends_clearly(scale.scale))
app.add_typer(bank.app, name="bank")
app.add_typer(strategies.app, name="strategies")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tutorloop {__version__}")
        raise typer.Exit


@app.callback()
def tutorloop(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_show_version, is_eager=True),
) -> None:
    """Distil a teacher's reasoning into a student on the student's own rollouts, on Ray."""


def main() -> None:
    """Run a command.

    Threads that wait for others soon sleep, which is said before torch is loaded: spinning ones take the cores of those
    that still work, and beside other programs a step took ten times as long.

    An interrupted one has closed everything by now, and leaves without the interpreter's end: where Ctrl-C met Ray
    in the middle of a start, its destructors can crash there, and 130 would become 139.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        app()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
