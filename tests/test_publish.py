"""Pushing: the Hub serves afterwards what was written here, and keeps what is not ours."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, VERIFIER, contents
from click.testing import CliRunner, Result
from loopback import Fault, Server

from speculators import ConversionResult, PublishError, UploadError, convert_model
from speculators.cli import cli
from speculators.errors import UnavailableError
from speculators.sources import remote

TOKEN = "hf_secret"
HEAD, BASE = "org/head", "org/base"
ATTRIBUTES = ".gitattributes"

Push = Callable[..., ConversionResult]


@pytest.fixture
def hub(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A Hub with a head, its verifier and a user, whose faults are soon over."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    server.add(HEAD, DATA / "eagle3")
    server.add(BASE, VERIFIER)
    server.login(TOKEN, "me", "team")
    return server


@pytest.fixture
def push(hub: Server, tmp_path: Path) -> Push:
    """Convert and push, without validation, into ``out``."""

    def run(repository: str = "me/new", **more: Any) -> ConversionResult:
        common = {"token": TOKEN, "cache_dir": tmp_path / "cache", "validate": False, "overwrite": True}
        places = {"model": HEAD, "verifier": BASE, "output_path": tmp_path / "out"}
        return convert_model(**{**places, **common, **more}, push_to_hub=repository)

    return run


def command(*arguments: object) -> Result:
    """Run the command line."""
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def served(hub: Server, name: str = "me/new") -> dict[str, bytes]:
    """Return what the Hub serves but for its own file."""
    return {name: data for name, data in hub.files(name).items() if name != ATTRIBUTES}


@pytest.mark.parametrize(("given", "name"), [("me/new", "me/new"), ("new", "me/new"), ("team/new", "team/new")])
def test_the_hub_serves_what_was_written(given: str, name: str, hub: Server, push: Push, tmp_path: Path) -> None:
    result = push(given)

    assert result.pushed_to == f"{hub.url}/{name}"
    assert served(hub, name) == contents(tmp_path / "out")
    assert f"vllm serve {name}\n" in (tmp_path / "out" / "README.md").read_text()
    assert hub.repos[name].private is False
    commit = hub.repos[HEAD].refs["main"]
    assert hub.repos[name].messages == [f"Convert {HEAD}@{commit} with speculators 1.0.0, speculators-eagle3 1.0.0"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_pushes_and_what_was_pushed_is_valid(hub: Server, tmp_path: Path) -> None:
    reaching = ("--token", TOKEN, "--cache-dir", tmp_path / "cache")
    out = ("--output-path", tmp_path / "out", "--no-validate")

    done = command("convert", HEAD, "--verifier", BASE, *out, "--push-to-hub", "me/new", "--private", *reaching)

    assert done.exit_code == 0, done.output
    assert f"Wrote {tmp_path / 'out'}\nPushed to {hub.url}/me/new\n" in done.output
    assert TOKEN not in done.output
    assert hub.repos["me/new"].private
    checked = command("validate", "me/new", "--level", "structure", *reaching)
    assert checked.exit_code == 0, checked.output
    assert "files      passed" in checked.output
    document = command(
        "convert", HEAD, "--verifier", BASE, *out, "--overwrite", "--push-to-hub", "me/new", "--json", *reaching
    )
    assert json.loads(document.stdout)["pushed_to"] == f"{hub.url}/me/new"


def test_a_converted_model_is_replaced_with_nothing_of_it_left(hub: Server, push: Push, tmp_path: Path) -> None:
    push(max_shard_size="100KB")
    assert "model.safetensors.index.json" in served(hub)

    push()

    assert served(hub) == contents(tmp_path / "out")


def test_a_card_that_somebody_changed_stays(hub: Server, push: Push, tmp_path: Path) -> None:
    push()
    card = hub.repos["me/new"].commits[hub.repos["me/new"].refs["main"]] / "README.md"
    card.write_text(card.read_text().replace("license", "LICENSE"))

    result = push(dtype="float32")

    assert result.notes[-1] == "README.md of me/new was changed by somebody and is left as it is"
    assert b"LICENSE" in served(hub)["README.md"]
    assert served(hub)["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_verifier_that_others_do_not_have_is_told(push: Push) -> None:
    result = push(verifier=VERIFIER)

    assert f"config.json names the verifier by a path that others do not have, {VERIFIER}" in result.notes[-1]


@pytest.mark.parametrize(
    ("repository", "more", "message"),
    [
        ("a/b/c", {}, "'a/b/c' is no repository that can be pushed to; expected org/name"),
        ("me/name@main", {}, "is no repository that can be pushed to"),
        ("me/name.git", {}, "is no repository that can be pushed to"),
        ("https://user:secret@host/x", {}, "'https://host/x' is no repository"),
        ("me/new", {"offline": True}, "offline, nothing can be pushed to me/new"),
        ("me/new", {"token": None}, "needs a token that may write"),
        ("me/new", {"token": "hf_wrong"}, r"does not accept the token \(status 401\)"),
        ("me/new", {"token": "hf_reader"}, "the token may only read"),
        (
            "them/new",
            {},
            "belongs to them, and the token is that of me, a member of team; name a repository such as me/n",
        ),
        ("me/public", {"private": True}, "is there already and is public"),
        ("me/other", {}, "holds something other than a converted model"),
        ("me/pickled", {}, "has pytorch_model.bin, which engines would load"),
    ],
)
def test_what_can_be_known_is_said_before_anything_is_converted(
    repository: str, more: dict[str, Any], message: str, hub: Server, push: Push, tmp_path: Path
) -> None:
    hub.login("hf_reader", "me", role="read")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("# Mine\n")
    for name, folder in (("public", empty), ("other", VERIFIER), ("pickled", DATA / "eagle3")):
        hub.add(f"me/{name}", folder)
    before = {name: dict(repo.refs) for name, repo in hub.repos.items()}

    with pytest.raises(PublishError, match=message) as caught:
        push(repository, **more)

    assert caught.value.exit_code == 3
    assert caught.value.result is None
    assert not (tmp_path / "out").exists()
    assert {name: repo.refs for name, repo in hub.repos.items()} == before
    assert "secret" not in str(caught.value)


def test_private_alone_is_wrong_usage(tmp_path: Path) -> None:
    done = command("convert", DATA / "eagle3", "--verifier", VERIFIER, "--output-path", tmp_path / "out", "--private")

    assert done.exit_code == 2
    assert "name one to push to (--push-to-hub)" in done.output


def test_a_hub_that_is_away_is_told_before_anything_is_converted(hub: Server, push: Push, tmp_path: Path) -> None:
    hub.faults.append(Fault("whoami", times=9, status=503))

    with pytest.raises(UnavailableError, match=r"cannot be reached \(status 503\), also in 2 more attempts"):
        push()

    assert not (tmp_path / "out").exists()


def test_an_upload_that_breaks_off_is_tried_again(hub: Server, push: Push, tmp_path: Path) -> None:
    hub.faults.append(Fault("/upload/", cut=1000, methods=("PUT",)))

    push()

    assert len(hub.asked("/upload/", "PUT")) == 2
    assert served(hub) == contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (Fault("/upload/", status=403, methods=("PUT",)), UploadError, "answers with status 403"),
        (Fault("/commit/main", cut=100, methods=("POST",)), UploadError, "cannot be reached"),
        (Fault("/commit/main", status=500, methods=("POST",)), UploadError, r"cannot be reached \(status 500\)"),
        (Fault("/commit/main", status=412, methods=("POST",)), UploadError, "changed by somebody else meanwhile"),
        (Fault("/preupload/main", status=403, methods=("POST",)), PublishError, "may not write to me/new"),
        (Fault("/repos/create", status=403, methods=("POST",)), PublishError, "may not write to me/new"),
    ],
)
def test_a_failed_upload_leaves_the_output_and_the_way_to_try_again(
    fault: Fault, kind: type[PublishError], message: str, hub: Server, push: Push, tmp_path: Path
) -> None:
    hub.faults.append(fault)

    with pytest.raises(kind, match=message) as caught:
        push()

    said = str(caught.value)
    assert caught.value.exit_code == (5 if kind is UploadError else 3)
    assert f"The output is complete in {tmp_path / 'out'}, only its upload failed. Try again with" in said
    assert TOKEN not in said
    assert "Amz" not in said
    assert caught.value.result is not None
    assert caught.value.result.output_path == tmp_path / "out"
    assert "me/new" not in hub.repos or not served(hub)
    complete = contents(tmp_path / "out")
    push()
    assert served(hub) == contents(tmp_path / "out") == complete


def test_the_command_that_is_told_uploads_the_same(hub: Server, push: Push, tmp_path: Path) -> None:
    push(max_shard_size="100KB")
    hub.faults.append(Fault("/commit/main", status=500, methods=("POST",)))
    arguments = ("--overwrite", "--push-to-hub", "me/new", "--token", TOKEN, "--cache-dir", tmp_path / "cache")

    done = command("convert", HEAD, "--verifier", BASE, "--output-path", tmp_path / "out", "--no-validate", *arguments)

    assert done.exit_code == 5
    assert f"Wrote {tmp_path / 'out'}\n" in done.stdout
    told = shlex.split(done.stderr.splitlines()[-1])
    assert told[:5] == ["hf", "upload", "me/new", str(tmp_path / "out"), "."]
    program = shutil.which("hf", path=str(Path(sys.executable).parent))
    assert program is not None
    environment = {**os.environ, "HF_TOKEN": TOKEN}
    subprocess.run([program, *told[1:]], check=True, capture_output=True, env=environment)
    assert served(hub) == contents(tmp_path / "out")


def test_a_repository_that_changes_meanwhile_is_not_overwritten(hub: Server, push: Push, tmp_path: Path) -> None:
    push()
    theirs = tmp_path / "theirs"
    shutil.copytree(DATA / "eagle3", theirs, ignore=shutil.ignore_patterns("golden"))

    def meanwhile(task: str, done: int, total: int) -> None:
        if task.startswith("uploading"):
            hub.add("me/new", theirs)

    with pytest.raises(UploadError, match="changed by somebody else meanwhile"):
        push(dtype="float32", progress=meanwhile)

    assert served(hub) == contents(theirs)


def test_a_model_that_no_conversion_wrote_is_not_replaced(hub: Server, push: Push, tmp_path: Path) -> None:
    push("me/new")
    trained = tmp_path / "trained"
    shutil.copytree(tmp_path / "out", trained)
    (trained / "provenance.json").unlink()
    before = hub.add("me/trained", trained)

    with pytest.raises(PublishError, match=r"that no conversion wrote \(it has no provenance\.json\)"):
        push("me/trained", output_path=tmp_path / "fresh")

    assert hub.repos["me/trained"].refs["main"] == before
    assert not (tmp_path / "fresh").exists()
