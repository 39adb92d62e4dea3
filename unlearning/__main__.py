"""Run the command line: `unlearn`, and `python -m unlearning`."""

from unlearning.common.start import start


def main() -> None:
    """Run `unlearn`."""
    start("unlearn", "unlearning.cli")


if __name__ == "__main__":
    main()
