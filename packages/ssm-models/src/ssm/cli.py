"""The command ``ssm-models``: info, generate, chat, train, convert, inspect, eval."""

from __future__ import annotations

import argparse
import os
import sys

from ssm.commands import convert, eval, generate, info, inspect, train


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message: str) -> None:
        """Print one sentence and leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        Exit code: 0, or 1 after one sentence on stderr, or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has left; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nssm-models: stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        print(f"ssm-models: {text}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="ssm-models", description="Mamba language models on any machine.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for command in (info, generate, train, convert, inspect, eval):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
