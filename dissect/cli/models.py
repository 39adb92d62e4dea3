"""`dissect models`: list the built-in pairs."""

from dissect import zoo
from dissect.cli import options
from unlearning.common.terminal import write_json

EXAMPLES = """\b
Examples:
  dissect models
  dissect models --json
"""


def command(as_json: options.Json = False) -> None:
    """Show the built-in pairs, with their control and their forget questions."""
    pairs = zoo.pairs()
    if as_json:
        write_json([{**vars(pair), "data": str(pair.data)} for pair in pairs])
        return
    from dissect.sweeps.tables import print_pairs

    print_pairs(pairs)
