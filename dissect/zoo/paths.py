"""Where the files of the built-in models are."""

from pathlib import Path

DIRECTORY = Path(__file__).parent
"""Directory of the package, with the models, the question sets and the model card."""

QUESTIONS = DIRECTORY / "questions"
"""Directory of the question sets."""
