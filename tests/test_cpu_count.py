# SPDX-License-Identifier: Apache-2.0
"""Default threads: cores of the affinity mask, at most the cgroups' CPU quota, on systems made of files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma4 import _engine

V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 24 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "32 31 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
    "33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)
OTHER = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n22 21 0:20 / /proc rw - proc proc rw\n"


def system(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> str:
    """A root directory with /proc/self/cgroup, /proc/self/mountinfo and these files below it."""
    written = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": OTHER + mounts} | files
    for name, text in written.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def quota(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> int:
    return _engine.testing.cpu_quota(system(root, cgroup, mounts, files))


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        ("max 100000", 0),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("100000 100000", 1),
        ("100001 100000", 2),
        ("1600000 50000", 32),
        ("9223372036854775807 1", 2**31 - 1),
        ("", 0),
        ("nonsense", 0),
        ("100000", 0),
        ("0 0", 0),
        ("-1 100000", 0),
    ],
)
def test_version_2(tmp_path: Path, limit: str, cpus: int) -> None:
    assert quota(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": limit}) == cpus


@pytest.mark.parametrize(
    ("limits", "cpus"),
    [
        (["max 100000", "max 100000", "300000 100000"], 3),
        (["max 100000", "300000 100000", "max 100000"], 3),
        (["200000 100000", "max 100000", "500000 100000"], 2),
        (["600000 100000", "450000 100000", "max 100000"], 5),
        (["max 100000", "max 100000", "max 100000"], 0),
    ],
)
def test_nested_groups_of_version_2(tmp_path: Path, limits: list[str], cpus: int) -> None:
    folders = ["", "kubepods.slice/", "kubepods.slice/pod 1.scope/"]
    files = {f"sys/fs/cgroup/{folder}cpu.max": limit for folder, limit in zip(folders, limits, strict=True)}
    assert quota(tmp_path, "0::/kubepods.slice/pod 1.scope\n", V2, files) == cpus


@pytest.mark.parametrize(
    ("quota_us", "period_us", "cpus"), [("-1", "100000", 0), ("250000", "100000", 3), ("5", "", 0)]
)
def test_version_1(tmp_path: Path, quota_us: str, period_us: str, cpus: int) -> None:
    group = "sys/fs/cgroup/cpu,cpuacct/jobs/7"
    files = {f"{group}/cpu.cfs_quota_us": quota_us, f"{group}/cpu.cfs_period_us": period_us}
    cgroup = "12:cpuset:/\n4:cpu,cpuacct:/jobs/7\n1:name=systemd:/jobs/7\n"
    assert quota(tmp_path, cgroup, V1, files) == cpus


def test_version_1_reads_the_groups_above(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "400000\n",
        "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_period_us": "100000\n",
    }
    assert quota(tmp_path, "4:cpu,cpuacct:/jobs/7\n", V1, files) == 4


def test_a_container_sees_its_own_group_as_the_mount(tmp_path: Path) -> None:
    # without a cgroup namespace the path is the host's, and what is mounted is that very group
    mounts = "33 31 0:29 /docker/abc /sys/fs/cgroup/cpu ro master:11 - cgroup cgroup rw,cpuacct,cpu\n"
    files = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}
    assert quota(tmp_path, "4:cpu,cpuacct:/docker/abc\n", mounts, files) == 2
    nested = {
        "sys/fs/cgroup/cpu/inner/cpu.cfs_quota_us": "90000",
        "sys/fs/cgroup/cpu/inner/cpu.cfs_period_us": "100000",
    }
    assert quota(tmp_path, "4:cpu,cpuacct:/docker/abc/inner\n", mounts, files | nested) == 1


def test_a_path_beside_the_mounted_group(tmp_path: Path) -> None:
    mounts = "30 24 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    files = {"sys/fs/cgroup/cpu.max": "300000 100000", "sys/fs/cgroup/def/cpu.max": "100000 100000"}
    assert quota(tmp_path, "0::/docker/abcdef\n", mounts, files) == 3


def test_of_several_mounts_the_one_that_holds_the_group(tmp_path: Path) -> None:
    other = "29 24 0:26 /docker/y /mnt/other rw - cgroup2 cgroup2 rw\n"
    files = {"mnt/other/cpu.max": "max 100000", "sys/fs/cgroup/docker/x/cpu.max": "200000 100000"}
    for mounts in (other + V2, V2 + other):
        assert quota(tmp_path, "0::/docker/x\n", mounts, files) == 2


def test_hybrid_systems_have_both_versions(tmp_path: Path) -> None:
    mounts = V1 + "34 31 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    files = {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "700000",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/unified/a/cgroup.procs": "1",
    }
    assert quota(tmp_path, "4:cpu,cpuacct:/a\n0::/a\n", mounts, files) == 7


def test_a_mount_point_with_a_blank(tmp_path: Path) -> None:
    mounts = "30 24 0:26 / /sys/fs/c\\040group rw - cgroup2 cgroup2 rw\n"
    assert quota(tmp_path, "0::/\n", mounts, {"sys/fs/c group/cpu.max": "200000 100000"}) == 2


@pytest.mark.parametrize("cgroup", ["", "\n", "0:", "0::", "nonsense\n", "4:cpu:\n", ":::\n"])
def test_no_group_no_limit(tmp_path: Path, cgroup: str) -> None:
    assert quota(tmp_path, cgroup, "", {}) == 0
    assert _engine.testing.cpu_quota(str(tmp_path / "nothing")) == 0
    assert _engine.testing.cpu_quota("/x" * 4000) == 0


@pytest.mark.parametrize(
    ("siblings", "cpus", "cores"),
    [
        (["0,2", "1,3", "0,2", "1,3"], [0, 1, 2, 3], 2),
        (["0-1", "0-1", "2-3", "2-3"], [0, 1, 2, 3], 2),
        (["0-1", "0-1", "2-3", "2-3"], [1, 2, 3], 2),  # a core whose first thread is not ours counts
        (["0-1", "0-1", "2-3", "2-3"], [1, 3], 2),
        (["0,4-6", "1", "2", "3", "0,4-6", "0,4-6", "0,4-6"], [0, 1, 4, 5, 6], 2),
        (["0", "1", "2", "3"], [0, 1, 2, 3], 4),
        (["", "nonsense", ",", "-"], [0, 1, 2, 3], 4),
        ([], [0, 1, 2], 3),  # no topology: every CPU is a core
    ],
)
def test_cores(tmp_path: Path, siblings: list[str], cpus: list[int], cores: int) -> None:
    for cpu, text in enumerate(siblings):
        path = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(text + "\n")
    assert _engine.testing.cpu_cores(str(tmp_path), np.array(cpus, np.int32)) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_the_default_follows_the_affinity_mask() -> None:
    code = "import gemma4; print(gemma4.cpu_info()['threads'], gemma4.load('tiny-e').engine.threads)"
    one = min(os.sched_getaffinity(0))
    command = f"import os; os.sched_setaffinity(0, {{{one}}}); {code}"
    out = subprocess.run([sys.executable, "-P", "-c", command], check=True, capture_output=True, text=True).stdout
    assert out.split() == ["1", "1"]
