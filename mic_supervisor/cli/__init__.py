"""The command line, a file per command or group of small ones; it alone wires the parts together.

Nothing heavy is imported here: a command's module is loaded when the command is called.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from importlib import import_module

import click

from mic_supervisor import __version__
from mic_supervisor.errors import ConfigError, MicError, Unserviceable

# name -> (module, or module:function; the line that --help shows, which loads nothing).
COMMANDS = {
    "init": ("init", "Write a first gpus.yaml from this machine."),
    "check": ("file:check", "Validate gpus.yaml."),
    "plan": ("plan", "Show what apply would do, and why."),
    "apply": ("apply", "Converge once, and wait until everything is ready."),
    "edit": ("editor", "Edit gpus.yaml, see the plan, and apply it."),
    "start": ("edit:start", "Give a GPU to a model: edit gpus.yaml, and wait until it is ready."),
    "stop": ("edit:stop", "Empty a GPU: edit gpus.yaml, and wait until it is empty."),
    "switch": ("edit:switch", "Put a profile of gpus.yaml on, and apply it."),
    "restart": ("instances:restart", "Restart a model or an instance now."),
    "retry": ("instances:retry", "Try again now what failed."),
    "pause": ("instances:pause", "Leave a model or a GPU alone until it is resumed."),
    "resume": ("instances:resume", "Manage a paused model or GPU again."),
    "drain": ("drain:drain", "Take this host out of service: stop everything, start nothing."),
    "undrain": ("drain:undrain", "Put this host back into service."),
    "status": ("status", "Desired and actual state, one row per instance."),
    "doctor": ("doctor", "Check this machine, and say how to fix it."),
    "gpus": ("gpus", "Memory, power, temperature and holders of each GPU."),
    "models": ("file:models", "The models that may run, and their backends."),
    "logs": ("instances:logs", "Show the log of an instance."),
    "history": ("daemon:history", "The last transitions, with cause and duration."),
    "run": ("daemon:run", "The daemon, as systemd starts it."),
    "reload": ("daemon:reload", "Make the daemon read its file again."),
    "export": ("export", "Upstreams for nginx or HAProxy, from what serves now."),
    "kill": ("kill", "End a process that holds a GPU."),
    "claim": ("claim", "Hold a GPU that the file hands over, for a scheduler's job."),
    "down": ("apply:down", "Remove every managed instance."),
    "schema": ("file:schema", "Print the JSON Schema of gpus.yaml."),
    "install": ("install:install", "Write the systemd unit, man page and completions."),
    "uninstall": ("install:uninstall", "Remove what install wrote, and say what still runs."),
    "demo": ("demo", "A guided tour on simulated GPUs."),
}

_BRIEF = frozenset({"check", "plan", "status"})

EXIT_FAILED = 1
EXIT_USAGE = 64  # sysexits.h, so that 2 can mean "there are changes"
EXIT_CONFIG = 78  # the same: the daemon's settings, what can never be claimed; it ends restarts
EXIT_INTERRUPTED = 130


class Commands(click.Group):
    """Loads a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        found = import_module(f"mic_supervisor.cli.{module}")
        command: click.Command = getattr(found, function or "command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            from difflib import get_close_matches

            begun = [command for command in COMMANDS if command.startswith(name)]
            close = begun if len(begun) == 1 else get_close_matches(name, COMMANDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            ctx.fail(f"there is no command {name!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="mic-supervisor")
def group() -> None:
    """Keep one model per GPU running, as one YAML file says.

    The file is /etc/mic/gpus.yaml unless MIC_CONFIG names another.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0, or as the command says; 1 failed, 64 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal's encoding lacks is shown as an escape, which JSON knows as well.
            stream.reconfigure(errors="backslashreplace")
    if arguments and arguments[0] in _BRIEF and "--watch" not in arguments:
        gc.disable()  # they end before there is anything to collect
    if arguments and arguments[0] == "run":
        # Until the daemon is up there is nothing to tidy up. What it holds, the kernel lets go.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    code = run(arguments)
    # Neither the interpreter's tidying up is waited for, a tenth of what a plan takes, nor a call
    # that hangs in a thread: what it was about is found by the next look at the machine.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command; the exit status."""
    try:
        result = group.main(arguments, prog_name="mic-supervisor", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        error.show()
        return EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except ConfigError as error:
        click.echo(_report(error).rstrip("\n") or f"error: {error.message}", err=True)
        _hint(error)
        return EXIT_CONFIG if arguments[:1] == ["run"] else EXIT_FAILED
    except MicError as error:
        click.echo(f"error: {error.message}", err=True)
        _hint(error)
        final = isinstance(error, Unserviceable) and arguments[:1] == ["claim"]
        return EXIT_CONFIG if final else EXIT_FAILED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != 1:
            raise
        # The reader (head, less) has what it wanted. click ends the program then, with 1.
        sys.stdout = None
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        sys.stdout = None
        click.echo(f"error: cannot write the output: {error.strerror}", err=True)
        return EXIT_FAILED
    return result if isinstance(result, int) else 0


def _report(error: ConfigError) -> str:
    """Every error with its line, for the terminal of who may read the file. Nobody else sees it."""
    if _in_journal():
        return error.outline
    if error.rendered != error.outline:
        return error.rendered
    # The daemon says where the file is wrong, and not what stands there.
    from mic_supervisor.backends.registry import Registry
    from mic_supervisor.cli import wiring

    try:
        wiring.load_config(wiring.settings(), None, Registry())
    except ConfigError as own:
        if own.outline == error.outline:
            return own.rendered
    return error.outline


def _in_journal() -> bool:
    """Whether systemd keeps what is printed here for others to read: systemd.exec(5)."""
    found = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def _hint(error: MicError) -> None:
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
