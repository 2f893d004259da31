"""What a user means by the place of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from speculators import CheckpointError
from speculators.sources.locations import (
    HubLocation,
    LocalLocation,
    Location,
    UrlLocation,
    parse,
    redacted,
    redacted_text,
)

HUB = "https://huggingface.co"
MIRROR = "http://mirror.example:8080/hf"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and the public Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubLocation("org/name")),
        ("gpt2", HubLocation("gpt2")),
        ("org/name@main", HubLocation("org/name", "main")),
        ("org/name@refs/pr/1", HubLocation("org/name", "refs/pr/1")),
        ("org/name@feature/x:sub/folder", HubLocation("org/name", "feature/x", "sub/folder")),
        ("org/name:sub/folder/", HubLocation("org/name", None, "sub/folder")),
        ("org/name:sub/model.safetensors", HubLocation("org/name", None, "sub/model.safetensors")),
        ("hf://org/name", HubLocation("org/name")),
        ("hf://models/org/name/", HubLocation("org/name")),
        ("hf://gpt2", HubLocation("gpt2")),
        ("hf://org/name/sub/folder", HubLocation("org/name", None, "sub/folder")),
        ("hf://org/name@v1/sub", HubLocation("org/name", "v1", "sub")),
        ("hf://org/name@refs/pr/12/sub", HubLocation("org/name", "refs/pr/12", "sub")),
        ("hf://org/name@refs%2Fpr%2F12/sub", HubLocation("org/name", "refs/pr/12", "sub")),
        ("hf://org/name@feature%2Fx/sub", HubLocation("org/name", "feature/x", "sub")),
        ("hf://org/name/a%20b/c@d", HubLocation("org/name", None, "a%20b/c@d")),
        ("https://huggingface.co/org/name", HubLocation("org/name")),
        ("https://huggingface.co/org/name/", HubLocation("org/name")),
        ("https://hf.co/gpt2", HubLocation("gpt2")),
        ("https://huggingface.co/gpt2/tree/main", HubLocation("gpt2", "main")),
        ("https://huggingface.co/org/name/tree/v1.0", HubLocation("org/name", "v1.0")),
        ("https://huggingface.co/org/name/tree/main/a/b", HubLocation("org/name", "main", "a/b")),
        ("https://huggingface.co/org/name/tree/feature%2Fx/a", HubLocation("org/name", "feature/x", "a")),
        ("https://huggingface.co/org/name/tree/refs/pr/3/a", HubLocation("org/name", "refs/pr/3", "a")),
        ("https://huggingface.co/org/name/blob/main/x.bin?download=true", HubLocation("org/name", "main", "x.bin")),
        ("https://huggingface.co/org/name/resolve/abc/x.safetensors", HubLocation("org/name", "abc", "x.safetensors")),
        ("https://host/base", UrlLocation("https://host/base", "https://host/base")),
        ("https://u:p%40@host/a?v=1#top", UrlLocation("https://host/a?v=1", "https://host/a", "u:p@")),
        ("s3://bucket/base", UrlLocation("s3://bucket/base", "s3://bucket/base")),
        ("file:///data/my%20head", LocalLocation(Path("/data/my head"), "/data/my head")),
        ("file://localhost/data", LocalLocation(Path("/data"), "/data")),
        ("file:/data/head", LocalLocation(Path("/data/head"), "/data/head")),
        (" org/name ", HubLocation("org/name")),
        ("C:\\heads\\best", LocalLocation(Path("C:\\heads\\best"), "C:\\heads\\best")),
        ("C:/heads", LocalLocation(Path("C:/heads"), "C:/heads")),
        ("./org/name", LocalLocation(Path("org/name"), "./org/name")),
        ("/data/head", LocalLocation(Path("/data/head"), "/data/head")),
        ("a/b/c", LocalLocation(Path("a/b/c"), "a/b/c")),
        ("../heads", LocalLocation(Path("../heads"), "../heads")),
    ],
)
def test_every_form_has_one_meaning(text: str, expected: Location) -> None:
    assert parse(text) == replace(expected, **({} if ":/" in text and text[1] != ":" else {"bare": True}))


def test_what_exists_here_is_local(working_folder: Path) -> None:
    for name in ("org/name", "head", "name@v1", "org/name:sub"):
        (working_folder / name).mkdir(parents=True)

        assert parse(name) == LocalLocation(Path(name), name, bare=True)


def test_a_path_object_is_local_in_any_case() -> None:
    assert parse(Path("org/name")) == LocalLocation(Path("org/name"), "org/name")


def test_the_home_folder_is_known(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(working_folder))

    assert parse("~/head") == LocalLocation(working_folder / "head", str(working_folder / "head"), bare=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubLocation("org/name", endpoint=MIRROR, bare=True)),
        (f"{MIRROR}/org/name/tree/main/a", HubLocation("org/name", "main", "a", MIRROR)),
        ("https://huggingface.co/org/name", HubLocation("org/name", endpoint=MIRROR)),
        ("hf://org/name", HubLocation("org/name", endpoint=MIRROR)),
        ("http://mirror.example:8080/other", UrlLocation(*2 * ("http://mirror.example:8080/other",))),
        ("https://mirror.example/hf/org/name", UrlLocation(*2 * ("https://mirror.example/hf/org/name",))),
    ],
)
def test_a_mirror_takes_the_place_of_the_hub(text: str, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{MIRROR}/")

    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf://datasets/org/name", "names one of the Hub's datasets; expected a repository of models"),
        ("https://huggingface.co/datasets/org/name", "is no page of a repository of models"),
        ("https://huggingface.co/", "is no page of a repository of models"),
        ("https://huggingface.co/org/name/discussions/3", "is no folder or file of a repository"),
        ("https://huggingface.co/org/name/tree", "names no revision"),
        ("hf://", "expected org/name"),
        ("org/name@../../x", "expected org/name"),
        ("org/name@/etc/passwd", "expected org/name"),
        ("hf://org/name@a%2F..%2F..%2Fb", "expected org/name"),
        ("https://huggingface.co/org/name/tree/..%2F..%2Fx", "expected org/name"),
        ("org/name@..\\x", "expected org/name"),
        ("hf://org/name@", "expected org/name"),
        ("org/na--me", "expected org/name"),
        ("org/name:../other", "expected org/name"),
        ("hf://org/name/a/../../b", "expected org/name"),
        ("https://huggingface.co/org/name/tree/main/../x", "expected org/name"),
        ("http://", "names no server"),
        ("", "'' is no place of a checkpoint; expected a path, a Hugging Face ID or a URL"),
        (" ", "is no place of a checkpoint"),
        ("https:/host/x", "'https:/' is no place of a checkpoint; write https://"),
        ("reference://x/y", "reference:// with another address in it is not read"),
        ("simplecache::s3://bucket/x", "simplecache:// with another address in it is not read"),
        ("org/name@", "is no Hugging Face ID; expected org/name, org/name@revision or org/name:folder"),
        ("org/name:", "is no Hugging Face ID"),
        ("org/na\nme", "is no place of a checkpoint"),
        ("file://", "names no path"),
        ("https://huggingface.co", "is no page of a repository of models"),
        ("s3://bucket/x::http://host/y", "with another address in it is not read"),
        ("s3://", "s3:// names no place; expected s3://…/FOLDER"),
        ("http://host:port/x", "is no URL"),
        ("http://[::1/x", "is no URL"),
        ("file://other/data", "names the machine 'other'"),
        ("~nobody-of-this-name/x", "nobody-of-this-name"),
    ],
)
def test_what_has_no_meaning_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:secret@host:8/a/b?x=1&y=2#z", "https://host:8/a/b"),
        ("https://host/a?X-Amz-Credential=c&X-Amz-Signature=secret", "https://host/a"),
        ("https://host/a?secret", "https://host/a"),
        ("https://host/a?sig=secret&se=2026", "https://host/a"),
        ("https://secret@host/a", "https://host/a"),
        ("https://host:80/a@b/c", "https://host:80/a@b/c"),
        ("http://[::1]:8000/a", "http://[::1]:8000/a"),
        ("http://user:secret@[2001:db8::1]/a", "http://[2001:db8::1]/a"),
        ("http://host/a::b", "http://host/a::b"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("sftp://me@host/a", "sftp://me@host/a"),
        ("hdfs:///user/me/head", "hdfs:///user/me/head"),
        ("memory:///a", "memory:///a"),
    ],
)
def test_secrets_of_an_address_are_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert parse(url).name == shown
    assert "secret" not in repr(parse(url))


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@host:port/x",
        "http://user:secret@[::1/x?token=secret",
        "s3://key:se/cret-secret@bucket/x",
        "http://user:secret#x@host/x",
        "http://user:secret/@host/x",
        "http:/user:secret@host/x",
        "file://user:secret@host/x",
        "hf://user:secret@-org/name",
        "hf://datasets/x?secret",
        "zip://x::s3://key:secret@bucket/x.zip",
        "simplecache::s3://key:secret@bucket/x",
        "user:secret@host:80/x",
    ],
)
def test_not_even_of_one_that_cannot_be_read(url: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(url)

    assert "secret" not in str(caught.value)


def test_a_folder_whose_name_ends_in_a_blank_is_found(working_folder: Path) -> None:
    (working_folder / "head ").mkdir()

    assert parse("head ") == LocalLocation(Path("head "), "head ", bare=True)


def test_an_address_in_a_text_is_redacted() -> None:
    text = "Got unexpected argument (http://me:se)cret@host/x) and 's3://k:secret@b/y?token=secret'"

    assert redacted_text(text) == "Got unexpected argument (http://host/x) and 's3://b/y'"


@pytest.mark.parametrize("endpoint", ["huggingface.co", "nonsense", "ftp://host", "http://", "me:secret@host"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)

    with pytest.raises(CheckpointError, match=r"HF_ENDPOINT is '\S+'; expected an address such as https") as caught:
        parse("org/name")

    assert "secret" not in str(caught.value)


def test_a_password_of_the_endpoint_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@mirror")

    found = parse("org/name")

    assert isinstance(found, HubLocation)
    assert (found.hub, found.page) == ("http://mirror", "http://mirror/org/name")
    assert "secret" not in repr(found)
