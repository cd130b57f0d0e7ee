"""The command line, one module a verb."""

import sys


def main() -> None:
    """Runs the command line. A signal ends it with one line and the status that shells expect."""
    try:
        # Imported here, or Ctrl-C during the import would be a traceback.
        from hdit.cli.ending import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
