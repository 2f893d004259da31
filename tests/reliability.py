"""Every bad input, fault and hostile file that the page on reliability names, and how each is brought about.

`INPUTS` are carried out by ``test_reliability.py``; of `FAULTS`, each names the test that proves it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoints import DATA, VERIFIER, Tensors, read_tensors
from safetensors.torch import save_file

Damage = Callable[["Workplace"], list[str]]


@dataclass
class Workplace:
    """A folder with a sound ``head``, its verifier ``base``, and an earlier output ``out``."""

    folder: Path

    def fill(self) -> None:
        """Copy what is needed, with the head as safetensors."""
        for name, origin in (("head", DATA / "eagle3"), ("base", VERIFIER)):
            shutil.copytree(origin, self.folder / name, ignore=shutil.ignore_patterns("golden", "*.bin"))
        save_file(read_tensors(DATA / "eagle3"), self.weights)

    @property
    def weights(self) -> Path:
        """The head's weight file."""
        return self.folder / "head" / "model.safetensors"

    def tensors(self, **changes: torch.Tensor | None) -> list[str]:
        """Change tensors of the head; two underscores in a keyword are a dot."""
        found: Tensors = read_tensors(self.folder / "head")
        found |= {name.replace("__", "."): value for name, value in changes.items()}  # type: ignore[dict-item]
        save_file({name: value for name, value in found.items() if value is not None}, self.weights)
        return []

    def pickled(self, content: object) -> list[str]:
        """Have the head be a pickle."""
        self.weights.unlink()
        torch.save(content, self.folder / "head" / "pytorch_model.bin")
        return []

    def config(self, name: str = "head", **changes: Any) -> list[str]:
        """Change a config."""
        path = self.folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return []

    def text(self, name: str, text: str) -> list[str]:
        """Replace a file."""
        (self.folder / name).write_text(text)
        return []

    def header(self, change: Callable[[dict[str, Any]], object]) -> list[str]:
        """Change the header of the head's weight file, and leave the rest as it is."""
        data = self.weights.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        self.raw_header(json.dumps(header))
        return []

    def raw_header(self, text: str) -> list[str]:
        """Put another header before the data."""
        data = self.weights.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        self.weights.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data[8 + size :])
        return []

    def file(self) -> str:
        """Make a file of the user's and return its name."""
        (self.folder / "thesis.tex").write_text("years of work")
        return "thesis.tex"

    def index(self, shard: str) -> list[str]:
        """Have an index say where the tensors are."""
        elsewhere = self.weights.rename(self.folder / "secret.safetensors")
        names = json.dumps({"weight_map": dict.fromkeys(read_tensors(DATA / "eagle3"), shard)})
        if shard == "link.safetensors":
            (self.folder / "head" / shard).symlink_to(elsewhere)
        return self.text("head/model.safetensors.index.json", names)


class Payload:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Ask the unpickler to create it."""
        return os.mkdir, ("executed",)


def bomb(place: Workplace) -> list[str]:
    """Pack a gigabyte of zeros into a megabyte."""
    place.pickled({"a": torch.ones(2)})
    path = place.folder / "head" / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("pytorch_model/data.pkl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pytorch_model/data.pkl", pickled)
        with archive.open("pytorch_model/data/0", "w") as entry:
            for _ in range(64):
                entry.write(bytes(1 << 20))
    return []


def inside_out(place: Workplace) -> list[str]:
    """Let the head's weights be a link into the output that would be replaced."""
    place.weights.unlink()
    place.weights.symlink_to(place.folder / "out" / "model.safetensors")
    return []


def poison(tensors: Tensors) -> torch.Tensor:
    """Return a norm with one value that is no number."""
    norm = tensors["norm.weight"].clone()
    norm[3] = float("nan")
    return norm


def overlap(header: dict[str, Any]) -> None:
    """Let one tensor begin within another."""
    entry = header["norm.weight"]
    entry["data_offsets"] = [place - 2 for place in entry["data_offsets"]]


def second_layer(place: Workplace) -> list[str]:
    """Give the head another decoder layer."""
    found = read_tensors(DATA / "eagle3")
    more = {name.replace("midlayer", "layers.1"): found[name].clone() for name in found if "midlayer" in name}
    return place.tensors(**more)


def twice(place: Workplace) -> list[str]:
    """Store one tensor under both of its names."""
    found = read_tensors(DATA / "eagle3")
    return place.tensors(layers__0__mlp__up_proj__weight=found["midlayer.mlp.up_proj.weight"].clone())


