"""What a hint says to write is accepted: each one is put into the file that it is about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from mic_supervisor.backends.registry import Registry
from mic_supervisor.config.diagnostics import Diagnostic, InvalidConfig
from mic_supervisor.config.document import Config, Location
from mic_supervisor.config.load import load
from tests.unit.config.fakes import FakeRegistry

BAD = Path(__file__).parents[2] / "corpus" / "bad"
FILES = sorted(BAD.glob("*.yaml"))

_VERBS = re.compile(r"(write|as in|add|or) (`[^`]+`(?: and `[^`]+`)*)|(remove the key)")


def found(text: str, directory: Path, registry: Any, environ: dict[str, str]) -> Any:
    """What is wrong with the file, and its Config where nothing is."""
    path = directory / "gpus.yaml"
    path.write_text(text)
    try:
        config = load(path, registry, environ=environ)
    except InvalidConfig as error:
        return error.diagnostics, None
    warned = []
    for shown in config.warnings:
        place, message, hint = re.split(r": warning: [^ ]+: |\n.*\n.*\^\n +", shown)
        line, column = map(int, place.removeprefix(f"{path}:").split(":"))
        location = Location(str(path), line, column)
        warned.append(Diagnostic(location, "", message, hint=hint, level="warning"))
    return tuple(warned), config


def ways_out(diagnostic: Diagnostic) -> Iterator[tuple[str, list[str]]]:
    """(verb, what to write) for each that the diagnostic offers."""
    verb = ""
    for match in _VERBS.finditer(f"{diagnostic.message} {diagnostic.hint or ''}"):
        if match[3]:
            yield "remove", []
        else:
            verb = verb if match[1] == "or" else match[1]
            yield verb, re.findall("`([^`]+)`", match[2])


class Found:
    """What stands at a location: an entry, or a value, and the map that it stands in."""

    def __init__(self, text: str, at: int) -> None:
        self.entry: tuple[Any, Any] | None = None  # whose key begins there
        self.value: Any = None
        self.mapping: Any = None
        with suppress(yaml.YAMLError):  # what is no YAML has lines only
            self._look(yaml.compose(text, yaml.SafeLoader), at)

    def _look(self, node: Any, at: int) -> None:
        if node is not None and node.start_mark.index == at:
            self.value = node
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._look(item, at)
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            if key.start_mark.index == at:
                self.entry, self.mapping = (key, value), node
            else:
                if value.start_mark.index == at:
                    self.mapping = node
                self._look(value, at)


def with_it(text: str, diagnostic: Diagnostic, verb: str, parts: list[str]) -> str:
    """The file as somebody leaves it who does what the hint says."""
    lines = text.splitlines(keepends=True)
    line, column = diagnostic.location.line, diagnostic.location.column
    at = sum(map(len, lines[: line - 1])) + column - 1
    there = Found(text, at)
    if diagnostic.path == "version" and verb == "add":
        return f"{parts[0]}\n{text}"
    if " no gpus.yaml" in diagnostic.message:
        return f"{parts[0]}\n"
    flow = there.mapping is not None and there.mapping.flow_style
    gap = ", " if flow else "\n" + " " * (column - 1)
    if verb == "add":
        inside = there.mapping if there.entry is None else there.entry[1]
        first = inside.value[0][0].start_mark
        gap = ", " if inside.flow_style else "\n" + " " * first.column
        return text[: first.index] + parts[0] + gap + text[first.index :]
    if there.entry is not None:
        key, value = there.entry
        end = len(text[: max(key.end_mark.index, value.end_mark.index)].rstrip())
        if verb == "remove":
            if flow:
                return text[:at] + text[end:].removeprefix(", ")
            return text[: at - column + 1] + text[end:].partition("\n")[2]
        if not re.match(r"(\"[^\"]*\"|[^\s\"{\[]+): ", parts[0]):
            return text[:at] + parts[0] + text[key.end_mark.index :]
        return text[:at] + gap.join(parts) + text[end:]
    if there.value is not None:
        end = len(text[: there.value.end_mark.index].rstrip())
        return text[:at] + parts[0] + text[end:]
    return text[:at] + parts[0] + text[at:].partition("\n")[1] + text[at:].partition("\n")[2]


# --- whole files ----------------------------------------------------------------------------------


def of_model(keys: str, backend: str = "backend: container\n    image: ghcr.io/x/tei:1.8") -> str:
    return f"version: 1\nmodels:\n  embed:\n    {backend}\n    {keys}\ngpus:\n  0: embed\n"


PROCESS = "backend: process"
VLLM = "backend: vllm\n    model: Qwen/Qwen3-8B"
MAM = 'version: 1\nmodels:\n  MAM: {backend: container, image: "a/b:1", container_port: 80}\n'
COMPOSE = """\
x-common: &common
  restart: always
