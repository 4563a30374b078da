"""What is confidential stays out, wherever a sentence picked it up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.http import redact
from mic_supervisor.http.redact import HIDDEN, Scrubber
from tests.unit.http import views_of
from tests.unit.plan import builders as b

SECRET = "canary-3f9a"


def scrubber(**values: object) -> Scrubber:
    return Scrubber(b.desired(b.on("m", 0, workload=b.program(**values))))  # type: ignore[arg-type]


def test_values_of_every_kind_of_environment_are_hidden() -> None:
    for name in ("env", "file_env", "variables"):
        found = scrubber(**{name: (("TOKEN", SECRET),)})
        assert found.text(f"it said: bad token {SECRET}!") == f"it said: bad token {HIDDEN}!"


def test_arguments_are_hidden_and_what_a_reason_needs_is_not() -> None:
    found = Scrubber(
        b.desired(
            b.on("m", 0, workload=b.program("/opt/serve", "--api-key", SECRET, f"--key={SECRET}2"))
        )
    )
    text = f"/opt/serve: unknown option --api-key {SECRET} --key={SECRET}2"
    assert found.text(text) == f"/opt/serve: unknown option --api-key {HIDDEN} --key={HIDDEN}"


def test_a_containers_whole_command_is_arguments() -> None:
    found = Scrubber(b.desired(b.on("m", 0, workload=b.container(command=(SECRET,)))))
    assert found.text(f"exec: {SECRET}: not found") == f"exec: {HIDDEN}: not found"


def test_the_longer_of_two_secrets_is_hidden_whole() -> None:
    found = scrubber(env=(("A", SECRET), ("B", f"{SECRET}-and-more")))
    assert found.text(f"{SECRET}-and-more") == HIDDEN


def test_short_values_are_words_like_others() -> None:
    assert scrubber(env=(("DEBUG", "true"),)).text("it is true") == "it is true"


def test_only_sentences_are_scrubbed() -> None:
    document = {
        "id": SECRET,
        "reason": f"x {SECRET}",
        "warnings": [SECRET],
        "inner": [{"hint": SECRET, "name": SECRET, "until": 1.5, "waits": None}],
    }
    assert scrubber(env=(("A", SECRET),)).document(document) == {
        "id": SECRET,
        "reason": f"x {HIDDEN}",
        "warnings": [HIDDEN],
        "inner": [{"hint": HIDDEN, "name": SECRET, "until": 1.5, "waits": None}],
    }


def test_nothing_desired_hides_nothing() -> None:
    assert Scrubber(None).text(SECRET) == SECRET


@given(st.text(min_size=redact.SHORTEST), st.text(), st.text())
def test_no_secret_comes_through(secret: str, before: str, after: str) -> None:
    text = scrubber(env=(("A", secret),)).text(f"{before}{secret}{after}")
    assert secret not in text.replace(HIDDEN, "\0")


def test_diffs_of_commands_and_environments_show_no_values() -> None:
    paths = {
        "command": True,
        "command[2]": True,
        "entrypoint": True,
        "env.TOKEN": True,
        "file_env.TOKEN": True,
        "variables.X": True,
        "env_file": False,
        "image": False,
        "ports.http.host": False,
        "environment": False,
    }
    diff = [{"path": path, "before": None, "after": SECRET} for path in paths]
    plan = redact.plan_document({"version": 1, "actions": [{"action": "replace", "diff": diff}]})
    assert {d["path"]: d["after"] == HIDDEN for d in plan["actions"][0]["diff"]} == paths
    assert all(d["before"] is None for d in plan["actions"][0]["diff"])


def test_a_report_keeps_its_places_and_loses_the_lines_of_the_file() -> None:
    assert redact.config_error(views_of.REPORT) == (
        "/etc/mic/gpus.yaml:12:5: error: models.whisper.backend: unknown backend 'proces'\n"
        "/etc/mic/gpus.yaml:19:11: error: models.whisper.env.API_KEY: is not valid; "
        "`mic-supervisor check` says why"
    )
    assert redact.config_error(None) is None


def test_an_error_without_a_place_is_kept() -> None:
    text = "cannot read /etc/mic/gpus.yaml: no such file or directory"
    assert redact.config_error(text) == text


def test_a_message_about_arguments_is_not_shown() -> None:
    for key in ("args[0]", "command", "entrypoint[1]", "probe.exec[0]", "env"):
        text = f"gpus.yaml:3:1: error: models.m.{key}: '{SECRET}' is not text"
        shown = redact.config_error(text)
        assert shown is not None and SECRET not in shown
        assert shown.startswith(f"gpus.yaml:3:1: error: models.m.{key}: ")
