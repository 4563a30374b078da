"""Whose a GPU process is, from the texts that real engines and managers leave in /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.gpu.owners import annotate, managed_refs, owner_ref
from mic_supervisor.host.processes import stat
from mic_supervisor.model import (
    Gpu,
    GpuInventory,
    GpuProcess,
    Identity,
    ObservedWorkload,
    Owner,
    OwnerKind,
    RunState,
    RuntimeView,
)

A = "3f" * 32
B = "c0ffee00" * 8

CONTAINER, UNIT, ORPHAN = OwnerKind.CONTAINER, OwnerKind.UNIT, OwnerKind.ORPHAN
UNKNOWN, MANAGED = OwnerKind.UNKNOWN, OwnerKind.MANAGED

V1_CGROUPFS = f"""\
12:pids:/docker/{A}
11:hugetlb:/docker/{A}
4:devices:/docker/{A}
3:cpu,cpuacct:/docker/{A}
1:name=systemd:/docker/{A}
0::/system.slice/containerd.service
"""
V1_SYSTEMD = f"""\
9:memory:/system.slice/docker-{A}.scope
1:name=systemd:/system.slice/docker-{A}.scope
0::/system.slice/docker-{A}.scope
"""
V1_UNIT = """\
11:memory:/system.slice/comfyui.service
10:cpuset:/
2:pids:/system.slice/comfyui.service
1:name=systemd:/system.slice/comfyui.service
0::/system.slice/comfyui.service
"""
ROOTLESS = f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{A}.scope\n"
PODMAN = f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope/container\n"
KUBERNETES = (
    f"0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod12.slice/"
    f"cri-containerd-{A}.scope\n"
)


@pytest.mark.parametrize(
    ("text", "kind", "ref"),
    [
        (f"0::/system.slice/docker-{A}.scope\n", CONTAINER, A),  # v2, driver systemd
        (f"0::/docker/{A}\n", CONTAINER, A),  # v2, driver cgroupfs
        (V1_CGROUPFS, CONTAINER, A),
        (V1_SYSTEMD, CONTAINER, A),
        (ROOTLESS, CONTAINER, A),
        (PODMAN, CONTAINER, A),
        (KUBERNETES, CONTAINER, A),
        (f"0::/system.slice:docker:{A}\n", CONTAINER, A),  # runc, when it is told both drivers
        (f"0::/kubepods/burstable/pod12/crio-{A}\n", CONTAINER, A),
        (f"0::/docker/{A}/system.slice/inner.service\n", CONTAINER, A),
        (f"0::/docker/{A}/docker/{B}\n", CONTAINER, A),  # an engine inside a container
        (f"0::/../../system.slice/docker-{A}.scope\n", CONTAINER, A),  # outside our namespace
        (f"0::/docker/{A} (deleted)\n", CONTAINER, A),
        ("0::/lxc.payload.guest/system.slice/python.service\n", CONTAINER, "guest"),
        ("0::/system.slice/comfyui.service\n", UNIT, "comfyui.service"),
        (V1_UNIT, UNIT, "comfyui.service"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", UNIT, "session-3.scope"),
        (
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/jupyter.service\n",
            UNIT,
            "jupyter.service",
        ),
        ("0::/mic.slice/mic-a.service/worker\n", UNIT, "mic-a.service"),
        ("0::/system.slice/mic-Qwen\\x2d8B.service\n", UNIT, "mic-Qwen-8B.service"),
        ("0::/system.slice/mic-\\xe6\\x8d\\xa2\\xe8\\x84\\xb8.service\n", UNIT, "mic-换脸.service"),
        ("0::/system.slice/bad\\xff.service\n", UNIT, "bad\ufffd.service"),
        ("0::/system.slice/_cpu.service\n", UNIT, "cpu.service"),
        ("0::/system.slice/a:b.service\n", UNIT, "a:b.service"),
        ("0::/system.slice/a\u2028b.service\n", UNIT, "a\u2028b.service"),
        ("0::/\n", ORPHAN, None),
        ("", ORPHAN, None),
        ("garbage\n0:\n", ORPHAN, None),
        (f"0::/docker/{A[:-1]}\n", ORPHAN, None),  # 63 digits
        (f"0::/docker/{A}0\n", ORPHAN, None),  # 65 digits
        (f"0::/docker/{A.upper()}\n", ORPHAN, None),
        ("0::/services/scope\n", ORPHAN, None),
    ],
)
def test_who_the_control_group_names(text: str, kind: OwnerKind, ref: str | None) -> None:
    assert owner_ref(text) == (kind, ref)


def test_version_1_asks_the_tree_of_systemd_first() -> None:
    text = f"5:memory:/docker/{B}\n1:name=systemd:/docker/{A}\n0::/system.slice/x.service\n"

    assert owner_ref(text) == (CONTAINER, A)


def test_a_container_in_any_tree_outweighs_a_unit() -> None:
    text = f"5:memory:/docker/{A}\n1:name=systemd:/system.slice/docker.service\n"

    assert owner_ref(text) == (CONTAINER, A)


@given(st.text())
def test_no_text_is_too_odd(text: str) -> None:
    kind, ref = owner_ref(text)

    assert (ref is None) is (kind is ORPHAN)


@given(st.text(st.characters(exclude_characters="/\n\\", exclude_categories=["Cs"]), min_size=1))
def test_a_unit_is_found_under_the_name_that_systemd_escaped(name: str) -> None:
    escaped = "".join(
        c if c.isascii() and c.isalnum() else "".join(f"\\x{b:02x}" for b in c.encode())
        for c in name
    )

    assert owner_ref(f"0::/system.slice/u{escaped}.service\n") == (UNIT, f"u{name}.service")


# --- on a /proc of our own --------------------------------------------------------------------

GONE = 4_190_000  # above pid_max of an ordinary machine, so that no such process exists


class FakeProc:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.pid_namespace("self", "pid:[1]")

    def pid_namespace(self, pid: int | str, name: str) -> None:
        (self.root / str(pid) / "ns").mkdir(parents=True)
        (self.root / str(pid) / "ns/pid").symlink_to(name)

    def add(
        self,
        pid: int,
        cgroup: str = "0::/\n",
        *,
        parent: int = 1,
        start_time: int = 500,
        name: str = "python",
        environ: dict[str, str] | None = None,
        users: tuple[int, int, int] = (0, 0, 0),
        namespace: str = "pid:[1]",
    ) -> GpuProcess:
        directory = self.root / str(pid)
        self.pid_namespace(pid, namespace)
        (directory / "cgroup").write_text(cgroup)
        rest = " ".join(["S", str(parent), *["0"] * 17, str(start_time), *["0"] * 30])
        (directory / "stat").write_text(f"{pid} ({name}) {rest}\n")
        uids = "\t".join(map(str, (*users, users[1])))
        (directory / "status").write_text(f"Name:\t{name}\nUid:\t{uids}\n")
        pairs = (environ or {}).items()
        (directory / "environ").write_text("".join(f"{k}={v}\0" for k, v in pairs))
        return GpuProcess(pid, name, 1, start_time=start_time)

    def owner(self, process: GpuProcess, managed: dict[str, str] | None = None) -> Owner | None:
        gpu = Gpu("GPU-1", 0, "", processes=(process,))
        found = annotate(GpuInventory("nvml", (gpu,)), managed or {})
        (annotated,) = found.gpus[0].processes or ()
        assert replace(annotated, owner=None) == process
        return annotated.owner


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    return FakeProc(tmp_path)


def test_foreign_owners(proc: FakeProc) -> None:
    assert proc.owner(proc.add(10, V1_CGROUPFS)) == Owner(CONTAINER, A)
    assert proc.owner(proc.add(11, V1_UNIT)) == Owner(UNIT, "comfyui.service")
    assert proc.owner(proc.add(12)) == Owner(ORPHAN)


def test_our_container_and_our_unit(proc: FakeProc) -> None:
    managed = {A: "mam-0", "mic-default-Qwen\\x2d8B.service": "qwen"}
    unit = "0::/mic.slice/mic-default-Qwen\\x2d8B.service/worker\n"

    assert proc.owner(proc.add(10, V1_SYSTEMD), managed) == Owner(MANAGED, A, "mam-0")
    assert proc.owner(proc.add(11, unit), managed) == Owner(
        MANAGED, "mic-default-Qwen\\x2d8B.service", "qwen"
    )


def test_our_container_inside_of_another(proc: FakeProc) -> None:
    process = proc.add(10, f"0::/docker/{A}/docker/{B}\n")

    assert proc.owner(process, {B: "mam-0"}) == Owner(MANAGED, B, "mam-0")


def test_a_container_that_our_unit_runs_is_ours(proc: FakeProc) -> None:
    process = proc.add(10, f"0::/mic.slice/mic-x.service/libpod-payload-{A}\n")

    assert proc.owner(process, {"mic-x.service": "x"}) == Owner(MANAGED, "mic-x.service", "x")
    assert proc.owner(process) == Owner(CONTAINER, A)


def test_a_unit_of_our_name_inside_a_foreign_container_is_not_ours(proc: FakeProc) -> None:
    process = proc.add(10, f"0::/docker/{A}/system.slice/mic-x.service\n")

    assert proc.owner(process, {"mic-x.service": "x"}) == Owner(CONTAINER, A)


def test_descendants_of_a_root_are_ours_wherever_they_run(proc: FakeProc) -> None:
    session = "0::/user.slice/user-0.slice/session-3.scope\n"
    proc.add(100, session, start_time=7)
    proc.add(101, session, parent=100)
    leaf = proc.add(102, session, parent=101)

    assert proc.owner(leaf, {"pid:100:7": "whisper"}) == Owner(MANAGED, "pid:100:7", "whisper")
    assert proc.owner(leaf, {"pid:100:8": "whisper"}) == Owner(UNIT, "session-3.scope")


def test_a_loop_of_parents_ends(proc: FakeProc) -> None:
    proc.add(101, parent=102)
    leaf = proc.add(102, parent=101)

    assert proc.owner(leaf, {"pid:100:7": "whisper"}) == Owner(ORPHAN)


def test_a_stray_is_ours_by_its_environment(proc: FakeProc) -> None:
    stray = proc.add(10, environ={"MIC_SCOPE": "default", "MIC_INSTANCE": "whisper", "X": "=\n"})
    managed = {"env:default:whisper": "whisper"}

    assert proc.owner(stray, managed) == Owner(MANAGED, "env:default:whisper", "whisper")
    assert proc.owner(stray, {"env:demo:whisper": "whisper"}) == Owner(ORPHAN)
    assert proc.owner(proc.add(11), managed) == Owner(ORPHAN)


@pytest.mark.parametrize(
    ("users", "ours"),
    [
        ((0, 0, 0), True),
        ((1000, 1000, 1000), True),
        ((1000, 0, 0), True),  # what that user may start as root could be ours, too
        ((1001, 1001, 1001), False),
        ((1001, 0, 0), False),  # a set-user-ID program: who started it made the environment
        ((0, 1001, 0), False),
        ((1000, 1001, 1000), False),
    ],
)
def test_an_environment_is_believed_of_users_that_could_be_ours(
    proc: FakeProc, users: tuple[int, int, int], ours: bool
) -> None:
    spec = {"kind": "process", "user": "1000:1000"}
    mine = workload(None, "record")
    mine = replace(mine, identity=replace(mine.identity, spec=spec))
    managed = managed_refs([RuntimeView("subprocess", (mine,))])
    said = {"MIC_SCOPE": "default", "MIC_INSTANCE": "whisper"}
    found = proc.owner(proc.add(10, environ=said, users=users), managed)
    assert found is not None and (found.instance == "whisper") is ours
    if not ours:
        assert found == Owner(ORPHAN)


def test_a_container_with_a_copied_environment_is_foreign(proc: FakeProc) -> None:
    said = {"MIC_SCOPE": "default", "MIC_INSTANCE": "whisper"}
    process = proc.add(10, V1_SYSTEMD, environ=said, namespace="pid:[2]")
    assert proc.owner(process, {"env:default:whisper": "whisper"}) == Owner(CONTAINER, A)


def test_another_user_is_believed_of_no_instance_that_has_none(proc: FakeProc) -> None:
    managed = managed_refs([RuntimeView("subprocess", (workload(None, "record"),))])
    said = {"MIC_SCOPE": "default", "MIC_INSTANCE": "whisper"}
    stray = proc.add(10, environ=said, users=(1000, 1000, 1000))
    assert proc.owner(stray, managed) == Owner(ORPHAN)


def test_a_process_that_is_gone_is_nobodys(proc: FakeProc) -> None:
    assert proc.owner(GpuProcess(GONE, None, 1)) == Owner(ORPHAN)


def test_a_process_that_proc_hides_is_unknown(proc: FakeProc) -> None:
    assert proc.owner(GpuProcess(os.getpid(), None, 1)) == Owner(UNKNOWN)


def test_a_pid_that_was_given_to_somebody_else_is_unknown(proc: FakeProc) -> None:
    process = proc.add(10, V1_SYSTEMD)

    assert proc.owner(replace(process, start_time=499), {A: "mam-0"}) == Owner(UNKNOWN)
    assert proc.owner(replace(process, start_time=None), {A: "mam-0"}) == Owner(UNKNOWN)


def test_a_group_that_may_not_be_read_is_unknown(proc: FakeProc) -> None:
    process = proc.add(10)
    (proc.root / "10" / "cgroup").unlink()
    (proc.root / "10" / "cgroup").mkdir()  # reading a directory fails, as root too

    assert proc.owner(process) == Owner(UNKNOWN)


def test_a_process_that_ends_between_two_reads_is_nobodys(proc: FakeProc) -> None:
    process = proc.add(GONE, V1_SYSTEMD)
    (proc.root / str(GONE) / "stat").unlink()

    assert proc.owner(process) == Owner(ORPHAN)


def test_what_is_unknown_stays_so_and_errors_pass_through(proc: FakeProc) -> None:
    gpu = Gpu("GPU-1", 0, "", processes=None)
    inventory = GpuInventory("nvml", (gpu,), error="cannot read GPUs: x", driver="1")

    assert annotate(inventory, {A: "a"}) == inventory


def test_one_process_on_two_gpus_has_one_owner(proc: FakeProc) -> None:
    process = proc.add(10, V1_SYSTEMD)
    gpus = tuple(Gpu(f"GPU-{n}", n, "", processes=(process,)) for n in range(2))

    found = annotate(GpuInventory("nvml", gpus), {})

    assert [gpu.processes for gpu in found.gpus] == [
        (replace(process, owner=Owner(CONTAINER, A)),)
    ] * 2


# --- on the real one --------------------------------------------------------------------------


@pytest.fixture
def tree() -> Iterator[tuple[int, int]]:
    """A process and its grandchild."""
    program = (
        "import subprocess, sys;"
        "c = subprocess.Popen([sys.executable, '-c', 'import os, subprocess;"
        'p = subprocess.Popen(["sleep", "60"]); print(p.pid, flush=True); p.wait()\']);'
        "c.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as root:
        assert root.stdout
        yield root.pid, int(root.stdout.readline())
        os.killpg(root.pid, 9)


def process(pid: int) -> GpuProcess:
    found = stat(pid)
    assert found
    return GpuProcess(pid, found.name, None, start_time=found.start_time)


def workload(pid: int | None, ref: str, state: RunState = RunState.RUNNING) -> ObservedWorkload:
    identity = Identity("default", "host", "whisper", "whisper", "process", (), {}, None, "")
    return ObservedWorkload("subprocess", ref, ref, identity, state, pid=pid)


def test_a_real_process_tree(tree: tuple[int, int]) -> None:
    root, leaf = tree
    ref = f"pid:{root}:{process(root).start_time}"
    views = [RuntimeView("subprocess", (workload(root, "record"),))]

    managed = managed_refs(views)
    found = annotate(
        GpuInventory("nvml", (Gpu("GPU-1", 0, "", processes=(process(leaf),)),)), managed
    )

    assert managed == {"record": "whisper", ref: "whisper", "env:default:whisper": "whisper"}
    assert [p.owner for p in found.gpus[0].processes or ()] == [Owner(MANAGED, ref, "whisper")]


def test_an_ended_process_lends_its_pid_to_nobody(tree: tuple[int, int]) -> None:
    views = [RuntimeView("subprocess", (workload(tree[0], "record", RunState.EXITED),))]

    assert managed_refs(views) == {"record": "whisper"}


def test_containers_and_units_go_by_their_ref_alone() -> None:
    mine = replace(workload(os.getpid(), A), runtime="docker")

    assert managed_refs([RuntimeView("docker", (mine,))]) == {A: "whisper"}


def test_this_process_has_an_owner_that_is_known() -> None:
    me = process(os.getpid())

    found = annotate(GpuInventory("nvml", (Gpu("GPU-1", 0, "", processes=(me,)),)), {})

    (annotated,) = found.gpus[0].processes or ()
    assert annotated.owner and annotated.owner.kind in {CONTAINER, UNIT, ORPHAN}


def test_an_environment_says_nothing_while_a_keeper_has_the_whole_tree(
    tree: tuple[int, int],
) -> None:
    """It is copied as any text is; and nothing leaves the tree of a subreaper."""
    root, leaf = tree
    mine = replace(workload(leaf, "record"), keeper=root)

    managed = managed_refs([RuntimeView("subprocess", (mine,))])

    assert managed == {
        "record": "whisper",
        f"pid:{leaf}:{process(leaf).start_time}": "whisper",
        f"pid:{root}:{process(root).start_time}": "whisper",
    }
