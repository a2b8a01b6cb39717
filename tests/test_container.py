"""Limits of containers, read from files laid out as Linux lays them out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline import cli, container
from pipeline.container import free_memory, processors, total_memory
from tests.small import write_model_folder

GB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=64 * GB, available=60 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)


@pytest.mark.parametrize("text", ["", "0::/", "4:memory:/some/where\n3:cpu,cpuacct:/"])
def test_without_limits_it_is_the_machine(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, {"proc/self/cgroup": text})
    assert (total_memory(root), free_memory(root), processors(root)) == (64 * GB, 60 * GB, 32)


def test_without_linux_it_is_the_machine(tmp_path: Path) -> None:
    assert (total_memory(tmp_path), free_memory(tmp_path), processors(tmp_path)) == (64 * GB, 60 * GB, 32)


def test_second_version_as_a_container_sees_it(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": str(16 * GB),
            "sys/fs/cgroup/memory.current": str(9 * GB),
            "sys/fs/cgroup/memory.stat": f"anon {5 * GB}\ninactive_file {3 * GB}",
            "sys/fs/cgroup/cpu.max": "200000 100000",
        },
    )
    assert (total_memory(root), free_memory(root), processors(root)) == (16 * GB, 10 * GB, 2)


def test_the_tightest_of_the_groups_around_it_counts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/user.slice"
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/app.scope",
            f"{top}/memory.max": str(8 * GB),
            f"{top}/memory.current": str(2 * GB),
            f"{top}/cpu.max": "max 100000",
            f"{top}/app.scope/memory.max": "max",
            f"{top}/app.scope/memory.current": str(GB),
            f"{top}/app.scope/cpu.max": "150000 100000",
        },
    )
    assert (total_memory(root), free_memory(root), processors(root)) == (8 * GB, 6 * GB, 2)


@pytest.mark.parametrize("inside", ["", "docker/0123"])
def test_first_version_in_the_container_and_outside(tmp_path: Path, inside: str) -> None:
    memory, cpu = Path("sys/fs/cgroup/memory") / inside, Path("sys/fs/cgroup/cpu") / inside
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/0123\n3:cpuacct,cpu:/docker/0123\n0::/",
            str(memory / "memory.limit_in_bytes"): str(4 * GB),
            str(memory / "memory.usage_in_bytes"): str(5 * GB),
            str(memory / "memory.stat"): f"inactive_file 7\ntotal_inactive_file {GB // 2}",
            str(cpu / "cpu.cfs_quota_us"): "50000",
            str(cpu / "cpu.cfs_period_us"): "100000",
        },
    )
    assert (total_memory(root), free_memory(root), processors(root)) == (4 * GB, 0, 1)


def test_first_version_without_limits_says_so_in_numbers(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GB),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert (total_memory(root), free_memory(root), processors(root)) == (64 * GB, 60 * GB, 32)


@pytest.mark.parametrize(("allowed", "variable", "threads"), [(1, None, 1), (8, None, 3), (1, "3", 3)])
def test_a_model_takes_no_more_threads_than_the_container_has_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int, variable: str | None, threads: int
) -> None:
    monkeypatch.setattr(container, "processors", lambda: allowed)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        cli.load_pipeline(write_model_folder(tmp_path), "cpu")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(usual)