@dataclass(frozen=True)
class Input:
    """Something that is wrong, how it comes about, and what the user sees."""

    what: str
    bring: Damage
    message: str
    code: int


NORM = read_tensors(DATA / "eagle3")["norm.weight"]

INPUTS = (
    Input("a tensor is missing", lambda place: place.tensors(norm__weight=None), "missing: norm.weight [H] = [128]", 3),
    Input("a tensor that nobody knows", lambda place: place.tensors(extra=torch.ones(1)), "matches no row", 3),
    Input("a tensor of another shape", lambda place: place.tensors(norm__weight=torch.ones(64).half()), "[64]", 3),
    Input("a tensor of integers", lambda place: place.tensors(norm__weight=NORM.long()), "norm.weight is I64", 3),
    Input(
        "NaN or infinity in a weight",
        lambda place: place.tensors(norm__weight=poison({"norm.weight": NORM})),
        "norm.weight holds 1 values that are NaN or infinite",
        4,
    ),
    Input("a second decoder layer", second_layer, "layers.1", 3),
    Input("both `midlayer.` and `layers.0.`", twice, "only one can be meant", 3),
    Input(
        "draft tokens outside of the vocabulary (`d2t`)",
        lambda place: place.tensors(d2t=torch.full((64,), 9999)),
        "d2t",
        3,
    ),
    Input(
        "no draft tokens at all (`t2d`)", lambda place: place.tensors(t2d=torch.zeros(256, dtype=torch.bool)), "t2d", 3
    ),
    Input("a verifier of another hidden size", lambda place: place.config("base", hidden_size=64), "64", 3),
    Input(
        "layers that the verifier does not have",
        lambda place: place.config(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 99]}),
        "99",
        3,
    ),
    Input(
        "a `.bin` in which the weights are nested",
        lambda place: place.pickled({"state_dict": {"a": NORM}}),
        "expected a flat dict of names and tensors",
        3,
    ),
    Input(
        "a pickle that would run code",
        lambda place: place.pickled({"a": Payload()}),
        "its pickle asks for posix.mkdir",
        3,
    ),
    Input("a compressed file that unfolds to much more", bomb, "it is compressed and would take", 3),
    Input(
        "weights that are cut short",
        lambda place: place.weights.write_bytes(place.weights.read_bytes()[:-1]) and [],
        "is damaged or incomplete",
        3,
    ),
    Input(
        "a header that promises more than there is",
        lambda place: place.weights.write_bytes(struct.pack("<Q", 1 << 60) + place.weights.read_bytes()[8:]) and [],
        "promise a header of",
        3,
    ),
    Input("tensors that overlap", lambda place: place.header(overlap), "is damaged: tensor", 3),
    Input(
        "bytes that belong to no tensor",
        lambda place: place.header(lambda header: header.pop("norm.weight")),
        "is damaged",
        3,
    ),
    Input(
        "a negative shape",
        lambda place: place.header(lambda header: header["norm.weight"].update(shape=[-128])),
        "is damaged: tensor 'norm.weight'",
        3,
    ),
    Input(
        "a shape of more than there can be",
        lambda place: place.header(lambda header: header["norm.weight"].update(shape=[10**30])),
        "malformed header entry for tensor",
        3,
    ),
    Input(
        "a dtype that nobody knows",
        lambda place: place.header(lambda header: header["norm.weight"].update(dtype="F3")),
        "a dtype that is not supported",
        3,
    ),
    Input(
        "a header that says a name twice",
        lambda place: place.raw_header('{"a": {}, "a": []}'),
        "it says 'a' twice, and differently",
        3,
    ),
    Input(
        "JSON that is nested too deep",
        lambda place: place.text("head/config.json", '{"a":' * 99999),
        "it is nested too deep",
        3,
    ),
    Input(
        "JSON that is too large",
        lambda place: place.text("head/config.json", " " * (33 << 20)),
        "more than any config, header or index",
        3,
    ),
    Input(
        "an index that leads out with `..`",
        lambda place: place.index("../secret.safetensors"),
        "shards must lie beside their index",
        3,
    ),
    Input(
        "an index that leads out with a path",
        lambda place: place.index(f"{place.folder}/secret.safetensors"),
        "shards must lie beside their index",
        3,
    ),
    Input(
        "an index that leads out through a link", lambda place: place.index("link.safetensors"), "outside its folder", 3
    ),
    Input(
        "control characters in a name",
        lambda place: place.tensors(**{"\x1b[31mred\u202e": torch.ones(1)}),
        "\\x1b[31mred\\u202e",
        3,
    ),
    Input(
        "a draft that is converted already",
        lambda place: (
            shutil.rmtree(place.folder / "head")
            or (shutil.copytree(place.folder / "out", place.folder / "head") and [])
        ),
        "in the speculators format already",
        3,
    ),
    Input("an algorithm that is not installed", lambda place: ["--algorithm", "medusa"], "no algorithm 'medusa'", 3),
    Input(
        "an option that the algorithm does not have",
        lambda place: ["--algorithm-kwargs", '{"x": 1}'],
        "has no option 'x'",
        2,
    ),
    Input(
        "a device that torch does not know",
        lambda place: ["--validate-device", "tpu9"],
        "the device 'tpu9' cannot be used",
        2,
    ),
    Input("an output path that is a file", lambda place: ["--output-path", place.file()], "is no folder", 5),
    Input(
        "an output that is its own source", lambda place: ["--output-path", "head"], "would replace its own source", 5
    ),
    Input("an output in its own source", lambda place: ["--output-path", "head/out"], "would lie in its own source", 5),
    Input("a source that is linked into the output", inside_out, "would replace its own source", 5),
    Input(
        "an output that holds something else",
        lambda place: place.text("out/thesis.tex", "years of work"),
        "is not overwritten; move it away first",
        5,
    ),
    Input(
        "a Hub that does not answer, and nothing in the cache",
        lambda place: ["--offline", "--verifier", "org/unheard-of"],
        "nothing of org/unheard-of is in the cache",
        5,
    ),
)


