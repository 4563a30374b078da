"""Many instances of one ComfyUI, from the file to the end of their last process.

The stand-in has the manners of the real one; see tests/support/comfyui/main.py.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.comfyui.world import Comfy
from tests.support.mic import Mic
from tests.support.scopes import runs
from tests.support.waiting import until


@pytest.fixture
def comfy(mic: Mic, tmp_path: Path) -> Comfy:
    return Comfy(mic, tmp_path / "ComfyUI")


# --- starting -----------------------------------------------------------------------------------


def test_three_instances_share_one_installation(comfy: Comfy) -> None:
    before = sorted(comfy.path.iterdir())
    comfy.set(args=["--highvram"])
    comfy.write(gpu0="face", gpu1="face")
    comfy.mic("apply", rc=0)
    mark = comfy.own(comfy.rows()[0]) / "temp" / "preview.png"
    mark.write_text("of a job that runs")
    comfy.write(gpu2="face")
    comfy.mic("apply", rc=0)
    rows = comfy.rows()
    assert [rows[index]["phase"] for index in (0, 1, 2)] == ["ready"] * 3
    assert len({rows[index]["endpoints"]["http"] for index in (0, 1, 2)}) == 3
    assert mark.read_text() == "of a job that runs"
    assert sorted(comfy.path.iterdir()) == before
    for index in (0, 1, 2):
        own = comfy.own(rows[index])
        argv = comfy.argv(rows[index])
        assert argv[argv.index("--user-directory") + 1] == str(own / "user")
        assert "--cpu" in argv
        assert (own / "comfyui.db").exists()
        assert own.stat().st_mode & 0o777 == 0o700


def test_applying_it_again_changes_nothing(comfy: Comfy) -> None:
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    pid = comfy.rows()[0]["pid"]
    assert comfy.mic("plan", rc=0).stdout == "No changes.\n"
    comfy.mic("apply", rc=0)
    assert comfy.rows()[0]["pid"] == pid


def test_it_is_ready_when_it_answers_and_not_before(comfy: Comfy) -> None:
    comfy.set(env={"START": "1.0", "FAIL": "1"})
    comfy.write(gpu0="face")
    began = time.monotonic()
    shown = comfy.mic("apply", rc=0).stdout
    assert time.monotonic() - began >= 1.0
    row = comfy.rows()[0]
    assert shown.index(f"{row['id']}: starting") < shown.index(f"{row['id']}: ready")
    assert row["phase"] == "ready"
    # A custom node that does not load is its user's business, and stands in the log.
    assert "IMPORT FAILED" in comfy.mic("logs", row["id"], rc=0).stdout


def test_an_answer_with_other_arguments_is_ours_where_nobody_else_listens(comfy: Comfy) -> None:
    comfy.set(env={"STRANGER": "1"})
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    assert comfy.rows()[0]["phase"] == "ready"


def test_a_start_that_fails_is_told_with_the_reason(comfy: Comfy, tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    crash.touch()
    comfy.set(env={"CRASH": str(crash)})
    comfy.write(gpu0="face")
    assert "exited with 1" in comfy.mic("apply", rc=1).stdout
    row = comfy.rows()[0]
    assert "told to crash" in comfy.mic("logs", row["id"], rc=0).stdout
    crash.unlink()
    comfy.mic("apply", rc=0)


def test_an_installation_that_is_not_there_stops_nothing(comfy: Comfy) -> None:
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    pid = comfy.rows()[0]["pid"]
    (comfy.path / "main.py").rename(comfy.path / "main.old")
    shown = comfy.mic("apply", rc=1).stdout
    assert f"its program {comfy.path}/main.py cannot be read" in shown
    assert runs(pid)


# --- stopping -----------------------------------------------------------------------------------

JOBS = (0.3, 0.3, 0.3)


def finished(own: Path) -> list[str]:
    return sorted(path.stem for path in (own / "output").glob("*.txt"))


def test_a_stop_waits_for_the_queue(comfy: Comfy) -> None:
    comfy.set(drain_timeout="20s")
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    row = comfy.rows()[0]
    own, jobs = comfy.own(row), comfy.queue(row, *JOBS)
    comfy.write(gpu0="none")
    assert "draining" in comfy.mic("apply", rc=0).stdout
    assert finished(own) == sorted(jobs)
    assert not (own / "temp").exists()  # SIGINT, which it has time to obey
    assert comfy.rows() == {}


def test_without_time_for_it_the_queue_is_lost(comfy: Comfy) -> None:
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    row = comfy.rows()[0]
    own = comfy.own(row)
    comfy.queue(row, 60.0, 60.0)
    comfy.write(gpu0="none")
    began = time.monotonic()
    assert "draining" not in comfy.mic("apply", rc=0).stdout
    assert time.monotonic() - began < 40.0
    assert finished(own) == []


def test_another_model_takes_over_after_the_last_job(comfy: Comfy) -> None:
    comfy.set("face", drain_timeout="20s")
    comfy.set("cloth")
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    row = comfy.rows()[0]
    own, jobs = comfy.own(row), comfy.queue(row, *JOBS)
    comfy.write(gpu0="cloth")
    comfy.mic("apply", rc=0)
    assert finished(own) == sorted(jobs)
    assert comfy.rows()[0]["model"] == "cloth"


def test_a_change_of_the_model_waits_too(comfy: Comfy) -> None:
    comfy.set(drain_timeout="20s")
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    row = comfy.rows()[0]
    own, jobs = comfy.own(row), comfy.queue(row, *JOBS)
    comfy.set(drain_timeout="20s", args=["--preview-method", "auto"])
    comfy.write()
    comfy.mic("apply", rc=0)
    assert finished(own) == sorted(jobs)
    assert "--preview-method" in comfy.argv(comfy.rows()[0])


def test_the_wait_has_an_end(comfy: Comfy) -> None:
    comfy.set(drain_timeout="1s")
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    row = comfy.rows()[0]
    own = comfy.own(row)
    comfy.queue(row, 60.0)
    comfy.write(gpu0="none")
    shown = comfy.mic("apply", rc=0).stdout
    assert "still busy after 1 s; stopping it anyway" in shown
    assert finished(own) == []


def test_a_tree_that_ignores_everything_is_gone_after_the_stop(comfy: Comfy) -> None:
    comfy.set(env={"TREE": "2", "IGNORE": "SIGINT,SIGTERM"}, stop_timeout="500ms")
    comfy.write(gpu0="face")
    comfy.mic("apply", rc=0)
    row = comfy.rows()[0]
    pids = [row["pid"], *comfy.tree(comfy.own(row), 4)]
    assert len({*pids}) == 5
    assert all(map(runs, pids))
    comfy.write(gpu0="none")
    comfy.mic("apply", rc=0)
    assert [pid for pid in pids if runs(pid)] == []


# --- the daemon ---------------------------------------------------------------------------------


def test_what_is_killed_comes_back_without_its_old_tree(comfy: Comfy) -> None:
    comfy.set(env={"TREE": "1"})
    comfy.write(gpu0="face", gpu1="face")
    comfy.mic.run()
    comfy.mic("apply", rc=0)
    rows = comfy.rows()
    row, other, own = rows[0], rows[1], comfy.own(rows[0])
    pids = comfy.tree(own, 2)
    (own / "user" / "tree").unlink()
    os.kill(row["pid"], signal.SIGKILL)

    def back() -> bool:
        now = comfy.rows()[0]
        return now["phase"] == "ready" and now["pid"] != row["pid"]

    until(back, "another process on GPU 0")
    assert [pid for pid in pids if runs(pid)] == []
    rows = comfy.rows()
    assert (rows[0]["restarts"], rows[1]["pid"]) == (1, other["pid"])


def test_a_daemon_that_ends_meanwhile_loses_no_job(comfy: Comfy) -> None:
    comfy.set(drain_timeout="60s")
    comfy.write(gpu0="face")
    daemon = comfy.mic.run()
    comfy.mic("apply", rc=0)
    row = comfy.rows()[0]
    own, jobs = comfy.own(row), comfy.queue(row, 20.0)  # longer than the daemon takes to end
    comfy.write(gpu0="none")
    until(lambda: "the file keeps its GPU empty" in daemon.text(), "the daemon to drain")
    assert daemon.stop() == 0
    assert finished(own) == []
    assert runs(row["pid"])
    comfy.mic.run()
    until(lambda: not runs(row["pid"]), "the end of the instance")
    assert finished(own) == jobs
