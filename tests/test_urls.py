"""Drafts and verifiers from any web server, and from whatever fsspec reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoints import DATA, VERIFIER, Copy, contents, weights
from click.testing import CliRunner
from loopback import Fault, Server, Start

from speculators import CheckpointError, ConversionResult, convert_model, validate_model
from speculators.cli import cli
from speculators.sources import cache, parts, remote, web

# Where a test looks at warnings, it would see those about files that are closed when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

Convert = Callable[..., ConversionResult]

SIZE = (DATA / "eagle3" / "pytorch_model.bin").stat().st_size


@pytest.fixture
def site(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Server:
    """A web server with a head and its verifier, which is not the Hub."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("eagle3", "verifier", "hass-layernorms"):
        shutil.copytree(DATA / name, tmp_path / "site" / name)
    server.folders["files"] = tmp_path / "site"
    return server


@pytest.fixture
def convert(site: Server, tmp_path: Path) -> Convert:
    """Convert the head of the site, without validation, into ``out``, with a cache of its own."""

    def run(model: object = None, verifier: object = None, out: str = "out", **more: Any) -> ConversionResult:
        places = (model or f"{site.url}/files/eagle3", verifier or f"{site.url}/files/verifier")
        more = {"cache_dir": tmp_path / "cache", "validate": False, "overwrite": True} | more
        return convert_model(places[0], verifier=places[1], output_path=tmp_path / out, **more)

    return run


@pytest.fixture
def local(convert: Convert, tmp_path: Path) -> bytes:
    """The weights that the same head becomes when it lies here."""
    convert(DATA / "eagle3", VERIFIER, out="local", self_contained=True)
    return weights(tmp_path / "local")


@pytest.mark.parametrize(
    ("model", "verifier"),
    [
        ("eagle3", "verifier"),
        ("eagle3/", "verifier/"),
        ("eagle3/pytorch_model.bin", "verifier/model.safetensors"),
        ("eagle3?download=true", "verifier#top"),
    ],
)
def test_a_folder_or_a_file_of_a_server_is_converted(
    model: str, verifier: str, site: Server, convert: Convert, tmp_path: Path, local: bytes
) -> None:
    result = convert(f"{site.url}/files/{model}", f"{site.url}/files/{verifier}", validate=True, self_contained=True)

    assert result.validation is not None
    assert result.validation.passed
    assert weights(tmp_path / "out") == local


def test_the_output_says_where_it_came_from(site: Server, convert: Convert, tmp_path: Path) -> None:
    convert()

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == f"{site.url}/files/verifier"
    source = json.loads((tmp_path / "out" / "provenance.json").read_text())["source"]
    assert source["url"] == f"{site.url}/files/eagle3"
    assert set(source["versions"]) == {"config.json", "pytorch_model.bin"}


def test_a_sharded_head_and_a_name_of_its_own_are_found(
    site: Server, convert: Convert, tmp_path: Path, variant: Copy, local: bytes
) -> None:
    shutil.copytree(variant("eagle3", layout="sharded-safetensors"), tmp_path / "site" / "sharded")
    (tmp_path / "site" / "eagle3" / "pytorch_model.bin").rename(tmp_path / "site" / "eagle3" / "my head+1.bin")

    convert(f"{site.url}/files/sharded", self_contained=True)
    assert weights(tmp_path / "out") == local
    convert(f"{site.url}/files/eagle3/my%20head+1.bin", self_contained=True)
    assert weights(tmp_path / "out") == local
    with pytest.raises(
        CheckpointError, match=r"files/eagle3 holds no weights: .*found config\.json; the server lists no"
    ):
        convert()


def test_what_was_fetched_is_used_until_it_changes(site: Server, convert: Convert, tmp_path: Path) -> None:
    convert(self_contained=True)
    first = site.total()
    convert(self_contained=True)
    again = site.total() - first
    config = tmp_path / "site" / "eagle3" / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"silu" '))

    convert(self_contained=True)

    assert first > 600_000
    assert again < 1000
    assert again < site.total() - first - again < 2000


