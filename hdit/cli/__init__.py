"""The command line, one module a verb."""

from hdit.cli.app import app, main

__all__ = ["app", "main"]
