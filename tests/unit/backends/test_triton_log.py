"""Why a load failed, from answers and logs that a real tritonserver gave."""

from __future__ import annotations

import pytest

from mic_supervisor.backends.triton.log import load_failure
from mic_supervisor.text import without_quotes
from tests.unit.backends.support import ANSWERS

FAILURES = {name: answer for name, answer in ANSWERS.items() if "says" in answer}


@pytest.mark.parametrize("scenario", FAILURES)
def test_recorded_failures(scenario: str) -> None:
    answer = FAILURES[scenario]
    said = load_failure(answer["body"], answer["log"], answer["model"])
    assert said.translate({ord(quote): None for quote in "“”"}) == answer["says"]
    # All but these words is Triton's.
    assert without_quotes(said, "") in (
        *("", "; its log says: ", "Triton gave no answer; its log says: "),
    )


def test_what_is_said_where_the_answer_is_vague() -> None:
    assert {name: answer["says"] for name, answer in FAILURES.items()} == {
        "raises": "Internal: RuntimeError: told to fail "
        "(at /models/Raises/1/model.py(14): initialize)",
        "syntax error": "Internal: SyntaxError: invalid syntax (model.py, line 23)",
        "import error": "Internal: ModuleNotFoundError: No module named 'nobody_has_this' "
        "(at /models/Import/1/model.py(1): <module>)",
        "no version": "at least one version must be available under the version policy of model "
        "'NoVersion'",
        "unknown backend": "Invalid argument: unable to find backend library for backend "
        "'onnxruntime', try specifying runtime on the model configuration",
        "no gpu": FAILURES["no gpu"]["says"],
        "no gpu in a reload": FAILURES["no gpu in a reload"]["says"],
        "not there": "failed to load 'NotThere', failed to poll from model repository; its log "
        "says: model not found in any model repository",
        "newer field": "failed to load 'Newer', failed to poll from model repository; its log "
        "says: Invalid config override: from_the_future: Cannot find field",
        "file of a step": "failed to load 'BadStep', failed to poll from model repository; its "
        "log says: failed to read text proto from /models/BadStep/config.pbtxt: 2:4: Message type "
        '"inference.ModelConfig" has no field named "foo"',
        "hangs": "Triton gave no answer; its log says: Python model file not found in "
        "'/models/Hangs/1/model.py'",
    }
    assert FAILURES["no gpu"]["says"].startswith("Invalid argument: instance group NoGpu-")
    assert FAILURES["no gpu in a reload"]["says"].endswith("(what was loaded before keeps serving)")


VAGUE = '{"error":"failed to load \'M\', failed to poll from model repository"}'
BARE = "“failed to load 'M', failed to poll from model repository”"
TOLD = '2026-11-22T11:13:09Z E 1 model_repository_manager.cc:1460] "Poll failed for model directory'
ENDED = "2026-11-22T11:13:10Z I 1 model_lifecycle.cc:839] \"successfully loaded 'M'\""


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ([], BARE),
        ([f"{TOLD} 'Other': bad\""], BARE),
        ([f"{TOLD} 'M': bad\""], f"{BARE}; its log says: “bad”"),
        ([f"{TOLD} 'M': old\"", f"{TOLD} 'M': new\""], f"{BARE}; its log says: “new”"),
        # An earlier failure is not the reason of this one.
        ([f"{TOLD} 'M': old\"", ENDED], BARE),
        ([f'{TOLD} \'M\': a \\"b\\" \\\\c\\nd"'], f'{BARE}; its log says: “a "b" \\c d”'),
        (["garbage", "", f"{TOLD} 'M': bad\"", "\x00\x01"], f"{BARE}; its log says: “bad”"),
    ],
)
def test_only_the_last_try_of_this_model_is_quoted(log: list[str], says: str) -> None:
    assert load_failure(VAGUE, log, "M") == says


def test_a_model_name_is_no_pattern() -> None:
    assert load_failure(VAGUE, [f"{TOLD} 'MxN': bad\""], "M.N") == BARE


def test_nothing_at_all() -> None:
    assert load_failure("", [], "M") == "Triton gave no answer"


def test_a_stub_that_died_repeats_nothing() -> None:
    said = "Internal: Stub process 'M_0_0' is not healthy"
    body = (
        f'{{"error":"load failed for model \'M\': version 1 is at UNAVAILABLE state: {said}.;\\n"}}'
    )
    log = [
        "2026-11-22T11:13:07Z E 1 model_lifecycle.cc:642] \"failed to load 'M' version 1: "
        f'{said}."'
    ]
    assert load_failure(body, log, "M") == f"“{said}”"


def test_a_long_cause_is_cut() -> None:
    said = load_failure('{"error": "' + "x" * 5000 + '"}', [], "M")
    assert len(said) == 602 and said.endswith("x…”")


def test_two_versions_are_both_told() -> None:
    body = (
        '{"error":"load failed for model \'M\': version 1 is at UNAVAILABLE state: Internal: a;\\n'
        'version 2 is at UNAVAILABLE state: Internal: b;\\n"}'
    )
    assert load_failure(body, [], "M") == "“Internal: a; Internal: b”"