@dataclass(frozen=True)
class Trouble:
    """Something that happens while a conversion runs, and the test that proves what is said about it."""

    what: str
    sees: str
    code: str
    disk: str
    test: str


FAULTS = (
    Trouble(
        "killed (`kill -9`, out of memory), at any moment",
        "nothing",
        "137",
        "the previous output, or the new one, whole; a hidden folder, which the next run removes",
        "test_a_run_that_is_killed_anywhere_leaves_the_old_or_the_new_output_or_none",
    ),
    Trouble(
        "killed, where two folders cannot take each other's place in one step",
        "nothing",
        "137",
        "as above, or for a moment nothing: the next run puts the previous output back",
        "test_a_run_that_is_killed_anywhere_leaves_the_old_or_the_new_output_or_none",
    ),
    Trouble(
        "Ctrl-C, `SIGTERM`, `SIGHUP`",
        "`Interrupted; nothing half-written is left`",
        "130, 143, 129",
        "the previous output, or the new one, whole",
        "test_a_run_that_is_asked_to_end_tidies_up",
    ),
    Trouble(
        "power is lost",
        "nothing",
        "",
        "the same: files are on the disk before the output takes its place, and it is before another is removed",
        "test_what_is_on_the_disk_before_what_relies_on_it",
    ),
    Trouble(
        "the disk is full, a quota is reached, or it fails, once",
        "`cannot write out: …`",
        "5",
        "the previous output",
        "test_a_call_that_the_filesystem_refuses_is_one_line_and_changes_nothing",
    ),
    Trouble(
        "the disk takes nothing more",
        "`cannot write out: …; nothing was kept`",
        "5",
        "the previous output",
        "test_a_disk_that_takes_nothing_more_is_one_line_and_changes_nothing",
    ),
    Trouble(
        "a small disk is full, has no inodes left, or is read-only",
        "`cannot write out: …`",
        "5",
        "nothing",
        "test_a_disk_that_is_full_or_read_only_is_one_line",
    ),
    Trouble(
        "a limit on the size of files, or of memory",
        "`cannot write out: …`, `out of memory`",
        "5",
        "nothing",
        "test_a_limit_that_the_system_sets_is_one_line",
    ),
    Trouble(
        "the source or the verifier changes while it is read",
        "`… was changed while it was read`",
        "3",
        "the previous output",
        "test_a_source_that_changes_while_it_is_read_is_refused",
    ),
    Trouble(
        "another conversion writes to the same path",
        "`another conversion is writing to out`",
        "5",
        "the output of the other",
        "test_two_runs_to_one_path_do_not_mix",
    ),
)
