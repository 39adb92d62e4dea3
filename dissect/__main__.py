"""Run the command line: `dissect`, and `python -m dissect`."""

from unlearning.common.start import start


def main() -> None:
    """Run `dissect`."""
    start("dissect", "dissect.cli")


if __name__ == "__main__":
    main()