def test_a_changed_file_is_not_taken_for_the_old_one(
    site: Server, convert: Convert, tmp_path: Path, variant: Copy
) -> None:
    convert()
    before = weights(tmp_path / "out")
    other = variant("eagle3", tensors={"norm.weight": torch.ones(128)}, layout="bin")
    shutil.copy(other / "pytorch_model.bin", tmp_path / "site" / "eagle3")

    convert()

    assert weights(tmp_path / "out") != before


NO_VERSION = pytest.mark.filterwarnings("ignore:.*does not say when a file changes")


@NO_VERSION
def test_what_has_no_version_is_fetched_each_time(
    site: Server, convert: Convert, tmp_path: Path, variant: Copy
) -> None:
    site.etags = False
    convert(self_contained=True)
    before = weights(tmp_path / "out")
    other = variant("eagle3", tensors={"norm.weight": torch.ones(128)}, layout="bin")
    shutil.copy(other / "pytorch_model.bin", tmp_path / "site" / "eagle3")

    convert(self_contained=True)

    assert weights(tmp_path / "out") != before
    convert(self_contained=True, offline=True, out="again")
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_of_what_has_no_version_no_parts_are_read(site: Server, convert: Convert, tmp_path: Path, local: bytes) -> None:
    site.etags = False

    with pytest.warns(UserWarning, match=r"a server that does not say when a file changes; all of 5 MB is downloaded"):
        convert(self_contained=True)

    assert weights(tmp_path / "out") == local


@NO_VERSION
def test_what_has_no_version_is_not_continued(site: Server, convert: Convert, tmp_path: Path, local: bytes) -> None:
    site.etags = False
    site.faults.append(Fault("pytorch_model.bin$", cut=100_000, skip=1))

    convert(self_contained=True)

    asked = [request.range for request in site.asked("pytorch_model.bin") if "index" not in request.path]
    assert asked == ["bytes=0-0", None, None]
    assert weights(tmp_path / "out") == local


def test_a_file_that_came_without_its_length_is_fetched_each_time(
    site: Server, convert: Convert, tmp_path: Path
) -> None:
    """Nothing tells a whole one from one whose connection was closed early."""
    site.ranges = False
    closing: dict[str, str | None] = {"Content-Length": None, "Connection": "close"}
    site.faults += [
        Fault("pytorch_model.bin$", headers=closing),
        Fault("pytorch_model.bin$", headers=closing, cut=100_000),
        Fault("pytorch_model.bin$", headers=closing, times=99),
    ]
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged"):
        convert(verifier=VERIFIER)

    assert convert(verifier=VERIFIER).algorithm == "eagle3"


@pytest.mark.parametrize("etags", [True, False])
def test_programs_at_once_share_the_cache(etags: bool, site: Server, start: Start, tmp_path: Path) -> None:
    site.etags = etags
    places = (f"{site.url}/files/eagle3", "--verifier", f"{site.url}/files/verifier", "--cache-dir", tmp_path / "cache")
    running = [
        start("convert", *places, "--self-contained", "--no-validate", "--output-path", tmp_path / f"out{number}")
        for number in range(3)
    ]

    assert [each.wait(90) for each in running] == [0, 0, 0]

    assert weights(tmp_path / "out0") == weights(tmp_path / "out1") == weights(tmp_path / "out2")


def test_offline_never_mixes_what_two_runs_saw(site: Server, convert: Convert, tmp_path: Path, variant: Copy) -> None:
    convert()
    other = variant("eagle3", config={"rms_norm_eps": 0.5}, tensors={"norm.weight": torch.ones(128)}, layout="bin")
    for file in other.iterdir():
        shutil.copy(file, tmp_path / "site" / "eagle3")
    site.faults.append(Fault("pytorch_model.bin$", times=99, status=503))
    with pytest.raises(CheckpointError, match="cannot be reached"):
        convert()

    with pytest.raises(CheckpointError, match=r"is not in the cache, and offline nothing can be fetched"):
        convert(offline=True)


