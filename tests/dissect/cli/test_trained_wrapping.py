"""Every command asks a pair as the unlearned model was trained, by the record beside its weights."""

import json
import shutil
from pathlib import Path

import pytest

from dissect.behaviour.prompts import Reading
from dissect.cli.loading import choose_reading
from dissect.cli.options import PairOptions, PromptOptions
from tests.dissect.cli.helpers import World, assert_refused, call

TEMPLATE = "Q: {question} A:"


def recorded(model: Path, where: Path, **options: object) -> Path:
    """A copy of a model with the record of a training run beside it."""
    shutil.copytree(model, where)
    (where / "unlearning.json").write_text(json.dumps({"configuration": {"options": options}}), encoding="utf-8")
    return where


def test_a_record_does_what_the_option_does(world: World, tmp_path: Path) -> None:
    unlearned = recorded(world.unlearned, tmp_path / "unlearned", template=TEMPLATE)
    asked = call(*world.patch(None, "--show-prompts", "2", "--template", TEMPLATE))
    found = call(*world.patch(None, "--show-prompts", "2", unlearned=unlearned))
    assert (asked.code, asked.err) == (0, "") and "Q:" in asked.out
    assert (found.code, found.out) == (0, asked.out)
    assert found.err.count("\n") == 1 and found.err.startswith("dissect: asked as ") and str(unlearned) in found.err


def test_which_record_is_taken_is_said_and_the_options_decide(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    unlearned = recorded(world.unlearned, tmp_path / "unlearned", template="A\\n{question}")
    base = recorded(world.base, tmp_path / "base", chat=True, chat_date="01 Jan 2020")
    plain = str(world.unlearned)

    def read(base: object, unlearned: object, **given: object) -> tuple[Reading, str, list[str]]:
        pair = PairOptions(base=str(base), unlearned=str(unlearned))
        quiet, scoring = bool(given.pop("quiet", False)), str(given.pop("scoring", "answer"))
        found = choose_reading(PromptOptions(**given), pair, quiet=quiet, scoring=scoring)  # type: ignore[arg-type]
        warned = [str(each.message) for each in recwarn.list]
        recwarn.clear()
        return found, capsys.readouterr().err, warned

    assert read(world.base, plain) == (Reading(), "", [])
    # A backslash and an n in a record are no line break, as they are on a command line.
    own = Reading("A\\n{question}")
    assert read(world.base, unlearned, quiet=True) == (own, "", [])
    found, said, (warned,) = read(base, unlearned)
    assert found == own and said.count("\n") == 1
    assert str(base) in warned and f"as {unlearned} was" in warned
    found, said, (warned,) = read(world.base, unlearned, template="B\\n{question}")
    assert found == Reading("B\n{question}") and said == "" and str(unlearned) in warned
    assert read(world.base, unlearned, chat=False)[0] == Reading()
    # The base's record is taken where the unlearned model has none; the released protocol has its own wrapping.
    assert read(base, plain, quiet=True) == (Reading(chat=True, chat_date="01 Jan 2020"), "", [])
    assert read(base, unlearned, scoring="notebook") == (Reading(), "", [])


@pytest.mark.parametrize("command", ["patch", "restore", "decompose", "behave", "probe", "verdict"])
def test_a_record_s_hostile_template_is_refused_before_a_model_is_loaded(
    command: str, world: World, tmp_path: Path
) -> None:
    unlearned = recorded(world.unlearned, tmp_path / "unlearned", template="\x1b[2J " * 10_000)
    (unlearned / "config.json").write_text("{")  # to be refused, too, once it is read
    paths = {"base": world.base, "unlearned": unlearned, "data": world.data}
    named = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    retain = ["--retain", str(world.data)] if command == "behave" else []
    assert_refused(call(command, *named, *retain), "unlearning.json", "--template")
