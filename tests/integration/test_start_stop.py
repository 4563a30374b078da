"""start, stop, restart and retry: the file edited and the machine following, with a daemon or not.

What runs is mic_supervisor/demo/server.py, as host processes on simulated GPUs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mock_nvml import MockGpu, MockNvml, mock_uuid
from tests.support import require
from tests.support.commands import SERVE, SERVER
from tests.support.mic import PROGRAM, Mic

SLOW = "{backend: process, command: [/bin/sleep, '1000'], stop_timeout: 1s, probe: {http: /}}"
ABSENT = "GPU-f15ae561-7b5c-4a0c-8ab1-3a1e0c2d9f10"


def gpu(index: int) -> str:
    """The UUID of a simulated GPU."""
    return f"GPU-{0x51000000 + index:08x}"


HEAD = f"""\
# this machine
version: 1
models:
  MAM:
    backend: process
    command: {SERVE}   # a stand-in
    probe: {{http: /health, period: 200ms}}
    rollout: {{max_unavailable: 4}}
  face:
    backend: process
    command: {SERVE}
    probe: {{http: /health, period: 200ms}}
  broken:
    backend: process
    command: [/bin/sh, -c, "test -e $0 && exec {sys.executable} {SERVER} --port ${{port}}", FLAG]
    probe: {{http: /health, period: 200ms}}
