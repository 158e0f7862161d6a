"""The command line: `proper-ds`. Every command turns arguments into one call, and errors into text and exit codes.

Exit codes: 0 done; 1 something failed that running again may mend; 2 something the user must mend; 130 stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import typer
from rich.console import Console

from proper_ds import __version__
from proper_ds.cli import base, bench, data, evaluate, experts, plan, report, run, store, study
from proper_ds.errors import ProperError
from proper_ds.observe.log import log_to_terminal

STOPPED = 130

app = typer.Typer(
    name="proper-ds",
    help="One model for each user: population, group and user LoRAs on DeepSpeed and Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.add_typer(base.app, name="base")
app.add_typer(store.app, name="store")
app.add_typer(report.app, name="report")
app.add_typer(bench.app, name="bench")
app.command("run")(run.run)
app.command("check")(run.check)
app.command("plan")(plan.plan)
app.command("compare")(study.compare)
app.command("sweep")(study.sweep)
app.command("evaluate")(evaluate.evaluate)
app.command("experts")(experts.experts)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _interrupt_again(about: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that Python could not raise, because it came during a finalizer or a callback, is sent once more."""
    if about.exc_type is KeyboardInterrupt:
        # from another thread and a little later: what is raised in here would be ignored, too
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(about)


def main() -> None:
    """The console command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    signal.signal(signal.SIGTERM, _stop)  # what `ray job stop` and most schedulers send first
    sys.unraisablehook = _interrupt_again
    log_to_terminal(Console(stderr=False))
    try:
        code = app(standalone_mode=False)  # typer returns the codes of its own exits, Ctrl-C's among them
    except ProperError as error:
        typer.secho(f"error: {error}", err=True, fg="red" if sys.stderr.isatty() else None)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            error.show()  # type: ignore[attr-defined]
            code = 2
        else:
            logging.getLogger("proper_ds").exception("unexpected failure")
            code = 1
    if code == STOPPED:
        typer.echo("stopped; what was committed is kept. Run the same command again to go on.", err=True)
    sys.exit(code)