services:
  tei:
    <<: *common
    image: ghcr.io/huggingface/text-embeddings-inference:1.8
    container_name: tei
    command: --model-id ${MODEL:-BAAI/bge-m3}
    ports:
      - "8080:80"
    deploy: {resources: {reservations: {devices: [{driver: nvidia, count: 1}]}}}
volumes:
  models: {}
"""
LLAMA_SWAP = """\
healthCheckTimeout: 120
startPort: 5800
macros:
  latest: /app/llama-server --port ${PORT}
models:
  "qwen":
    cmd: |
      ${latest} -m /models/qwen.gguf
    ttl: 300
groups:
  a: {members: [qwen]}
"""
KUBERNETES = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: []}\n"

CASES = {
    # --- a command as one text
    "command": (
        of_model('command: --port ${port} --name "a b"'),
        'write `[--port, "${port}", --name, "a b"]`',
    ),
    "command-folded": (
        of_model("command: >-\n      --port ${port}\n      --model BAAI/bge-m3"),
        'write `[--port, "${port}", --model, BAAI/bge-m3]`',
    ),
    "command-json": (
        of_model("""command: '--port ${port} --x "{\\"a\\": 1}"'"""),
        'write `[--port, "${port}", --x, "{\\"a\\": 1}"]`',
    ),
    "command-apostrophe": (
        of_model("command: it's --port ${port}"),
        'write `["it\'s", --port, "${port}"]`',
    ),
    "command-process": (
        of_model("command: /opt/serve --port ${port} --len 8192", PROCESS),
        'write `[/opt/serve, --port, "${port}", --len, "8192"]`',
    ),
    "args": (of_model("args: --max-model-len 8192", VLLM), 'write `[--max-model-len, "8192"]`'),
    "args-number": (of_model("args: [--max-model-len, 8192]", VLLM), 'quote it: "8192"'),
    "entrypoint": (of_model("entrypoint: python3 -m serve"), "write `[python3, -m, serve]`"),
    "exec": (
        of_model("probe: {exec: 'curl -f localhost:${port}'}"),
        'write `[curl, -f, "localhost:${port}"]`',
    ),
    "cmd": (
        of_model("cmd: --port ${port}"),
        'write `command: [--port, "${port}"]`',
    ),
    # --- sizes and durations
    "vram": (of_model("vram: 20000"), "a number needs a unit: write `20000m`"),
    "vram-text": (of_model('vram: "20"'), "a number needs a unit: write `20m` or `20g`"),
    "shm_size": (of_model("shm_size: 2147483648"), "a number needs a unit: write `2g`"),
    "memory": (of_model("limits: {memory: 1000000000}"), "write `1000000000b`"),
    "memlock": (of_model("limits: {memlock: -1}"), "write `unlimited`"),
    "percent": (of_model("vram: 80%"), "as in `512m` or `20GiB`"),
    "duration": (of_model("start_timeout: 300"), "write `300s` or `300m`"),
    "duration-words": (of_model("start_timeout: 5min"), "as in `30s` or `5m`"),
    # --- Compose's keys
    "volumes": (
        of_model('volumes: ["/a:/b:ro", "/c:/d"]'),
        "write `mounts: [/a:/b:ro, /c:/d]`",
    ),
    "volumes-named": (
        of_model('volumes:\n      - data:/b\n      - "./x:/c:ro,z"'),
        "write `mounts: [/srv/data:/b, /srv/x:/c:ro]`",
    ),
    "volumes-long": (
        of_model("volumes:\n      - {type: bind, source: /a, target: /b, read_only: true}"),
        "write `mounts: [/a:/b:ro]`",
    ),
    "environment": (
        of_model('environment: ["A=b=c", "B=", "HOME"]'),
        'write `env: {A: "b=c", B: "", HOME: "${env:HOME}"}`',
    ),
    "environment-map": (
        of_model("environment:\n      A: true\n      B: 1"),
        'write `env: {A: "true", B: "1"}`',
    ),
    "env": (of_model('env: ["A=b"]'), "write `{A: b}`"),
    "env-items": (of_model("env:\n      - A: b\n      - C: d"), "write `{A: b, C: d}`"),
    "healthcheck": (
        of_model(
            'healthcheck:\n      test: [CMD, curl, -f, "http://localhost:80/health"]\n'
            "      interval: 1m30s\n      timeout: 3s\n      retries: 5\n      start_period: 1m"
        ),
        "write `probe: {http: /health, period: 90s, timeout: 3s, failures: 5}`",
    ),
    "healthcheck-shell": (
        of_model('healthcheck: {test: "pgrep serve || exit 1"}'),
        'write `probe: {exec: [/bin/sh, -c, "pgrep serve || exit 1"]}`',
    ),
    "healthcheck-image": (
        of_model("healthcheck: {interval: 10s}"),
        "write `probe: {docker: true, period: 10s}`",
    ),
    "restart": (of_model("restart: unless-stopped"), "remove the key: the supervisor starts"),
    "ports": (of_model('ports: ["8000:8000"]'), "write `port: 8000`"),
    "ports-two": (
        of_model('ports:\n      - "8080:80"'),
        "write `port: 8080` and `container_port: 80`",
    ),
    "ports-address": (
        of_model('ports: ["0.0.0.0:8080:80/tcp"]'),
        'write `port: 8080` and `container_port: 80` and `listen: "0.0.0.0"`',
    ),
    "ports-inside": (of_model("ports: [8000]"), "write `container_port: 8000`"),
    "ports-several": (
        of_model('ports: ["8000:8000", "8001:8001"]'),
        "write `ports: {http: 8000, grpc: 8001}`",
    ),
    "ports-process": (
        of_model('command: [/bin/serve]\n    ports: ["8080:80"]', PROCESS),
        "write `port: 8080`",
    ),
    "mounts-mode": (of_model('mounts: ["/a:/b:z"]'), "write `/a:/b:ro`"),
    "mounts-named": (of_model('mounts: ["data:/b"]'), "as in `/srv/models:/models:ro`"),
    "probe": (of_model("probe: /health"), "write `{http: /health}`"),
    "probe-tcp": (of_model("probe: tcp"), "write `{tcp: true}`"),
    "probe-url": (of_model("probe: http://localhost:80/ready"), "write `{http: /ready}`"),
    "gpus": (of_model("gpus: all"), "remove the key: GPUs are given to models under gpus:"),
    "devices": (
        of_model("devices: [nvidia.com/gpu=all]\n    container_port: 80"),
        "as in `/dev/fuse` or `/dev/fuse:/dev/fuse:rwm`; GPUs are given to models under gpus:",
    ),
    "deploy": (
        of_model("deploy:\n      resources:\n        limits: {memory: 8g}"),
        "remove the key: GPUs",
    ),
    "container_name": (of_model("container_name: tei"), "remove the key: a container is named"),
    "network_mode": (of_model("network_mode: host"), "write `network: host`"),
    "networks": (
        of_model("networks: {ai: {aliases: [tei]}}\n    container_port: 80"),
        "write `networks: [ai]` and `network_aliases: [tei]`",
    ),
    "pull_policy": (of_model("pull_policy: if_not_present"), "write `pull: missing`"),
    "mem_limit": (of_model("mem_limit: 8589934592"), "write `limits: {memory: 8589934592b}`"),
    "stop_grace_period": (of_model("stop_grace_period: 1m30s"), "write `stop_timeout: 90s`"),
    "env_file": (of_model("env_file: [/a/b]"), "write `/a/b`"),
    "volumes-process": (
        of_model('command: [/bin/a]\n    port: 80\n    volumes: ["/a:/b"]', PROCESS),
        "a host process has no container; remove the key",
    ),
    # --- GPUs
    "all": (f"{MAM}gpus: {{all: MAM}}\n", 'write `"0-3"`'),
    "gpu0": (f"{MAM}gpus: {{gpu0: MAM}}\n", "write `0`"),
    "GPU 0": (f"{MAM}gpus:\n  GPU 0: MAM\n", "write `0`"),
    "cuda:0": (f"{MAM}gpus:\n  cuda:0: MAM\n", "write `0`"),
    "/dev/nvidia1": (f"{MAM}gpus:\n  /dev/nvidia1: MAM\n", "write `1`"),
    "full-width-digits": (f"{MAM}gpus:\n  “０-３”: MAM\n", 'write `"0-3"`'),
    "null": (f"{MAM}gpus:\n  6: null\n", "write `6: none`"),
    "tilde": (f'{MAM}gpus:\n  "6": ~\n', 'write `"6": none`'),
    "nothing": (f"{MAM}gpus:\n  6:\n", "write `6: none`"),
    "list": (f"{MAM}gpus:\n  - 0: MAM\n  - 1: MAM\n", 'write `{"0": MAM, "1": MAM}`'),
    "count": (f"{MAM}gpus: 2\n", "write `{0: none}`"),
    "one-for-all": (f"{MAM}gpus: MAM\n", "write `{0: MAM}`"),
    "several": (f"{MAM}gpus: {{0: [MAM]}}\n", "write `MAM`"),
    "model-key": (f"{MAM}gpus: {{0: {{model: MAM}}}}\n", "write `MAM`"),
    # --- the file itself
    "version": (f"{MAM}gpus: {{0: MAM}}\n".replace(": 1\n", ': "1"\n', 1), "write `1`"),
    "no-version": (f"{MAM}gpus: {{0: MAM}}\n".replace("version: 1\n", ""), "add `version: 1`"),
    "blank": (
        f"{MAM}gpus:\n  0:MAM\n",
        "a colon and a blank must stand between a key and its value: write `0: MAM`",
    ),
    "blank-first": (f"{MAM}gpus: {{0: MAM}}\n".replace("version: ", "version:"), "`version: 1`"),
    "blank-flow": (f"{MAM}gpus: {{0:MAM}}\n", "write `0: MAM`"),
    "blank-second": (f"{MAM}gpus:\n  0: MAM\n  1:MAM\n  2: none\n", "write `1: MAM`"),
    "blank-in-model": (of_model("vram:2g"), "write `vram: 2g`"),
    "full-width": (
        f"{MAM}gpus:\n  0：MAM\n",
        "a colon and a blank must stand between a key and its value: write `0: MAM`",
    ),
    "full-width-blank": (of_model("vram： 2g"), "write `vram: 2g`"),
    "full-width-flow": (f"{MAM}gpus: {{0：MAM}}\n", "write `0: MAM`"),
    "full-width-comma": (
        f"{MAM}gpus: {{0: MAM，1: none}}\n",
        "write `gpus: {0: MAM, 1: none}`",
    ),
    "full-width-braces": (f"{MAM}gpus: ｛0：MAM，1: none｝\n", "write `gpus: {0: MAM, 1: none}`"),
    "full-width-brackets": (
        of_model('command: 【--port，"${port}"】'),
        'write `[--port, "${port}"]`',
    ),
    "full-width-map": (of_model("probe: ｛http：/｝\n    container_port: 80"), "write `{http: /}`"),
    "other-quotes": (
        of_model("command: [--port, “${port}”]"),
        'write `command: [--port, "${port}"]`',
    ),
    "compose": (COMPOSE, "models: {tei: {backend: container, image: ghcr.io/huggingface/text"),
    "llama-swap": (LLAMA_SWAP, "models: {qwen: {backend: process, command: [/usr/local/bin/llama"),
    "kubernetes": (KUBERNETES, "models: {embed: {backend: container, image: REGISTRY"),
    "models-list": (
        "version: 1\nmodels:\n  - name: a\n    backend: vllm\n    model: q\ngpus: {0: none}\n",
        "leave the dashes out: write `{a: {backend: vllm, model: q}}`",
    ),
    "models-list-named": (
        "version: 1\nmodels:\n  - a:\n    backend: vllm\n    model: q\ngpus: {0: a}\n",
        "leave the dashes out: write `{a: {backend: vllm, model: q}}`",
    ),
    "profiles-list": (
        f"{MAM}gpus: {{0: MAM}}\nprofiles: [night]\n",
        "name each profile: write `{night: {gpus: {0: none}}}`",
    ),
    "profile-list": (
        f"{MAM}gpus: {{0: MAM}}\nprofiles: {{night: [MAM]}}\n",
        "write `{gpus: {0: none}}`",
    ),
    # --- backends
    "docker": (
        MAM.replace("container,", "docker,") + "gpus: {0: MAM}\n",
        "write `backend: container`",
    ),
    "ollama": (
        "version: 1\nmodels:\n  a:\n    backend: ollama\ngpus: {0: a}\n",
        "write `backend: container` and `image: ollama/ollama:0.12.3` and `container_port: 11434`",
    ),
    "podman": (
        "version: 1\nmodels: {a: {backend: podman}}\ngpus: {0: a}\n",
        "write `backend: container` and `image: REGISTRY/NAME:TAG` and `container_port: 8000`",
    ),
    "command-backend": (
        "version: 1\nmodels: {a: {backend: cmd, command: [/bin/a]}}\ngpus: {0: a}\n",
        "write `backend: process`",
    ),
    "settings": (
        f"backends:\n  ollama: {{}}\n{MAM}gpus: {{0: MAM}}\n",
        "remove the key: no backend has that name",
    ),
    "no-backend": (
        'version: 1\nmodels: {a: {image: "a/b:1"}}\ngpus: {0: a}\n',
        "add `backend: container`",
    ),
    "model-text": (
        "version: 1\nmodels: {a: vllm}\ngpus: {0: a}\n",
        "write `a: {backend: vllm, model: Qwen/Qwen3-8B}`",
    ),
    "model-null": (
        "version: 1\nmodels:\n  a:\ngpus: {0: a}\n",
        "write `a: {backend: container, image: ",
    ),
}

WARNED = {
    "no-port": (
        of_model("command: [--model, x]\n    probe: {http: /health}"),
        'add `args: [--port, "${port}"]`; or, if it always listens on the same one, add '
        "`container_port: 8000`",
    ),
    "no-command": (of_model("probe: {tcp: true}"), "add `container_port: 8000`"),
    "no-port-host": (of_model("network: host"), "add `port: 8000`"),
    "no-port-process": (of_model("command: [/bin/serve]", PROCESS), "add `port: 8000`"),
    "no-tag": (
        MAM.replace('"a/b:1"', "reg:5000/a/b") + "gpus: {0: MAM}\n",
        "as in `reg:5000/a/b:1.0`",
    ),
    "no-tag-settings": (
        "version: 1\nbackends: {triton: {image: a/b, model_repository: /srv/m}}\n"
        "models: {a: {backend: triton}}\ngpus: {0: a}\n",
        "as in `a/b:1.0`",
    ),
    "other-quotes": (MAM.replace('"a/b:1"', "“a/b:1”") + "gpus: {0: MAM}\n", "write `a/b:1`"),
    "full-width-comma": (
        of_model("container_port: 80\n    command: [serve， -m， x]"),
        'write `serve, -m, x`, or `"serve， -m， x"` where one text is meant',
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_hint_says_to_write_is_accepted(name: str, tmp_path: Path) -> None:
    text, words = CASES[name]
    wrong, _ = found(text, tmp_path, Registry(), {"HOME": "/root"})
    assert len(wrong) == 1, [one.render() for one in wrong]
    (one,) = wrong
    assert words in f"{one.message} {one.hint}"
    if "quote it: " in words:
        return
    ways = list(ways_out(one))
    assert ways
    for verb, parts in ways:
        better = with_it(text, one, verb, parts)
        left, config = found(better, tmp_path, Registry(), {"HOME": "/root"})
        assert config is not None, f"{better}\n{[item.render() for item in left]}"


@pytest.mark.parametrize(
    ("models", "path"),
    [
        ("[{b: {backend: vllm, model: q}}]", "models"),
        ("{a b: {backend: vllm, model: q}}", 'models."a b"'),
    ],
)
def test_a_model_that_may_be_among_refused_ones_is_not_looked_for_there(
    models: str, path: str, tmp_path: Path
) -> None:
    text = f"version: 1\nmodels: {models}\ngpus: {{0: ab}}\n"
    wrong, _ = found(text, tmp_path, Registry(), {})
    assert wrong[0].path == path
    assert "did you mean" not in str([one.hint for one in wrong])


@pytest.mark.parametrize("name", WARNED)
def test_check_warns_of_what_is_valid_and_rarely_meant(name: str, tmp_path: Path) -> None:
    text, words = WARNED[name]
    warned, config = found(text, tmp_path, Registry(), {})
    assert isinstance(config, Config)
    (one,) = warned
    assert (one.level, words in one.hint) == ("warning", True), one.render()
    for verb, parts in ways_out(one):
        better = with_it(text, one, verb, parts)
        left, config = found(better, tmp_path, Registry(), {})
        assert (config is not None, left) == (True, ()), f"{better}{[o.render() for o in left]}"


@pytest.mark.parametrize(
    "keys",
    [
        'command: [--port, "${port}"]',
        'env: {PORT: "${port}"}',
        "port: 8000",
        "container_port: 80",
        "env_file: /etc/x.env",
        "probe: {exec: [/bin/true]}",
    ],
)
def test_check_warns_of_no_server_that_learns_its_port(keys: str, tmp_path: Path) -> None:
    assert found(of_model(keys), tmp_path, Registry(), {})[0] == ()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_hint_about_a_bad_file_leads_into_no_other_error(path: Path, tmp_path: Path) -> None:
    text, environ = path.read_text(), {"HOME": "/root"}
    wrong, _ = found(text, tmp_path, FakeRegistry(), environ)
    known = {(one.path, one.message) for one in wrong}
    for one in wrong:
        for verb, parts in ways_out(one):
            better = with_it(text, one, verb, parts)
            left, _ = found(better, tmp_path, FakeRegistry(), environ)
            now = {(item.path, item.message) for item in left if item.level == "error"}
            assert now < known, f"{better}\n{[item.render() for item in left]}"


@pytest.mark.parametrize(
    "line", ["a: b: c  # 注释，另", 'a: "，" b', "说明: 你好，世界: x", "a: [b  # ，", "甲: 乙: 丙"]
)
def test_what_is_wrong_for_another_reason_is_not_laid_on_a_full_width_mark(
    line: str, tmp_path: Path
) -> None:
    (one,) = found(f"version: 1\n{line}\ngpus: {{0: none}}\n", tmp_path, Registry(), {})[0]
    assert "full-width" not in one.message