"""


@pytest.fixture(params=["alone", "daemon"])
def machine(mic: Mic, request: pytest.FixtureRequest) -> Mic:
    """Without a daemon, and with one that runs from the beginning."""
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "gpus:\n  0: none   # idle\n")
    if request.param == "daemon":
        mic.run()
    return mic


@pytest.fixture
def alone(mic: Mic) -> Mic:
    mic.env["MIC_DOCKER_HOST"] = "none"
    return mic


def put(mic: Mic, gpus: str) -> None:
    mic.write(HEAD.replace("FLAG", str(mic.home / "flag")) + gpus)


def gpus_of(mic: Mic) -> str:
    """What stands in the file after the models, which must be as they were."""
    head = HEAD.replace("FLAG", str(mic.home / "flag"))
    text = mic.config.read_text()
    assert text.startswith(head)
    return text.removeprefix(head)


def rows(mic: Mic) -> dict[int, dict[str, Any]]:
    found = mic.status()["instances"]
    return {row["gpus"][0]["index"]: row for row in found}


# --- start and stop -----------------------------------------------------------------------------


def test_a_model_is_started_and_stopped(machine: Mic) -> None:
    started = machine("start", "MAM", "--gpu", "0", rc=0)
    assert gpus_of(machine) == "gpus:\n  0: MAM   # idle\n"
    lines = started.stdout.splitlines()
    assert lines[0] == f"{machine.config}: GPU 0 is MAM now, was none."
    row = rows(machine)[0]
    assert (row["phase"], row["model"]) == ("ready", "MAM")
    assert lines[-1] == f"ready      {row['id']}  GPU 0  {row['endpoints']['http']}"
    stopped = machine("stop", "MAM", "--gpu", "0", rc=0)
    assert gpus_of(machine) == "gpus:\n  0: none   # idle\n"
    assert stopped.stdout.splitlines()[0] == f"{machine.config}: GPU 0 is none now, was MAM."
    assert stopped.stdout.splitlines()[-1] == "GPU 0 is empty."
    assert rows(machine) == {}


def test_other_gpus_are_not_touched(machine: Mic) -> None:
    put(machine, 'gpus:\n  "0-2": MAM  # three\n')
    machine("apply", rc=0)
    before = rows(machine)
    machine("stop", "--gpu", "1", rc=0)
    assert gpus_of(machine) == "gpus:\n  0: MAM  # three\n  1: none\n  2: MAM\n"
    machine("start", "face", "--gpu", "1", rc=0)
    machine("start", "face", "--gpu", "3", rc=0)
    assert gpus_of(machine) == "gpus:\n  0: MAM  # three\n  1: face\n  2: MAM\n  3: face\n"
    after = rows(machine)
    assert {index: after[index]["model"] for index in after} == {
        0: "MAM",
        1: "face",
        2: "MAM",
        3: "face",
    }
    assert [after[index]["pid"] for index in (0, 2)] == [before[index]["pid"] for index in (0, 2)]


def test_a_start_that_fails_is_told_and_stays_in_the_file(machine: Mic) -> None:
    started = machine("start", "broken", "--gpu", "0", rc=1)
    assert gpus_of(machine) == "gpus:\n  0: broken   # idle\n"
    assert "backoff    broken-51000000  GPU 0  it exited with 1" in started.stdout


def test_it_neither_confirms_nor_retries_anything_else(machine: Mic) -> None:
    put(machine, "gpus:\n  0: MAM\n  1: broken\n  2: none\n")
    machine("apply", rc=3)
    before = rows(machine)
    forgotten, failed = before[0], before[1]
    put(machine, "gpus:\n  1: broken\n  2: none\n")
    machine("start", "face", "--gpu", "2", rc=0)
    now = rows(machine)
    assert now[0]["pid"] == forgotten["pid"]
    assert now[1]["restarts"] <= failed["restarts"] + 1


# --- spellings ----------------------------------------------------------------------------------


def test_a_gpu_by_another_name(alone: Mic) -> None:
    put(alone, "gpus:\n  0: none\n  1: none\n")
    uuid = next(
        item["uuid"] for item in alone("status", "--json").json()["gpus"] if item["index"] == 1
    )
    started = alone("start", "MAM", "--gpu", uuid, rc=0)
    assert gpus_of(alone) == "gpus:\n  0: none\n  1: MAM\n"
    assert started.stdout.startswith(f"{alone.config}: {uuid} is MAM now, was none.\n")
    put(alone, f"gpus:\n  {uuid}: MAM\n  0: none\n")
    alone("stop", "--gpu", "1", rc=0)
    assert gpus_of(alone) == f"gpus:\n  {uuid}: none\n  0: none\n"


def test_a_gpu_by_its_place_on_the_bus(alone: Mic, tmp_path: Path) -> None:
    """The file has an index and a range, the command a PCI bus id, and the other way round."""
    nvml = MockNvml(tmp_path)
    nvml.set(gpus=[MockGpu() for _ in range(4)])
    alone.env |= {"MIC_GPU_SOURCE": "nvml", **nvml.env()}
    put(alone, "gpus:\n  0: none  # first\n  1-2: face   # two\n")
    alone("start", "MAM", "--gpu", "3b:00.0", rc=0)
    alone("stop", "face", "--gpu", "0000:3D:00.0", rc=0)
    assert gpus_of(alone) == "gpus:\n  0: MAM  # first\n  1: face   # two\n  2: none\n"
    put(alone, 'gpus:\n  "3b:00.0": MAM   # by its place\n')
    alone("stop", "MAM", "--gpu", mock_uuid(0), rc=0)
    alone("start", "face", "--gpu", "0", rc=0)
    assert gpus_of(alone) == 'gpus:\n  "3b:00.0": face   # by its place\n'


# --- the rest of the file -----------------------------------------------------------------------

COMMENTED = """\
gpus:   # desired

  # rack 1
  0: none     # "idle": until {date}
  # 1: MAM
  "2-3": face # both   \n
  # the end"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_other_byte_stays(alone: Mic, newline: str, bom: bytes) -> None:
    put(alone, COMMENTED)
    before = bom + alone.config.read_bytes().replace(b"\n", newline.encode())
    alone.config.write_bytes(before)
    end = newline.encode()
    alone("start", "MAM", "--gpu", "0", rc=0)
    # But for the end of the last line: without one, the file may have been cut.
    assert not before.endswith(b"\n")
    after = before.replace(b'0: none     # "idle"', b'0: MAM     # "idle"') + end
    assert alone.config.read_bytes() == after
    alone("start", "MAM", "--gpu", "1", rc=0)
    pair = b'"2-3": face # both   '
    after = after.replace(pair, pair + end + b"  1: MAM")
    assert alone.config.read_bytes() == after
    alone("stop", "--gpu", "3", rc=0)
    after = after.replace(pair, b"2: face # both   " + end + b"  3: none")
    assert alone.config.read_bytes() == after
    alone("stop", "MAM", "--gpu", "0", rc=0)
    after = after.replace(b'0: MAM     # "idle"', b'0: none     # "idle"')
    assert alone.config.read_bytes() == after


