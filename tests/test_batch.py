"""Many checkpoints at once: what a file of jobs says, what is done again and what is not, and how it ends."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from checkpoints import DATA, TRAINED, VERIFIER, contents
from click.testing import CliRunner, Result
from loopback import Fault, Server, Start, wait_for
from snippets import elsewhere

from speculators import Job, MismatchError, OptionError, SpeculatorsError, convert_model, executors, read_jobs, run_jobs
from speculators.cli import cli
from speculators.errors import ExecutorError
from speculators.executors import Processes, dask
from speculators.guard import HookError


class AtOnce(Executor):
    """Does what it is given before it answers."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def write(path: Path, jobs: object, **more: object) -> Path:
    path.write_text(json.dumps({"jobs": jobs, **more}))
    return path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_jobs_are_defaults_and_what_each_says_itself(tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text("""
        defaults:
          verifier: base
          dtype: float16
          validate: no
          algorithm_kwargs: {speculative_tokens: 5}
        jobs:
          - {model: org/one@main, output_path: out/one}
          - model: two
            output_path: out/two
            dtype: bfloat16
            algorithm_kwargs: {norm_output: true}
    """)

    one, two = read_jobs(file, {"dtype": "float32", "overwrite": True, "verifier": "other"})

    assert (one.model, one.verifier, one.dtype, one.validation, one.overwrite) == (
        "org/one@main",
        "base",
        "float16",
        False,
        True,
    )
    assert (two.dtype, two.algorithm_kwargs) == ("bfloat16", {"norm_output": True})
    assert one.arguments()["speculative_tokens"] == 5
    said = {"verifier": "base", "dtype": "float16", "algorithm_kwargs": {"speculative_tokens": 5}}
    assert one == Job(model="org/one@main", output_path=Path("out/one"), validate=False, overwrite=True, **said)


JOB = "{model: m, verifier: v, output_path: o"

WRONG = [
    ("", "is missing, expected defaults and jobs"),
    ("[1]", "is a list, expected defaults and jobs"),
    ("jobs: []", "jobs is empty, expected a list of at least one job"),
    ("jobs: {a: 1}", "jobs is a dict, expected a list"),
    (f"jobs: [{JOB}}}]\nmore: 1", "has more beside what was expected: defaults and jobs"),
    (f"jobs: [{JOB}}}]\ndefaults: 3", "defaults is a int, expected keys and values"),
    (f"jobs: [{JOB}}}]\ndefaults: {{dtyp: 1}}", "    defaults: there is no key 'dtyp'; expected algorithm, "),
    (f"jobs: [{JOB}}}, 7]", "    job 2 is a int, expected keys and values"),
    ("jobs: [{model: m, output_path: o}]", "    job 1: verifier is missing"),
    (f"jobs: [{JOB}, token: hf_secret}}]", "    job 1: there is no key 'token'; expected algorithm, "),
    (f"jobs: [{JOB}, offline: 'yes'}}]", "    job 1: offline: input should be a valid boolean"),
    (f"jobs: [{JOB}, dtype: float17}}]", "    job 1: dtype: dtype 'float17' is none of float64, "),
    (
        f"jobs: [{JOB}}}]\ndefaults: {{dtype: 16}}",
        "job 1: dtype (from the defaults): input should be a valid string, no",
    ),
    (f"jobs: [{JOB}, max_shard_size: lots}}]", "    job 1: max_shard_size: 'lots' is no size of a shard"),
    (f"jobs: [{JOB}, validate_level: far}}]", "    job 1: validate_level: validation level 'far' is none of structure"),
    (f"jobs: [{JOB}, algorithm_kwargs: {{token: t}}}}]", "no algorithm may have an option that is called token"),
    (f"jobs: [{JOB}, dtype: float16, dtype: float32}}]", "a key that occurs twice in line 1"),
    ("a: &a [hf_secret]\nb: *a", "an alias (*), which is not read in line 2"),
    ("jobs: [hf_secret", "is no YAML that can be read: "),
    ("jobs: !!python/object:os.system hf_secret", "is no YAML that can be read: could not determine a constructor"),
    ("[" * 100_000, "is no YAML that can be read: "),
    ("#" * (1 << 20) + "#", "has more than 1048576 bytes"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_file_that_is_none_says_where_and_what_was_expected(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "jobs.yaml").write_text(text)

    result = command("--from-file", tmp_path / "jobs.yaml")

    assert result.exit_code == 2
    assert result.output.startswith(f"Error: {tmp_path / 'jobs.yaml'}")
    assert message in result.output
    assert "hf_secret" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--from-file", "nowhere.yaml"], "nowhere.yaml cannot be read: No such file", id="no file"),
        pytest.param(["m", "--from-file", "f"], "MODEL does not go with --from-file", id="a model"),
        pytest.param(["--from-file", "f", "--output-path", "x"], "--output-path does not go with", id="an output"),
        pytest.param(["m", "--jobs", "2"], "--jobs belongs beside --from-file", id="no batch"),
        pytest.param(["--from-file", "f", "--jobs", "0"], "0 is not in the range", id="no job at a time"),
        pytest.param(["--from-file", "{jobs}", "--executor", "dask"], "--scheduler is missing", id="no scheduler"),
        pytest.param(
            ["--from-file", "{jobs}", "--scheduler", "x"], "--scheduler does not go with --executor", id="one"
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    jobs = write(tmp_path / "jobs.json", [{"model": "m", "verifier": "v", "output_path": "o"}])

    result = command(*(each.replace("{jobs}", str(jobs)) for each in arguments))

    assert (result.exit_code, message in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("a", "b", "./x/../a"), r"jobs 1 and 3 have the same output_path ./x/../a; nothing was started"),
        (("a/b/c", "d", "a"), r"the output_path a/b/c of job 1 lies in that of job 3; nothing was started"),
    ],
)
def test_jobs_that_would_write_to_one_place_are_refused_before_any_starts(paths: tuple[str, ...], message: str) -> None:
    jobs = [Job(model="m", verifier="v", output_path=path) for path in paths]

    with pytest.raises(OptionError, match=message):
        run_jobs(jobs, AtOnce())


def all_of_them(tmp_path: Path) -> list[dict[str, Any]]:
    jobs = [{"model": str(DATA / name), "output_path": str(tmp_path / name)} for name in TRAINED]
    return [*jobs[:2], {"model": str(DATA / "none"), "output_path": str(tmp_path / "none")}, *jobs[2:]]


def test_all_checkpoints_are_converted_then_skipped_and_one_failure_stops_nothing(tmp_path: Path) -> None:
    jobs = [{**each, "validate": each["output_path"].endswith("eagle3")} for each in all_of_them(tmp_path)]
    file = write(tmp_path / "jobs.yaml", jobs, defaults={"verifier": str(VERIFIER)})

    first = command("--from-file", file, "--jobs", 2, "--json")
    made = {name: contents(tmp_path / name) for name in TRAINED}
    times = {name: (tmp_path / name).stat().st_ctime_ns for name in TRAINED}
    again = command("--from-file", file, "--executor", "threads", "--overwrite")

    said = json.loads(first.stdout)
    assert (first.exit_code, said["schema"]) == (3, "speculators.batch/1")
    assert said["counts"] == {"converted": 5, "skipped": 0, "failed": 1}
    assert [job["outcome"] for job in said["jobs"]] == [*["converted"] * 2, "failed", *["converted"] * 3]
    assert said["jobs"][0].keys() == {
        *("number", "source", "output_path", "outcome", "seconds"),
        *("algorithm", "package", "notes", "message", "exit_code"),
    }
    assert [job["algorithm"] for job in said["jobs"] if job["algorithm"]] == list(TRAINED.values())
    convert_model(DATA / "hass-fc-bias", verifier=VERIFIER, output_path=tmp_path / "alone", validate=False)
    assert made["hass-fc-bias"] == contents(tmp_path / "alone")

    lines = again.output.splitlines()
    assert again.exit_code == 3
    assert [line.split()[:2] for line in lines[:6]] == [
        [str(n), "failed" if n == 3 else "skipped"] for n in range(1, 7)
    ]
    assert lines[-2] == f"job 3: {DATA / 'none'} does not exist; expected a folder with config.json and weights"
    assert lines[-1] == "0 converted, 5 skipped, 1 failed"
    assert "job 1: note: config.json names no rope_theta: 10000, the default of the training code, is written" in lines
    assert times == {name: (tmp_path / name).stat().st_ctime_ns for name in TRAINED}


@contextmanager
def pool() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield executor


@contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Start a scheduler, and a worker in a process of its own; yield the scheduler's address."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=str(folder)
    ) as running:
        yield running.scheduler_address


@pytest.mark.parametrize("executor", [pool, lambda: ThreadPoolExecutor(2)], ids=["processes", "threads"])
def test_the_executors_of_the_standard_library_do_jobs(executor: Any, tmp_path: Path) -> None:
    jobs = [Job(**each, verifier=VERIFIER, validate=False) for each in all_of_them(tmp_path)[1:4]]
    heard: list[int] = []

    with executor() as running:
        result = run_jobs(jobs, running, heard=lambda outcome: heard.append(outcome.number))

    assert [each.outcome for each in result.outcomes] == ["converted", "failed", "converted"]
    assert [each.number for each in result.outcomes] == sorted(heard) == [1, 2, 3]
    assert result.exit_code == 3


def test_a_dask_cluster_does_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [{**each, "verifier": str(VERIFIER)} for each in all_of_them(tmp_path)[2:5]]
    file = write(tmp_path / "jobs.json", jobs)

    (line,) = elsewhere("test_a_dask_cluster_does_jobs").values()

    with cluster(tmp_path / "dask") as address:
        told = line.replace("docs/batch.yaml", str(file)).replace("tcp://scheduler:8786", address)
        result = command(*shlex.split(told)[2:], "--json", "--no-validate")
        monkeypatch.chdir(tmp_path)
        relative = command("--from-file", file, "--executor", "dask", "--scheduler", address, "--cache-dir", "cache")

    said = json.loads(result.stdout)
    assert [job["outcome"] for job in said["jobs"]] == ["failed", "converted", "converted"]
    assert result.exit_code == 3
    assert contents(tmp_path / "hass-layernorms").keys() == {
        "README.md",
        "config.json",
        "model.safetensors",
        "native_config.json",
        "provenance.json",
    }
    assert relative.exit_code == 2
    assert f"which start at {tmp_path}, but the worker works in {Path(__file__).parents[1]}" in relative.output


def test_a_cluster_that_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "PATIENCE", 0.2)
    file = write(tmp_path / "jobs.json", [{"model": "m", "verifier": "v", "output_path": "o"}])
    arguments = ("--from-file", file, "--executor", "dask", "--scheduler")

    silent, nonsense = command(*arguments, "tcp://127.0.0.1:9"), command(*arguments, "gopher://x")

    assert silent.exit_code == nonsense.exit_code == 5
    assert silent.output.startswith("Error: no Dask scheduler answers at tcp://127.0.0.1:9: ")
    assert "unknown address scheme 'gopher'" in nonsense.output
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ExecutorError, match=r'pip install "speculators\[dask\]"'), dask("tcp://127.0.0.1:9"):
        pass


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: Path) -> None:
    """Change a bit and nothing that is seen without reading it."""
    data, before = bytearray(path.read_bytes()), path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def say(path: Path, *keys: str, value: object) -> None:
    """Change what a record says."""
    record = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(record))


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "source": (lambda at: flip(at / "head" / "model.safetensors"), {}, "source.files.model.safetensors.sha256 was"),
    "its config": (lambda at: append(at / "head" / "config.json"), {}, "source.files.config.json.sha256 was"),
    "verifier": (lambda at: append(at / "base" / "config.json"), {}, "verifier.files.config.json.sha256 was"),
    "its place": (
        lambda at: shutil.copytree(at / "base", at / "b" / "base"),
        {"verifier": "b/base"},
        "its config.json",
    ),
    "an option": (
        lambda at: None,
        {"algorithm_kwargs": {"speculative_tokens": 4}},
        "options.speculative_tokens was null",
    ),
    "dtype": (lambda at: None, {"dtype": "float16"}, 'converter.dtype was null and is now "float16"'),
    "shards": (lambda at: None, {"max_shard_size": "1GB"}, "converter.max_shard_size was null and is now 1000000000"),
    "less": (lambda at: None, {"self_contained": False}, "converter.self_contained was true and is now false"),
    "version": (
        lambda at: say(at / "out" / "provenance.json", "converter", "package_version", value="0.1"),
        {},
        'converter.package_version was "0.1" and is now "',
    ),
    "checked": (lambda at: None, {"validate": True}, "it was validated to the level None, forward is asked for"),
    "output": (
        lambda at: flip(at / "out" / "model.safetensors"),
        {},
        "the content of model.safetensors is not what was",
    ),
    "incomplete": (lambda at: (at / "out" / "model.safetensors").unlink(), {}, "model.safetensors is missing"),
    "record": (lambda at: flip(at / "out" / "provenance.json"), {}, "provenance.json is no JSON object"),
    "foreign": (
        lambda at: say(at / "out" / "provenance.json", "converter", value=[]),
        {},
        "converter was [] and is now {",
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_nothing_is_skipped_that_would_be_another_now(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA / "eagle1-no-bias", "head")
    shutil.copytree(VERIFIER, "base")
    job = {"model": "head", "verifier": "base", "output_path": "out", "validate": False, "self_contained": True}
    change, more, message = CHANGES[changed]
    assert run_jobs([Job(**job)], AtOnce()).exit_code == 0

    assert run_jobs([Job(**job)], AtOnce()).count("skipped") == 1
    say(Path("out/provenance.json"), "tensors", value={"what later versions record": 1})
    assert run_jobs([Job(**job)], AtOnce()).count("skipped") == 1
    change(tmp_path)
    (refused,) = run_jobs([Job(**{**job, **more})], AtOnce()).outcomes
    (replaced,) = run_jobs([Job(**{**job, **more, "overwrite": True})], AtOnce()).outcomes

    assert (refused.outcome, refused.exit_code) == ("failed", 5), refused
    assert refused.message.startswith("out exists and is not empty; choose another --output-path or pass --overwrite. ")
    assert message in refused.message
    assert replaced.outcome == "converted", replaced
    assert run_jobs([Job(**{**job, **more})], AtOnce()).count("skipped") == 1


@pytest.mark.parametrize(
    ("name", "self_contained", "message"),
    [
        pytest.param("eagle1-no-bias", False, "it does not hold the tensors that would be written now", id="compared"),
        pytest.param("eagle3", True, "its embed_tokens.weight does not hold what would be written now", id="copied"),
    ],
)
def test_weights_of_the_verifier_that_are_others_now_are_noticed(
    name: str, self_contained: bool, message: str, tmp_path: Path
) -> None:
    base = shutil.copytree(VERIFIER, tmp_path / "base")
    places = {"model": DATA / name, "verifier": base, "output_path": tmp_path / "out"}
    job = Job(**places, validate=False, self_contained=self_contained)
    assert [run_jobs([job], AtOnce()).outcomes[0].outcome for _ in range(2)] == ["converted", "skipped"]

    data = bytearray((base / "model.safetensors").read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    data[8 + size + json.loads(data[8 : 8 + size])["model.embed_tokens.weight"]["data_offsets"][0] + 3] ^= 0x80
    (base / "model.safetensors").write_bytes(data)

    assert message in run_jobs([job], AtOnce()).outcomes[0].message


def test_what_was_validated_further_is_validated_far_enough(tmp_path: Path) -> None:
    places = {"model": DATA / "eagle3", "verifier": VERIFIER, "output_path": tmp_path / "out"}

    outcomes = [
        run_jobs([Job(**places, **level)], AtOnce()).outcomes[0].outcome
        for level in ({"validate_level": "structure"}, {"validate": False}, {"validate_level": "forward"})
    ]

    assert outcomes == ["converted", "skipped", "failed"]


def test_a_process_that_dies_takes_its_own_call_and_no_other() -> None:
    with Processes(1) as running:
        died, killed = running.submit(os._exit, 7), running.submit(signal.raise_signal, signal.SIGKILL)
        wrong, right = running.submit(len, 3), running.submit(len, "abc")

    assert str(died.exception()) == "the process that did it ended with the exit code 7"
    assert str(killed.exception()).startswith("the process that did it was killed (SIGKILL); if memory was not enough")
    assert isinstance(wrong.exception(), TypeError)
    assert right.result() == 3


def test_errors_pass_from_process_to_process() -> None:
    errors: list[SpeculatorsError] = [
        MismatchError("a does not fit:", ["one", "two"], "do something"),
        HookError("toy 1.0", "it raised"),
        OptionError("there is none"),
    ]
    for error in errors:
        arrived = pickle.loads(pickle.dumps(error))
        assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))


