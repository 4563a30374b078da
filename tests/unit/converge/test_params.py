"""What a request says beside its method: of a wrong type it is refused, and nothing is done."""

from __future__ import annotations

from typing import Any

import pytest

from mic_supervisor.converge.params import Params, read
from mic_supervisor.errors import MicError, Unserviceable
from tests.unit.converge.rig import A, Engine, File, converging, run
from tests.unit.converge.test_loop_loads import orders


@pytest.mark.parametrize(
    ("method", "params", "why"),
    [
        (
            "drain",
            {"until_reboot": "no"},
            "until_reboot: Input should be a valid boolean, not 'no'",
        ),
        ("drain", {"until_reboot": 1}, "until_reboot: Input should be a valid boolean, not 1"),
        ("drain", {"reason": ["x"]}, "reason: Input should be a valid string"),
        ("apply", {"rebind": "no"}, "rebind: "),
        ("apply", {"pull": 0}, "pull: "),
        ("apply", {"targets": "a"}, "targets: "),
        ("apply", {"targets": [0]}, "targets.0: "),
        ("apply", {"command": 7}, "command: "),
        ("edited", {"hash": 1}, "hash: "),
        ("reload", {"command": {}}, "command: "),
        ("restart", {"all": "no"}, "all: "),
        ("restart", {"name": 0}, "name: "),
        ("pause", {"names": {"a": 1}}, "names: "),
        ("resume", {"names": [7]}, "names.0: "),
        ("killed", {"gpus": "GPU-1"}, "gpus: "),
        ("history", {"name": ["a"]}, "name: "),
        ("logs", {"lines": "5"}, "lines: "),
        ("logs", {"lines": True}, "lines: "),
        ("logs", {"lines": -1}, "lines: Input should be greater than or equal to 0, not -1"),
        ("logs", {"previous": "no"}, "previous: "),
        ("plan", {"path": 5}, "path: "),
    ],
)
def test_what_is_of_a_wrong_type_is_refused_and_changes_nothing(
    method: str, params: dict[str, Any], why: str
) -> None:
    async def body() -> None:
        async with converging(File(A), Engine()) as rig:
            await rig.phases(a_aaaaaaaa="ready")
            before = (rig.converger.memory, [*rig.told], [*rig.engine.calls])
            with pytest.raises(Unserviceable) as refused:
                await orders(rig).methods()[method](params, rig.told.append)
            assert refused.value.message.startswith(f"cannot answer: {why}")
            assert before == (rig.converger.memory, rig.told, rig.engine.calls)

    run(body)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "/etc/passwd"])
def test_another_path_is_refused_also_one_that_no_file_can_have(path: str) -> None:
    async def body() -> None:
        async with converging(File(A), Engine()) as rig:
            with pytest.raises(MicError, match=r"the daemon runs gpus\.yaml"):
                await orders(rig).methods()["apply"]({"path": path}, rig.told.append)

    run(body)


def test_the_name_of_a_file_stays_as_the_system_has_it() -> None:
    assert read(Params, {"path": "caf\udce9.yaml", "later": 1}) == Params(path="caf\udce9.yaml")