def test_the_rest_of_the_file_is_left_to_apply(alone: Mic) -> None:
    put(alone, "gpus: {0: MAM, 1: none}\n")
    alone("apply", rc=0)
    before = rows(alone)
    text = alone.config.read_text()
    alone.config.write_text(text.replace("{0: MAM, 1: none}", "{0: face, 1: none, 2: broken}"))
    started = alone("start", "face", "--gpu", "1", rc=0).stdout
    assert started.splitlines()[-4:] == [
        f"ready      face-51000001  GPU 1  {rows(alone)[1]['endpoints']['http']}",
        "left out: MAM-51000000 (remove: the file has face on its GPU)",
        "left out: face-51000000 (create: nothing runs for it yet)",
        "left out: broken-51000002 (create: nothing runs for it yet)",
    ]
    stopped = alone("stop", "face", "--gpu", "1", rc=0).stdout
    assert stopped.splitlines()[-4] == "GPU 1 is empty."
    found = alone("status", "--json").json()["instances"]
    assert {row["id"]: row["pid"] for row in found if row["pid"] is not None} == {
        "MAM-51000000": before[0]["pid"]
    }


def test_another_that_is_slow_is_not_waited_for(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "gpus: {0: slow, 1: none}\n")
    mic.config.write_text(mic.config.read_text().replace("  face:\n", f"  slow: {SLOW}\n  face:\n"))
    mic.run()
    began = time.monotonic()
    mic("start", "face", "--gpu", "1", rc=0)
    assert time.monotonic() - began < 50  # the slow one is given 60 s
    assert rows(mic)[0]["phase"] == "starting"


# --- refusals -----------------------------------------------------------------------------------

REFUSALS = [
    (
        "gpus:\n  1: MAM\n",
        ("start", "face", "--gpu", "1"),
        "error: cannot start face on GPU 1: GPU 1 is taken by MAM\n"
        "hint: stop it first: mic-supervisor stop --gpu 1\n",
    ),
    (
        "gpus:\n  0-3: MAM\n",
        ("start", "face", "--gpu", "2"),
        "error: cannot start face on GPU 2: GPU 2 is taken by MAM\n"
        "hint: stop it first: mic-supervisor stop --gpu 2\n",
    ),
    (
        'gpus:\n  "1,2": MAM\n',
        ("start", "face", "--gpu", "2"),
        "error: cannot start face on GPU 2: GPU 2 is taken by MAM, which has GPU 1,2\n"
        "hint: stop it first: mic-supervisor stop --gpu 1,2\n",
    ),
    (
        'gpus:\n  "1,2": MAM\n',
        ("stop", "--gpu", "2"),
        "error: cannot stop what is on GPU 2: cannot change GPU 2: "
        'the file has "1,2" in one entry\nhint: edit it by hand, in line 18\n',
    ),
    (
        "gpus:\n  1: none\n",
        ("start", "Mam", "--gpu", "1"),
        "error: cannot start Mam on GPU 1: {config} has no model 'Mam'\nhint: did you mean MAM?\n",
    ),
    (
        "gpus:\n  1: none\n",
        ("start", "whisper", "--gpu", "1"),
        "error: cannot start whisper on GPU 1: {config} has no model 'whisper'\n"
        "hint: known are MAM, broken, face\n",
    ),
    (
        "gpus:\n  1: face\n",
        ("stop", "MAM", "--gpu", "1"),
        "error: cannot stop MAM on GPU 1: {config} has face there\n"
        "hint: see `mic-supervisor status`\n",
    ),
    (
        "gpus:\n  1: face\n",
        ("stop", "MAM", "--gpu", "2"),
        "error: cannot stop MAM on GPU 2: {config} has no entry there\n"
        "hint: see `mic-supervisor status`\n",
    ),
    (
        "gpus:\n  1: none\n",
        ("start", "MAM", "--gpu", "9"),
        "error: cannot start MAM on GPU 9: there is no GPU 9; this machine has GPU 0,1,2,3\n",
    ),
    (
        "gpus:\n  1: none\n",
        ("start", "MAM", "--gpu", ABSENT),
        f"error: cannot start MAM on {ABSENT}: {ABSENT} is not in this machine\n",
    ),
    (
        "gpus:\n  ? 1-2\n  : none\n",
        ("start", "MAM", "--gpu", "1"),
        "error: cannot start MAM on GPU 1: cannot edit the file: the way its `gpus:` is laid out "
        "is not understood\nhint: edit it by hand: under gpus:, set GPU 1 to MAM\n",
    ),
]


