"""How much memory a sweep may use."""

import psutil
import pytest
import torch

from dissect.runtime.memory import SHARE_OF_FREE_MEMORY, Budget, memory_budget

CPU = torch.device("cpu")


def test_what_is_left_is_what_is_allowed_and_not_held() -> None:
    assert Budget(allowed=10, held=3).left == 7
    assert Budget(allowed=3, held=10).left == -7


def test_a_given_limit_holds_for_the_whole_process() -> None:
    resident = psutil.Process().memory_info().rss
    budget = memory_budget(CPU, 10**9)
    assert budget.allowed == 10**9
    assert abs(budget.held - resident) < 0.1 * resident
    assert abs(memory_budget(CPU, 10**9, weights_to_come=10**10).held - resident - 10**10) < 0.1 * resident


def test_without_a_limit_it_is_most_of_what_is_free_shared_by_the_processes_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = psutil.virtual_memory()._replace(available=8 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert memory_budget(CPU, None).left == int(8e9 * SHARE_OF_FREE_MEMORY)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_budget(CPU, None).left == int(2e9 * SHARE_OF_FREE_MEMORY)
