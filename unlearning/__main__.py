"""Run the command line: `python -m unlearning` is `unlearn`."""

from unlearning.cli import main

main()