@pytest.mark.parametrize(("gpus", "arguments", "told"), REFUSALS)
def test_what_is_refused_changes_nothing(
    alone: Mic, gpus: str, arguments: tuple[str, ...], told: str
) -> None:
    put(alone, gpus)
    before = alone.config.read_bytes(), alone.config.stat().st_mtime_ns
    refused = alone(*arguments, rc=1)
    assert refused.stderr == told.format(config=alone.config)
    assert refused.stdout == ""
    assert (alone.config.read_bytes(), alone.config.stat().st_mtime_ns) == before


@pytest.mark.parametrize("value", ["0-3", "x", "1,1", ""])
def test_what_names_no_gpu_is_wrong_usage(alone: Mic, value: str) -> None:
    put(alone, "gpus:\n  0: none\n")
    assert "Invalid value for '--gpu'" in alone("start", "MAM", "--gpu", value, rc=64).stderr


def test_a_drop_in_is_left_alone(alone: Mic) -> None:
    put(alone, "gpus:\n  0: MAM\n  1: none\n")
    drop_in = Path(f"{alone.config}.d/10-site.yaml")
    drop_in.parent.mkdir()
    drop_in.write_text("gpus:\n  1: none\n  2: none\n")
    for index in (1, 2):
        refused = alone("start", "MAM", "--gpu", str(index), rc=1)
        assert refused.stderr == (
            f"error: cannot start MAM on GPU {index}: {drop_in}:{index + 1}:3 sets it, and "
            f"drop-ins win over {alone.config}\n"
            f"hint: edit {drop_in}, then: mic-supervisor apply\n"
        )
    alone("start", "face", "--gpu", "3", rc=0)
    assert gpus_of(alone) == "gpus:\n  0: MAM\n  1: none\n  3: face\n"


def test_an_edit_that_would_be_wrong_is_not_made(alone: Mic) -> None:
    put(alone, "gpus:\n  0: MAM\n  1: none\n")
    text = alone.config.read_text().replace("rollout: {", "port: 29999\n    rollout: {")
    alone.config.write_text(text)
    refused = alone("start", "MAM", "--gpu", "1", rc=1)
    assert "the port 29999 fits one instance only, and MAM has 2" in refused.stderr
    assert f"hint: {alone.config} was left as it was" in refused.stderr
    assert alone.config.read_text() == text


def test_a_file_with_errors_is_not_edited(alone: Mic) -> None:
    put(alone, "gpus:\n  0: MAN\n")
    before = alone.config.read_text()
    assert "unknown model 'MAN'" in alone("start", "MAM", "--gpu", "1", rc=1).stderr
    assert alone.config.read_text() == before


def test_what_the_file_forgot_is_not_pushed_aside(machine: Mic) -> None:
    put(machine, "gpus:\n  0: MAM\n  1: none\n")
    machine("apply", rc=0)
    pid = rows(machine)[0]["pid"]
    put(machine, "gpus:\n  1: none\n")
    refused = machine("start", "face", "--gpu", "0", rc=1)
    assert refused.stderr == (
        "error: cannot start face on GPU 0: GPU 0 is taken by MAM (MAM-51000000), "
        "which the file no longer names\n"
        "hint: stop it first: mic-supervisor stop --gpu 0\n"
    )
    assert rows(machine)[0]["pid"] == pid
    machine("stop", "--gpu", "0", rc=0)
    assert gpus_of(machine) == "gpus:\n  1: none\n  0: none\n"
    assert rows(machine) == {}