def test_what_was_not_begun_is_not_done_after_an_interruption(tmp_path: Path) -> None:
    jobs = [
        Job(model=DATA / "eagle3", verifier=VERIFIER, output_path=tmp_path / str(n), validate=False) for n in range(9)
    ]

    def interrupt(outcome: object) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, executor, heard=interrupt)

    made = sorted(path.name for path in tmp_path.iterdir())
    assert made in (["0"], ["0", "1"])


def descendants(process: int) -> set[int]:
    found: set[int] = set()
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, thread.read_text().split()):
            found |= {child, *descendants(child)}
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_batch_keeps_what_was_finished_and_leaves_no_process(
    number: int, code: int, server: Server, start: Start, tmp_path: Path
) -> None:
    server.add("org/head", DATA / "eagle3")
    server.faults.append(Fault("pytorch_model.bin?", stall=300_000))
    names = (("done", str(DATA / "eagle3")), ("stalled", "org/head"))
    jobs = [{"model": model, "output_path": name} for name, model in names]
    file = write(tmp_path / "jobs.json", jobs, defaults={"verifier": str(VERIFIER), "validate": False})
    running = start("convert", "--from-file", file, "--jobs", 2, "--cache-dir", tmp_path / "cache")
    wait_for(lambda: (tmp_path / "done").exists() and not (tmp_path / ".done.speculators").exists())
    wait_for((tmp_path / ".stalled.speculators" / "new").exists)
    processes = descendants(running.pid)

    began = time.monotonic()
    running.send_signal(number)
    said = running.communicate(timeout=30)[1]

    assert running.returncode == code
    assert said == ("" if code < 0 else "Interrupted; nothing half-written is left, and what was downloaded is kept\n")
    assert len(processes) >= 2
    wait_for(lambda: not any(Path(f"/proc/{each}").exists() for each in processes))
    assert time.monotonic() - began < 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "done", "jobs.json"]
    assert contents(tmp_path / "done").keys() == {
        "README.md",
        "config.json",
        "model.safetensors",
        "native_config.json",
        "provenance.json",
    }