def test_a_cached_conversion_needs_no_server(site: Server, convert: Convert, tmp_path: Path) -> None:
    convert(validate=True, self_contained=True)
    site.requests.clear()

    convert(validate=True, self_contained=True, out="again", offline=True)

    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    assert not site.requests


def test_offline_it_is_said_what_the_cache_has(site: Server, convert: Convert, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"eagle3/config\.json is not in the cache.*the cache has nothing\); run onc"
    ):
        convert(offline=True)
    convert()

    with pytest.raises(CheckpointError, match=r"verifier/model\.safetensors: bytes 0 to 65536 are not in the cache"):
        convert(offline=True, self_contained=True)


def test_a_server_without_ranges_is_read_whole_and_that_is_said(
    site: Server, convert: Convert, tmp_path: Path, local: bytes
) -> None:
    site.ranges = False

    with pytest.warns(
        UserWarning, match=r"verifier/model\.safetensors is on a server that sends whole files only; all of 5"
    ):
        convert(self_contained=True)

    assert weights(tmp_path / "out") == local
    site.requests.clear()
    convert(self_contained=True)  # without a warning, which would be an error
    assert all(request.range == "bytes=0-0" for request in site.requests)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("pytorch_model.bin$", cut=100_000, skip=1), id="cut in the middle"),
        pytest.param(Fault("pytorch_model.bin$", stall=200_000, skip=1), id="stalled"),
        pytest.param(Fault("pytorch_model.bin$", status=503, times=2), id="unavailable"),
        pytest.param(Fault("model.safetensors$", cut=20, skip=1), id="a cut part"),
        pytest.param(Fault("config.json$", cut=0, skip=1), id="a cut config"),
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.filterwarnings("ignore:.*sends whole files only")
def test_a_passing_fault_is_waited_out(
    ranges: bool,
    fault: Fault,
    site: Server,
    convert: Convert,
    tmp_path: Path,
    local: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web, "TIMEOUT", 0.5)
    site.ranges = ranges
    site.faults.append(Fault(**vars(fault)))

    convert(self_contained=True)

    assert site.faults[0].times == 0
    assert weights(tmp_path / "out") == local


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(
            Fault("pytorch_model.bin$", times=99, status=500),
            r"pytorch_model\.bin cannot be reached \(status 500",
            id="broken",
        ),
        pytest.param(
            Fault("config.json$", times=99, cut=0, skip=1), r"config\.json: the connection was lost", id="lost"
        ),
        pytest.param(
            Fault("pytorch_model.bin$", status=403),
            r"of which it refused pytorch_model\.bin",
            id="refused",
        ),
        pytest.param(
            Fault("pytorch_model.bin$", status=418), r"answers with status 418; expected 200 or 206", id="odd"
        ),
        pytest.param(
            Fault("pytorch_model.bin$", headers={"Content-Range": f"bytes 0-0/{SIZE + 9}"}),
            r"was changed on the server",
            id="wrong length",
        ),
        pytest.param(
            Fault("pytorch_model.bin$", headers={"ETag": '"old"'}), r"was changed on the server while", id="changed"
        ),
        pytest.param(
            Fault("pytorch_model.bin$", body=b"x", times=99, headers={"Content-Range": f"bytes 0-0/{SIZE}"}, skip=1),
            r"the server sent another part|connection was lost",
            id="truncated",
        ),
    ],
)
def test_a_lasting_fault_is_said_in_one_line(
    fault: Fault, message: str, site: Server, convert: Convert, tmp_path: Path
) -> None:
    site.faults.append(Fault(**vars(fault)))

    with pytest.raises(CheckpointError, match=message) as caught:
        convert()

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    site.faults.clear()
    assert convert().algorithm == "eagle3"