def test_a_gpu_is_not_called_empty_while_docker_does_not_answer(machine: Mic) -> None:
    machine.env["MIC_DOCKER_HOST"] = f"unix://{machine.home}/no.sock"
    if machine.daemons:
        machine.daemons[-1].stop()
        machine.run()
    refused = machine("stop", "--gpu", "3", rc=1)
    assert "error: cannot find out whether GPU 3 is empty: docker cannot be read" in refused.stderr
    assert "is empty.\n" not in refused.stdout


def test_saying_it_twice_changes_nothing(machine: Mic) -> None:
    machine("start", "MAM", "--gpu", "0", rc=0)
    pid, stamp = rows(machine)[0]["pid"], machine.config.stat().st_mtime_ns
    again = machine("start", "MAM", "--gpu", "0", rc=0)
    assert again.stdout.startswith(f"{machine.config}: GPU 0 is MAM already.\n")
    assert (rows(machine)[0]["pid"], machine.config.stat().st_mtime_ns) == (pid, stamp)
    machine("stop", "--gpu", "0", rc=0)
    assert "GPU 0 is none already.\n" in machine("stop", "--gpu", "0", rc=0).stdout


def test_four_starts_at_once_lose_nothing(mic: Mic) -> None:
    mic.env["MIC_DOCKER_HOST"] = "none"
    put(mic, "gpus: {0: none, 1: none, 2: none, 3: none}\n")
    mic.run()
    running = [
        subprocess.Popen(
            [PROGRAM, "start", "MAM", "--gpu", str(index)],
            env=mic.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(4)
    ]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 4, said
    assert gpus_of(mic) == "gpus: {0: MAM, 1: MAM, 2: MAM, 3: MAM}\n"
    assert {row["phase"] for row in rows(mic).values()} == {"ready"}


# --- restart and retry --------------------------------------------------------------------------


def test_restart_gives_every_instance_of_a_model_a_new_process(machine: Mic) -> None:
    put(machine, "gpus: {0: MAM, 1: MAM, 2: face}\n")
    machine("apply", rc=0)
    before = rows(machine)
    shown = machine("restart", "MAM", rc=0).stdout
    after = rows(machine)
    assert shown.count("restart: asked for") == 2
    assert shown.splitlines()[-1].startswith("ready      MAM-51000001  GPU 1  http://")
    for index, changed in ((0, True), (1, True), (2, False)):
        assert (after[index]["pid"] != before[index]["pid"]) is changed
    machine("restart", "face-51000002", rc=0)
    assert rows(machine)[2]["pid"] != before[2]["pid"]
    assert rows(machine)[0]["pid"] == after[0]["pid"]


def test_retry_ends_a_backoff(machine: Mic) -> None:
    put(machine, "gpus: {0: broken, 1: MAM}\n")
    assert "backoff    broken-51000000" in machine("apply", rc=3).stdout
    pid = rows(machine)[1]["pid"]
    (machine.home / "flag").touch()
    shown = machine("retry", "broken-51000000", rc=0).stdout
    assert shown.splitlines()[-1].startswith("ready      broken-51000000  GPU 0  http://")
    assert rows(machine)[1]["pid"] == pid


@pytest.mark.parametrize("command", ["restart", "retry"])
def test_what_there_is_not_is_told(machine: Mic, command: str) -> None:
    put(machine, "gpus: {0: MAM}\n")
    machine("apply", rc=0)
    refused = machine(command, "whisper", rc=1).stderr
    assert "there is no instance 'whisper'" in refused
    assert "hint: there is MAM-51000000" in refused


def test_a_file_that_is_mounted_by_itself_is_told_to_have_its_directory_mounted(mic: Mic) -> None:
    """As `docker run -v FILE:FILE` mounts it."""
    put(mic, "gpus:\n  0: none\n")
    script = f'mount --bind "{mic.config}" "{mic.config}" && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *mic.program(), "start", "MAM", "--gpu=0"],
        env=mic.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "unshare failed" in done.stderr:
        require.missing("this user may not make a mount")
    assert done.returncode == 1
    assert f"cannot write {mic.config}: device or resource busy" in done.stderr
    assert f"hint: {mic.config} is mounted by itself" in done.stderr
    assert f"mount {mic.config.parent} instead" in done.stderr
    assert mic.config.read_text().endswith("0: none\n")