def test_the_jobs_of_the_documentation_are_those_that_it_shows() -> None:
    docs = Path(__file__).parents[1] / "docs"

    assert f"```yaml\n{(docs / 'batch.yaml').read_text()}```" in (docs / "batch.md").read_text()
    assert [Path(job.model).name for job in read_jobs(docs / "batch.yaml")] == [
        *("eagle1-fc-bias", "eagle1-no-bias", "hass-fc-bias", "hass-layernorms", "eagle3")
    ]


def test_variables_for_files_of_jobs_and_for_one_conversion_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "JOBS": "2",
        "EXECUTOR": "threads",
        "OUTPUT_PATH": str(tmp_path / "one"),
        "PRIVATE": "1",
    }.items():
        monkeypatch.setenv(f"SPECULATORS_CONVERT_{name}", value)
    file = write(tmp_path / "jobs.json", [{"model": str(DATA / "eagle3"), "output_path": str(tmp_path / "many")}])

    one = command(DATA / "eagle3", "--verifier", VERIFIER, "--no-validate")
    many = command("--from-file", file, "--verifier", VERIFIER, "--no-validate")
    listed = command("--list-algorithms")

    assert (one.exit_code, many.exit_code, listed.exit_code) == (0, 0, 0), one.output + many.output + listed.output
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} >= {"one", "many"}
