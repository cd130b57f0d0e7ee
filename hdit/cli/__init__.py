"""The command line, one module a verb."""

import sys


def main() -> None:
    """Runs the command line. A signal ends it with one line and the status that shells expect."""
    try:
        # Here, as Ctrl-C is no traceback from here on.
        from hdit.cli.ending import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