def test_a_store_that_refuses_what_it_does_not_have_is_read(
    site: Server, convert: Convert, tmp_path: Path, local: bytes
) -> None:
    """S3 answers 403 to who may not list a bucket."""
    absent = ("eagle3/model.safetensors", "index.json")
    site.faults = [Fault(f"{name}$", status=403, times=99) for name in absent]
    convert(self_contained=True)
    assert weights(tmp_path / "out") == local
    site.faults.append(Fault("pytorch_model.bin$", status=403, times=99))

    with pytest.raises(
        CheckpointError, match=r"holds no weights.*only the usual names were tried, of which it refused"
    ):
        convert()


def test_a_server_that_is_not_there_is_said(convert: Convert) -> None:
    with pytest.raises(
        CheckpointError, match=r"http://127.0.0.1:1/x/config\.json cannot be reached \(.+\), also in 2 more"
    ):
        convert("http://127.0.0.1:1/x")


def test_what_is_no_checkpoint_is_said(site: Server, convert: Convert) -> None:
    with pytest.raises(
        CheckpointError, match=r"files/nothing is no checkpoint: it has no config\.json \(found: nothing\)"
    ):
        convert(f"{site.url}/files/nothing")
    with pytest.raises(CheckpointError, match=r"files/eagle3/head\.safetensors|has no head\.safetensors"):
        convert(f"{site.url}/files/eagle3/head.safetensors")


def test_user_and_password_reach_the_server_and_nobody_else(site: Server, convert: Convert, tmp_path: Path) -> None:
    site.users["files"] = "me:p@ss w0rd"
    address = site.url.replace("://", "://me:p%40ss%20w0rd@")
    with pytest.raises(CheckpointError, match=r"the server refuses it \(status 401\); is it there\? Does it want"):
        convert()

    convert(f"{address}/files/eagle3", f"{address}/files/verifier", self_contained=True)

    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"w0rd" not in everything
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == f"{site.url}/files/verifier"


def test_a_login_of_the_hub_is_not_sent_to_others(
    site: Server, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")

    convert(token="hf_s3cret", self_contained=True)

    assert {request.authorization for request in site.requests} == {None}


@pytest.mark.parametrize("variables", [{}, {"HF_DEBUG": "1"}])
def test_no_secret_is_printed(variables: dict[str, str], site: Server, start: Start, tmp_path: Path) -> None:
    site.users["files"] = "me:other"
    address = f"{site.url.replace('://', '://me:s3cret@')}/files/eagle3?token=s3cret"
    places = (address, "--verifier", VERIFIER, "--cache-dir", tmp_path / "cache", "--output-path", tmp_path / "out")

    said = (running := start("convert", *places, **variables)).communicate(timeout=90)[1]

    assert running.returncode == 3
    assert "the server refuses it" in said
    assert "s3cret" not in said
    assert said.count("\n") == 1 or variables


@pytest.fixture
def memory() -> Iterator[Any]:
    """The driver of fsspec for memory, with a head and its verifier."""
    driver = fsspec.filesystem("memory")
    for name in ("eagle3", "verifier"):
        driver.put(f"{DATA / name}/", f"/bucket/{name}/", recursive=True)
    yield driver
    driver.rm("/bucket", recursive=True)


def test_other_schemes_are_read_by_their_driver(memory: Any, convert: Convert, tmp_path: Path, local: bytes) -> None:
    result = convert("memory://bucket/eagle3", "memory://bucket/verifier", self_contained=True, validate=True)

    assert result.validation is not None
    assert weights(tmp_path / "out") == local
    pieces = [path for path in (tmp_path / "cache").rglob("*") if path.parent.name == "pieces"]
    assert 0 < sum(path.stat().st_size for path in pieces) < (VERIFIER / "model.safetensors").stat().st_size
    again = convert(
        "memory://bucket/eagle3", "memory://bucket/verifier", self_contained=True, offline=True, out="again"
    )
    assert again.algorithm == "eagle3"
    with pytest.raises(CheckpointError, match=r"memory://bucket/nothing is no checkpoint"):
        convert("memory://bucket/nothing")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://bucket/head", r"s3://bucket/head: the driver for s3:// is not installed \(Install s3fs to access S3\)"),
        ("gs://key:s3cret@bucket/head", r"gs://bucket/head: the driver for gs:// is not installed .*gcsfs"),
        ("nonsense://key:s3cret@x/y", r"nonsense://x/y: no installed package reads nonsense://; expected a local path"),
    ],
)
def test_a_missing_driver_is_named(place: str, message: str, convert: Convert) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(place)

    assert "s3cret" not in str(caught.value)


