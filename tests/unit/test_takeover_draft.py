"""The text of a first gpus.yaml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mic_supervisor.backends.registry import Registry, examples, recognise
from mic_supervisor.config.load import load
from mic_supervisor.config.yaml import scalar
from mic_supervisor.model import Gpu, GpuInventory
from mic_supervisor.takeover import Proposal
from mic_supervisor.takeover.draft import DraftGpu, DraftModel, first_file, render

TEXT = render(
    "A title,\n\nand more",
    gpus=[
        DraftGpu("0", "web", ["GPU 0: NVIDIA A100"]),
        DraftGpu("1", None),
        DraftGpu("2,3", "web-2"),
        DraftGpu("4", None, ["GPU 4 fell off the bus"], commented=True),
    ],
    models=[
        DraftModel(
            "web",
            {"backend": "container", "image": "a/b:1.0", "command": ["--port", "80", "on", "x: y"]},
            ["a note"],
        ),
        DraftModel("web-2", {"backend": "process", "command": ["/bin/x", "y" * 60, "z" * 60]}),
        DraftModel("bad", {"backend": "process", "command": ["x"]}, commented="it is relative"),
    ],
    examples="models:\n  a: {}\n",
)


def test_the_whole_text() -> None:
    assert (
        "# yaml-language-server: $schema=/usr/share/mic/gpus.schema.json\n"
        "#\n"
        "# A title,\n"
        "#\n"
        "# and more\n"
        "\n"
        "version: 1\n"
        "\n"
        "models:                         # what may run: name -> backend and its options\n"
        "  # a note\n"
        "  web:\n"
        "    backend: container\n"
        "    image: a/b:1.0\n"
        '    command: [--port, "80", "on", "x: y"]\n'
        "\n"
        "  web-2:\n"
        "    backend: process\n"
        "    command:\n"
        "      - /bin/x\n"
        f"      - {'y' * 60}\n"
        f"      - {'z' * 60}\n"
        "\n"
        "  # Not usable as it is: it is relative\n"
        "  # bad:\n"
        "  #   backend: process\n"
        "  #   command: [x]\n"
        "\n"
        "\n"
        "# --- Examples. Take away the first two characters of what you need.\n"
        "#\n"
        "# models:\n"
        "#   a: {}\n"
        "\n"
        "# What should run where, by index, UUID or PCI bus id. `none` keeps a GPU empty: nothing\n"
        "# is started there, and no foreign process is stopped. A GPU that is not listed is left\n"
        "# alone.\n"
        "gpus:\n"
        "  # GPU 0: NVIDIA A100\n"
        "  0: web\n"
        "  1: none\n"
        '  "2,3": web-2\n'
        "  # GPU 4 fell off the bus\n"
        "  # 4: none\n"
    ) == TEXT


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_every_text_is_read_as_it_was(tmp_path_factory: Any, texts: list[str]) -> None:
    texts = [text.replace("$", "S") for text in texts]
    text = render(
        "t",
        gpus=[DraftGpu("0", "m")],
        models=[DraftModel("m", {"backend": "process", "command": ["/bin/x", *texts]})],
    )
    path = tmp_path_factory.mktemp("draft", numbered=True) / "gpus.yaml"
    path.write_text(text, encoding="utf-8")
    found = load(path, Registry(), environ={}).document["models"]["m"]["command"]
    assert found == ["/bin/x", *texts]


def test_scalars() -> None:
    plain = ("a", "/srv/x", "a/b:1.0", "Qwen/Qwen3-8B", "_x")
    assert [scalar(text) for text in plain] == list(plain)
    for text in (
        "on",
        "No",
        "010",
        "22:22",
        "1_000",
        "",
        "a b",
        "a:",
        "#x",
        "~",
        "-1",
        "é",
        "null",
    ):
        assert scalar(text) == f'"{text}"'
    assert scalar('a"\\\n\x85') == '"a\\"\\\\\\x0a\\x85"'
    assert [scalar(True), scalar(8), scalar(1.5)] == ["true", "8", "1.5"]


def test_the_examples_are_valid_once_they_are_no_comments(tmp_path: Path) -> None:
    registry = Registry()
    text = render("t", gpus=[DraftGpu("0", None)], examples=examples(registry.names()))
    _, _, rest = text.partition("# --- Examples.")
    head, _, tail = rest.partition("# What should run where")
    shown = re.sub(r"^# ?", "", head.partition("\n")[2], flags=re.MULTILINE)
    path = tmp_path / "gpus.yaml"
    path.write_text(f"version: 1\n{shown}\n# {tail}")
    config = load(path, registry, environ={})
    built_in = set(Registry(lambda: ()).names())
    assert {model.backend for model in config.models.values()} == built_in


def test_a_plug_in_is_named() -> None:
    assert examples(["mine"]) == "models:\n  # mine: see the documentation of that plug-in\n"


COMFY = {"/opt/ComfyUI/comfy", "/opt/ComfyUI/nodes.py"}


def test_comfyui_is_known_by_its_files_and_loses_the_flags_that_are_set_for_it() -> None:
    command = ["/opt/v/bin/python", "main.py", "--listen", "0.0.0.0", "--port", "8188"]
    command += ["--highvram", "--cuda-device", "1", "--temp-directory=/tmp/x"]
    command += ["--reserve-vram", "2"]
    found = recognise(command, "/opt/ComfyUI", COMFY.__contains__)
    assert found is not None
    assert found.backend == "comfyui"
    assert found.settings == {"path": "/opt/ComfyUI", "python": "/opt/v/bin/python"}
    assert found.entry == {
        "port": 8188,
        "listen": "0.0.0.0",
        "output_directory": "/opt/ComfyUI/output",
        "input_directory": "/opt/ComfyUI/input",
        "args": ["--highvram", "--reserve-vram", "2"],
    }
    assert found.notes == (
        "Users' files and the database begin anew: each instance has its own.",
        "--cuda-device is left out: the file gives each instance its GPUs.",
        "--temp-directory is left out: each instance has its own, which every start empties.",
    )
    elsewhere = ["/usr/bin/python3", "-s", "/opt/ComfyUI/main.py", "--listen", "--lowvram"]
    found = recognise(elsewhere, "/", COMFY.__contains__)
    assert found is not None
    assert (found.entry["listen"], found.entry["args"]) == ("0.0.0.0", ["--lowvram"])
    assert found.settings["path"] == "/opt/ComfyUI"
    assert "-s is left out: Python gets no options." in found.notes
    assert recognise(command, "/opt/other", COMFY.__contains__) is None


def test_comfyui_keeps_what_has_several_values_and_its_base_directory() -> None:
    command = ["/usr/bin/python3", "main.py", "--listen", "127.0.0.1,::1"]
    command += ["--extra-model-paths-config", "/a.yaml", "/b.yaml", "--base-directory=/srv/comfy"]
    command += ["--extra-model-paths-config", "/c.yaml", "--fast"]
    found = recognise(command, "/opt/ComfyUI", COMFY.__contains__)
    assert found is not None
    assert found.entry == {
        "listen": "127.0.0.1",
        "output_directory": "/srv/comfy/output",
        "input_directory": "/srv/comfy/input",
        "extra_model_paths": ["/a.yaml", "/b.yaml", "/c.yaml"],
        "args": ["--fast", "--base-directory", "/srv/comfy"],
    }
    assert found.notes[1:] == ("It listens on ::1, too, and `listen` is one address.",)


def test_vllm_goes_on_as_a_process() -> None:
    command = ["/opt/v/bin/python", "/opt/v/bin/vllm", "serve", "Qwen/Qwen3-8B", "--port", "8000"]
    found = recognise(command, "/", lambda _path: False)
    assert found is not None
    assert (found.backend, found.name) == ("process", "Qwen3-8B")
    assert found.entry == {"start_timeout": "15m", "probe": {"http": "/health"}}
    assert recognise(["/bin/sleep", "9"], "/", lambda _path: False) is None


def test_slices_are_proposed_and_their_gpu_is_a_comment(tmp_path: Path) -> None:
    first, second = (f"MIG-f15ae56{n}-7b5c-5a0c-8ab1-3a1e0c2d9f10" for n in range(2))
    gpus = (
        Gpu("GPU-a", 0, "A100", mig=True),
        Gpu(first, 0, "A100 MIG 1g.5gb", parent="GPU-a"),
        Gpu(second, 0, "A100 MIG 1g.5gb", parent="GPU-a"),
        Gpu("GPU-b", 1, "A100"),
    )
    entry = {"backend": "process", "command": ["/bin/x"]}
    one = Proposal("x", "PID 7 (x)", entry, (second,), ("kill 7",))
    path = tmp_path / "gpus.yaml"
    text, placed = first_file(
        GpuInventory("nvml", gpus), [one], Registry(), path, from_running=True
    )
    assert placed == {"x"}
    assert text.partition("\ngpus:\n")[2] == (
        "  # GPU 0: A100, GPU-a\n"
        "  # It has MIG on: only a slice can be given a model.\n"
        "  # 0: none\n"
        f"  # Slice of GPU 0: A100 MIG 1g.5gb, {first}\n"
        f'  "{first}": none\n'
        f"  # Slice of GPU 0: A100 MIG 1g.5gb, {second}\n"
        f'  "{second}": x\n'
        "  # GPU 1: A100, GPU-b\n"
        "  1: none\n"
    )
    path.write_text(text)
    load(path, Registry(), environ={})


def test_what_no_key_says_stands_above_the_model_as_a_list(tmp_path: Path) -> None:
    inventory = GpuInventory("simulated", (Gpu("GPU-a", 0, "A100"),))
    entry = {"backend": "process", "command": ["/bin/x"]}
    one = Proposal("x", "PID 7 (x)", entry, (0,), ("kill 7",), left=("umask 0077", "b\x1b[2J"))
    text, _ = first_file(inventory, [one], Registry(), tmp_path / "gpus.yaml", from_running=True)
    head = (
        "The file has no key for what follows, and the model runs without it. If it needs that, "
        "leave it as it is, and take the model and its GPU out of this file."
    )
    assert f"{head} - umask 0077 - b" in " ".join(line.strip("# ") for line in text.splitlines())
    assert "\n  # - b\N{REPLACEMENT CHARACTER}[2J\n  x:\n" in text
