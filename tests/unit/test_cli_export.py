"""Documents of several hosts in one export, and what cannot be put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.mic import Mic


def row(instance: str, url: str, **more: Any) -> dict[str, Any]:
    return {
        "id": instance,
        "model": "qwen",
        "backend": "vllm",
        "phase": "ready",
        "serving": True,
        "models": [],
        "endpoints": {"http": url},
        "openai_model": "Qwen/Qwen3-8B",
        **more,
    }


def host(path: Path, name: str, *rows: dict[str, Any]) -> Path:
    """What `status --json` printed on a host, as far as it matters."""
    file = path / f"{name}.json"
    file.write_text(json.dumps({"version": 1, "host": name, "instances": rows, "gpus": []}))
    return file


def test_several_hosts_are_one_upstream(mic: Mic, tmp_path: Path) -> None:
    one = host(
        tmp_path,
        "gpu-1",
        row("qwen-1", "http://10.0.0.1:20000"),
        row("qwen-2", "http://10.0.0.1:20001", serving=False),
        row("none-1", "http://10.0.0.1:20002", backend=""),
    )
    two = host(tmp_path, "gpu-2", row("qwen-1", "http://10.0.0.2:20000"))
    text = mic.here("export", "nginx", "--from", one, "--from", two, rc=0).stdout
    servers = [line.strip() for line in text.splitlines() if "server" in line and "#" in line[9:]]
    assert servers == [
        "server 10.0.0.1:20000 max_fails=0;  # gpu-1-qwen-1",
        "server 10.0.0.2:20000 max_fails=0;  # gpu-2-qwen-1",
    ]
    listed = mic.here(
        "export", "litellm", "--from", one, "--from", "-", rc=0, stdin=two.read_text()
    )
    found = yaml.safe_load(listed.stdout)["model_list"]
    assert [entry["litellm_params"]["api_base"] for entry in found] == [
        "http://10.0.0.1:20000/v1",
        "http://10.0.0.2:20000/v1",
    ]
    assert {entry["model_name"] for entry in found} == {"qwen"}


def test_a_status_counts_each_model_of_a_server_for_itself(mic: Mic, tmp_path: Path) -> None:
    models = [{"model": "a", "phase": "ready"}, {"model": "b", "phase": "loading"}]
    whole = row("s-1", "http://127.0.0.1:1", models=models, openai_model=None)
    text = mic.here("export", "haproxy", "--from", host(tmp_path, "h", whole), rc=0).stdout
    assert "backend mic_a\n    mode http\n    balance leastconn\n    server s-1 127.0.0.1:1" in text
    assert text.endswith("backend mic_b\n    mode http\n    balance leastconn\n")


def test_two_hosts_that_listen_on_their_own_address_alone_are_refused(
    mic: Mic, tmp_path: Path
) -> None:
    files = [host(tmp_path, name, row("a", "http://127.0.0.1:1")) for name in ("gpu-1", "gpu-2")]
    done = mic.here("export", "nginx", "--from", files[0], "--from", files[1], rc=1)
    assert done.stderr == (
        "error: cannot put gpu-1 and gpu-2 together: models of each listen on 127.0.0.1, where no "
        "other host reaches them\n"
        "hint: set `listen` of these models, or below `defaults`, to an address of their host\n"
    )
    done = mic.here("export", "nginx", "--from", files[0], "--from", files[0], rc=1)
    assert "several are of host gpu-1" in done.stderr
    away = host(tmp_path, "gpu-3", row("a", "http://10.0.0.3:1"))
    mic.here("export", "nginx", "--from", files[0], "--from", away, rc=0)  # the proxy is on gpu-1


def test_a_model_that_speaks_the_api_is_named(mic: Mic, tmp_path: Path) -> None:
    file = host(tmp_path, "h", row("a", "http://127.0.0.1:1", model="llama", openai_model=None))
    empty = mic.here("export", "litellm", "--from", file, rc=0).stdout
    assert yaml.safe_load(empty) == {"model_list": []}
    for given, name in (("llama", "llama"), ("llama=gemma 3", "gemma 3")):
        done = mic.here("export", "litellm", "--from", file, "--openai", given, rc=0)
        (entry,) = yaml.safe_load(done.stdout)["model_list"]
        assert entry["litellm_params"]["model"] == f"openai/{name}"
    done = mic.here("export", "litellm", "--from", file, "--openai", "x", rc=1)
    assert done.stderr == "error: cannot export x: there is no such model\nhint: there is llama\n"


@pytest.mark.parametrize("text", ["[]", "{}", '{"instances": [{}]}', '{"models": []}', "no"])
def test_what_is_neither_is_refused(mic: Mic, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").write_text(text)
    done = mic.here("export", "litellm", "--from", tmp_path / "bad", rc=1)
    assert "it is neither a status nor what on_endpoints_change is given" in done.stderr


@pytest.mark.parametrize(
    "models",
    [
        {"a\n}\nserver 6.6.6.6:1;\n#": []},
        {"\ud800": []},
        {"a": [{"instance": "a-1 6.6.6.6:1 #", "endpoints": {"http": "http://10.0.0.1:1"}}]},
        {
            "a": [
                {
                    "instance": "a-1",
                    "endpoints": {"http": "http://10.0.0.1:1"},
                    "openai_model": "\x1b[31m",
                }
            ]
        },
    ],
)
def test_no_name_of_a_document_becomes_a_line_of_a_proxy(
    mic: Mic, tmp_path: Path, models: dict[str, Any]
) -> None:
    file = tmp_path / "odd.json"
    file.write_text(json.dumps({"version": 1, "host": "h", "models": models}))
    done = mic("export", "nginx", "--from", file, rc=1)
    assert "it is neither a status nor what on_endpoints_change is given" in done.stderr