def test_a_converted_model_on_a_server_is_validated_there(site: Server, convert: Convert, tmp_path: Path) -> None:
    convert()
    shutil.copytree(tmp_path / "out", tmp_path / "site" / "converted")
    place, base, cache = f"{site.url}/files/converted", f"{site.url}/files/verifier", tmp_path / "cache"
    prompts = [list(range(1, 9))]

    report = validate_model(place, verifier=base, source=f"{site.url}/files/eagle3", cache_dir=cache)
    measured = validate_model(place, verifier=base, level="acceptance", prompts=prompts, cache_dir=cache)

    assert report.passed
    assert measured.acceptance is not None


@pytest.mark.parametrize("named", ["http://127.0.0.1:1/secret", "/etc", "org/name", "s3://bucket/x", None, 3])
def test_a_strangers_config_does_not_choose_what_is_read(
    named: object, site: Server, convert: Convert, tmp_path: Path
) -> None:
    convert()
    shutil.copytree(tmp_path / "out", tmp_path / "site" / "converted")
    path = tmp_path / "site" / "converted" / "config.json"
    config = json.loads(path.read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = named
    path.write_text(json.dumps(config))
    expected = "pass it with --verifier if you trust|the Hub at http://127.0.0.1:9 cannot be reached|names no verifier"

    with pytest.raises(CheckpointError, match=expected):
        validate_model(f"{site.url}/files/converted", cache_dir=tmp_path / "cache")


def test_no_address_in_the_log_shows_its_secrets(
    site: Server, convert: Convert, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        convert(f"{site.url}/files/eagle3?token=s3cret", f"{site.url}/files/verifier?token=s3cret")

    assert "pytorch_model.bin" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("start", [b"<!doctype html>", b"\n <html>", b"\xef\xbb\xbf<html>"])
def test_a_page_of_html_is_no_file(start: bytes, site: Server, convert: Convert) -> None:
    """Some servers answer 200 with a page to whatever they do not have."""
    page: dict[str, str | None] = {"Content-Type": "text/html"}
    site.faults = [
        Fault(f"eagle3/model.safetensors{end}$", times=99, body=start, as_status=200, headers=page)
        for end in (".index.json", "")
    ]

    assert convert().algorithm == "eagle3"


@pytest.mark.parametrize("name", ["%2Ftmp%2Fx.bin", "..%2F..%2Fx.bin", "..%5Cx.bin", "a%00.bin", f"{'x' * 300}.bin"])
def test_a_name_that_leads_elsewhere_is_refused(name: str, site: Server, convert: Convert) -> None:
    with pytest.raises(CheckpointError, match=r"names no file"):
        convert(f"{site.url}/files/eagle3/{name}")


@pytest.mark.parametrize("file", ["config.json", "pytorch_model.bin"])
def test_a_body_without_end_is_cut_off(
    file: str, site: Server, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_JSON", 1000)
    site.ranges = False
    endless: dict[str, str | None] = {"Content-Length": None, "Connection": "close"}
    site.faults.append(Fault(f"{file}$", body=b"x" * 10_000_000, times=99, headers=endless, skip=1))

    with pytest.raises(CheckpointError, match=rf"{file}: more than \d+ bytes arrived, which it cannot have"):
        convert()


def test_a_server_that_stops_sending_parts_is_read_whole(
    site: Server, convert: Convert, tmp_path: Path, local: bytes
) -> None:
    whole = (VERIFIER / "model.safetensors").read_bytes()
    site.faults.append(
        Fault("model.safetensors$", times=2, body=whole, headers={"Content-Range": None}, skip=2, as_status=200)
    )

    with pytest.warns(UserWarning, match="sends whole files only"):
        convert(self_contained=True)

    assert weights(tmp_path / "out") == local


@pytest.mark.parametrize("name", ["pytorch_model.bin", "verifier/model.safetensors"])
def test_what_vanishes_while_it_is_read_is_said(name: str, site: Server, convert: Convert) -> None:
    site.faults = [Fault(f"{name}$", status=404, skip=1, times=99)]

    with pytest.raises(CheckpointError, match=rf"{name} was removed from the server while it was read"):
        convert(self_contained=True)


@pytest.mark.parametrize("status", [403, 404, 418, 522])
def test_what_arrived_is_kept_whatever_comes_next(
    status: int, site: Server, convert: Convert, tmp_path: Path, local: bytes
) -> None:
    refused = Fault("pytorch_model.bin$", status=status, times=6, skip=1)
    site.faults += [Fault("pytorch_model.bin$", cut=100_000, skip=1), refused]
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        convert()
    site.faults.clear()
    site.requests.clear()

    convert(self_contained=True)

    start = 0 if status == 404 else 100_000
    assert [each for each in site.asked("pytorch_model.bin") if "index" not in each.path][
        -1
    ].range == f"bytes={start}-{SIZE - 1}"
    assert weights(tmp_path / "out") == local


def test_a_cache_that_cannot_be_written_but_has_all_is_enough(
    site: Server, convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(self_contained=True, validate=True)

    def refuse(*_: object) -> None:
        raise CheckpointError("the cache cannot be written")

    monkeypatch.setattr(cache, "keep", refuse)
    monkeypatch.setattr(parts, "keep", refuse)
    convert(self_contained=True, validate=True, out="again")

    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_no_command_repeats_a_password(site: Server, tmp_path: Path) -> None:
    site.users["files"] = "me:s3cret"
    address = f"{site.url.replace('://', '://me:s3cret@')}/files/eagle3"
    reach = ["--cache-dir", str(tmp_path / "cache"), "--output-path", str(tmp_path / "out")]

    good = CliRunner().invoke(cli, ["convert", address, "--verifier", str(VERIFIER), *reach])
    wrong = CliRunner().invoke(cli, ["convert", "x", address, *reach])

    assert (good.exit_code, wrong.exit_code) == (0, 2)
    assert f"Converted {site.url}/files/eagle3 with eagle3" in good.output
    assert "Got unexpected extra argument" in wrong.output
    assert "s3cret" not in good.output + wrong.output


@pytest.mark.parametrize("host", ["...", "ü..de", "a" * 300, "[v1.x]"])
def test_an_address_that_cannot_be_one_is_said(host: str, convert: Convert) -> None:
    with pytest.raises(CheckpointError, match=r"is at no valid address|is no URL"):
        convert(f"http://{host}/x")


def test_a_redirect_to_no_address_is_said(site: Server, convert: Convert) -> None:
    site.faults.append(Fault("config.json$", body=b"", as_status=302, headers={"Location": "http://.../x"}, times=9))

    with pytest.raises(CheckpointError, match=r"config\.json is at no valid address, or redirected to one that is not"):
        convert()


@NO_VERSION
def test_offline_it_is_known_which_files_there_were(site: Server, convert: Convert, tmp_path: Path) -> None:
    site.etags = False
    convert()

    convert(offline=True, out="again")

    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_the_command_says_what_is_wrong_with_an_address(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["convert", "http://h:s3cret@[/x", "--verifier", str(VERIFIER)])

    assert (result.exit_code, result.output.count("\n")) == (3, 1)
    assert "s3cret" not in result.output
