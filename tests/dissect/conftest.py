"""What the tests of `dissect` share: a cache of their own, and one small world on disk with a finished run in it."""

from pathlib import Path

import pytest

from tests.dissect.cli.helpers import Outcome, World, build_llama, build_records, call, save, with_noise, write_records


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test finds what another one hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Base, unlearned (base and noise), control (base and other noise), and six questions in three groups."""
    folder = tmp_path_factory.mktemp("world")
    return World(
        base=save(folder / "base", build_llama()),
        unlearned=save(folder / "unlearned", with_noise(build_llama(), seed=1)),
        control=save(folder / "control", with_noise(build_llama(), seed=2)),
        data=write_records(folder / "questions.jsonl", build_records()),
    )


@pytest.fixture(scope="session")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The directory of a finished run with a control and three sets of sites, and what `--json` said of it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    sites = "mlp_coef,attn_out,mlp_coef+attn_out"
    outcome = call(
        *world.patch(out, "--control", str(world.control), "--window", "3", "--sites", sites, "--seed", "7", "--json")
    )
    return out, outcome
