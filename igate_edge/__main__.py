"""The command `igate`, also `python -m igate_edge`."""

from __future__ import annotations


def main() -> None:
    """Entry point; Ctrl-C while the commands are still being imported ends without a traceback, too."""
    try:
        from .cli import main as command
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    command()


if __name__ == "__main__":
    main()
