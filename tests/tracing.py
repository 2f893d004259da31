"""Forks the command line and traces it, call by call; the program on the other side of `injection`.

``python tracing.py DESCRIPTOR`` imports once what a conversion needs. For every socket that it is sent, it forks
a tracer, and that forks the command line: the tracer reads a request from the socket, disturbs the process
as it says, and answers. A seccomp filter stops the process at calls that may change the filesystem, and at
no others, so that it runs as fast as ever in between.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import importlib
import json
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

MODULES = (
    "filelock",
    "rich.progress",
    "speculators.cli",
    "speculators.convert",
    "speculators.modeling",
    "speculators.sources.filesystems",
    "speculators.sources.folders",
    "speculators.sources.hub",
    "speculators.sources.web",
    "speculators.validation",
    "speculators_eagle.draft",
    "speculators_eagle.original",
    "speculators_eagle3.draft",
    "speculators_eagle3.original",
    "speculators_hass",
    "torch",
    "torch._dynamo",
    "torch.utils.serialization",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
)
"""What conversions and their validation import; they find it imported."""


class Call(NamedTuple):
    """A system call that changes a filesystem, or makes a change last.

    Attributes:
        kind: Calls of one kind fail together.
        x86: Its number on x86-64, if it is there.
        arm: Its number on aarch64, if it is there.
        paths: Which arguments name a path: a folder's descriptor and a path inside it, or one of them alone.
        flags: Which argument holds the flags without which it changes nothing.
    """

    kind: str
    x86: int | None
    arm: int | None
    paths: tuple[tuple[int | None, int | None], ...]
    flags: int | None = None


def _at(folder: int, path: int) -> tuple[int | None, int | None]:
    return folder, path


def _path(argument: int) -> tuple[int | None, int | None]:
    return None, argument


def _file(argument: int) -> tuple[int | None, int | None]:
    return argument, None


CALLS = {
    "open": Call("open", 2, None, (_path(0),), flags=1),
    "openat": Call("open", 257, 56, (_at(0, 1),), flags=2),
    "openat2": Call("open", 437, 437, (_at(0, 1),)),
    "creat": Call("open", 85, None, (_path(0),)),
    "mknod": Call("open", 133, None, (_path(0),)),
    "mknodat": Call("open", 259, 33, (_at(0, 1),)),
    "write": Call("write", 1, 64, (_file(0),)),
    "pwrite64": Call("write", 18, 68, (_file(0),)),
    "writev": Call("write", 20, 66, (_file(0),)),
    "pwritev": Call("write", 296, 70, (_file(0),)),
    "pwritev2": Call("write", 328, 287, (_file(0),)),
    "copy_file_range": Call("write", 326, 285, (_file(2),)),
    "sendfile": Call("write", 40, 71, (_file(0),)),
    "splice": Call("write", 275, 76, (_file(2),)),
    "fallocate": Call("write", 285, 47, (_file(0),)),
    "truncate": Call("truncate", 76, 45, (_path(0),)),
    "ftruncate": Call("truncate", 77, 46, (_file(0),)),
    "rename": Call("rename", 82, None, (_path(0), _path(1))),
    "renameat": Call("rename", 264, 38, (_at(0, 1), _at(2, 3))),
    "renameat2": Call("rename", 316, 276, (_at(0, 1), _at(2, 3))),
    "mkdir": Call("mkdir", 83, None, (_path(0),)),
    "mkdirat": Call("mkdir", 258, 34, (_at(0, 1),)),
    "rmdir": Call("remove", 84, None, (_path(0),)),
    "unlink": Call("remove", 87, None, (_path(0),)),
    "unlinkat": Call("remove", 263, 35, (_at(0, 1),)),
    "link": Call("link", 86, None, (_path(0), _path(1))),
    "linkat": Call("link", 265, 37, (_at(0, 1), _at(2, 3))),
    "symlink": Call("link", 88, None, (_path(1),)),
    "symlinkat": Call("link", 266, 36, (_at(1, 2),)),
    "chmod": Call("mode", 90, None, (_path(0),)),
    "fchmod": Call("mode", 91, 52, (_file(0),)),
    "fchmodat": Call("mode", 268, 53, (_at(0, 1),)),
    "fchmodat2": Call("mode", 452, 452, (_at(0, 1),)),
    "chown": Call("mode", 92, None, (_path(0),)),
    "lchown": Call("mode", 94, None, (_path(0),)),
    "fchown": Call("mode", 93, 55, (_file(0),)),
    "fchownat": Call("mode", 260, 54, (_at(0, 1),)),
    "setxattr": Call("mode", 188, 5, (_path(0),)),
    "lsetxattr": Call("mode", 189, 6, (_path(0),)),
    "fsetxattr": Call("mode", 190, 7, (_file(0),)),
    "utime": Call("times", 132, None, (_path(0),)),
    "utimes": Call("times", 235, None, (_path(0),)),
    "futimesat": Call("times", 261, None, (_at(0, 1),)),
    "utimensat": Call("times", 280, 88, (_at(0, 1),)),
    "fsync": Call("sync", 74, 82, (_file(0),)),
    "fdatasync": Call("sync", 75, 83, (_file(0),)),
    "sync_file_range": Call("sync", 277, 84, (_file(0),)),
    "syncfs": Call("sync", 306, 267, (_file(0),)),
    "flock": Call("lock", 73, 32, (_file(0),)),
}

CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
"""Flags of which an opening that changes something has one at least."""


class Machine(NamedTuple):
    """Where a kind of processor keeps a system call, as places among its registers.

    Attributes:
        audit: What the kernel calls it.
        registers: How many there are.
        number: Where the call's number stands.
        arguments: Where its arguments stand.
        result: Where its result goes.
    """

    audit: int
    registers: int
    number: int
    arguments: tuple[int, ...]
    result: int


MACHINES = {
    "x86_64": Machine(0xC000003E, 27, 15, (14, 13, 12, 7, 9, 8), 10),
    "aarch64": Machine(0xC00000B7, 34, 8, (0, 1, 2, 3, 4, 5), 0),
}

PTRACE_CONT, PTRACE_GETREGSET, PTRACE_SETREGSET = 7, 0x4204, 0x4205
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_LISTEN = 0x4206, 0x4207, 0x4208
PTRACE_OPTIONS = 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # forks, vforks, clones, the filter; killed with the tracer
EVENT_SECCOMP, EVENT_STOP = 7, 128
NT_PRSTATUS, NT_ARM_SYSTEM_CALL = 1, 0x404
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER, SECCOMP_TRACE, SECCOMP_ALLOW = 2, 0x7FF00000, 0x7FFF0000
WALL = 0x40000000  # threads, too
AT_FDCWD = -100
PAGE = 4096

libc = ctypes.CDLL(None, use_errno=True)


def system(function: str, *arguments: Any) -> None:
    """Call the C library.

    Raises:
        OSError: It failed.
    """
    if getattr(libc, function)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def ptrace(request: int, thread: int, address: int = 0, data: Any = 0) -> None:
    """Have the kernel do something to a thread that is traced."""
    data = ctypes.c_void_p(data) if isinstance(data, int) else data
    system("ptrace", ctypes.c_long(request), ctypes.c_long(thread), ctypes.c_void_p(address), data)


class _Block(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def regset(request: int, thread: int, kind: int, content: Any) -> None:
    """Read or write a set of a thread's registers."""
    block = _Block(ctypes.addressof(content), ctypes.sizeof(content))
    ptrace(request, thread, kind, ctypes.byref(block))


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("size", ctypes.c_ushort), ("first", ctypes.POINTER(_Instruction)))


@cache
def numbers() -> dict[int, str]:
    """Return the names of the calls by their numbers on this machine."""
    known = {name: call.x86 if platform.machine() == "x86_64" else call.arm for name, call in CALLS.items()}
    return {number: name for name, number in known.items() if number is not None}


def stop_at_changes() -> None:
    """Have the kernel stop this process and all that comes from it at calls that may change a filesystem."""
    load, equal, any_of, answer = 0x20, 0x15, 0x45, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[platform.machine()].audit), (answer, 0, 0, SECCOMP_ALLOW)]
    code += [(load, 0, 0, 0)]
    for number, name in numbers().items():
        flags = CALLS[name].flags
        if flags is None:
            code += [(equal, 0, 1, number), (answer, 0, 0, SECCOMP_TRACE)]
        else:
            code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * flags), (any_of, 0, 1, CHANGES)]
            code += [(answer, 0, 0, SECCOMP_TRACE), (answer, 0, 0, SECCOMP_ALLOW)]
    code += [(answer, 0, 0, SECCOMP_ALLOW)]
    program = _Program(len(code), (_Instruction * len(code))(*code))
    system("prctl", PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0)))
    system("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program))


class Stopped:
    """A thread that is about to make a system call."""

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.machine = MACHINES[platform.machine()]
        self.registers = (ctypes.c_ulong * self.machine.registers)()
        regset(PTRACE_GETREGSET, self.thread, NT_PRSTATUS, self.registers)

    @property
    def name(self) -> str:
        """The call's name."""
        return numbers()[self.registers[self.machine.number]]

    def changes(self) -> bool:
        """Tell whether an opening, whose flags the filter could not see, changes something."""
        return self.name != "openat2" or bool(self.argument(2, memory=8) & CHANGES)

    def argument(self, place: int, memory: int = 0) -> int:
        """Return an argument, or the number of so many bytes that it points to."""
        value: int = self.registers[self.machine.arguments[place]]
        return int.from_bytes(self.read(value, memory), sys.byteorder) if memory else value

    def paths(self) -> Iterator[str]:
        """Yield what the call concerns, from the root of the filesystem on."""
        for folder, path in CALLS[self.name].paths:
            number = AT_FDCWD if folder is None else ctypes.c_int(self.argument(folder)).value
            link = Path(f"/proc/{self.thread}", "cwd" if number == AT_FDCWD else f"fd/{number}")
            start = str(link.readlink()).removesuffix(" (deleted)")
            inside = self.text(self.argument(path)) if path is not None else ""
            whole = Path(start, inside)
            yield os.path.normpath(Path(os.path.realpath(whole.parent), whole.name)) if inside else start

    def text(self, address: int) -> str:
        """Read a path of the process."""
        found = b""
        while address and b"\0" not in found:
            found += self.read(address + len(found), PAGE - (address + len(found)) % PAGE)
        return os.fsdecode(found.partition(b"\0")[0])

    def read(self, address: int, size: int) -> bytes:
        """Read memory of the process."""
        with Path(f"/proc/{self.thread}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)

    def fail(self, reason: str) -> None:
        """Have the call not carried out and its caller told that it failed."""
        self.registers[self.machine.result] = ctypes.c_ulong(-getattr(errno, reason)).value
        if platform.machine() == "aarch64":
            regset(PTRACE_SETREGSET, self.thread, NT_ARM_SYSTEM_CALL, ctypes.c_int(-1))
        else:
            self.registers[self.machine.number] = ctypes.c_ulong(-1).value
        regset(PTRACE_SETREGSET, self.thread, NT_PRSTATUS, self.registers)


class Tracer:
    """Runs the command line once and disturbs it.

    Attributes:
        calls: The changing calls that were begun.
        struck: Those of them that a fault struck.
    """

    def __init__(self, request: dict[str, Any], channel: TextIO, descriptor: int) -> None:
        self.request = request
        self.channel = channel
        self.descriptor = descriptor
        self.root = request["root"]
        self.faults = request["faults"]
        self.failing: dict[str, str] = request["failing"]
        self.seen = [0] * len(self.faults)
        self.calls: list[str] = []
        self.struck: list[str] = []
        self.held: list[tuple[int, int]] = []
        self.process = 0
        self.ended = False

    def run(self) -> dict[str, Any]:
        """Run it to its end, whatever that is, and return the answer."""
        outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        with time_limit(self.request["timeout"]):
            try:
                self.start(outputs)
                status = self.follow()
                late = False
            except TimeoutError:
                late = True
            finally:
                self.end()
        texts = [os.pread(each, os.fstat(each).st_size, 0).decode(errors="replace") for each in outputs]
        answer = {"stdout": texts[0], "stderr": texts[1], "calls": self.calls, "struck": self.struck}
        return {**answer, "status": None if late else os.waitstatus_to_exitcode(status)}

    def start(self, outputs: list[int]) -> None:
        ours, theirs = socket.socketpair()
        self.process = os.fork()
        if not self.process:
            be_command_line(self.request, outputs, theirs, (ours.fileno(), self.descriptor))
        theirs.close()
        with ours:
            ptrace(PTRACE_SEIZE, self.process, 0, PTRACE_OPTIONS)
            ours.sendall(b"!")
            refusal = ours.recv(PAGE)
            if refusal != b"!":
                raise OSError(refusal.decode() or "it ended before it began")

    def follow(self) -> int:
        """Let every thread go on as often as it stops, and return how the process ended."""
        while True:
            thread, status = self.held.pop(0) if self.held else os.waitpid(-1, WALL)
            if not os.WIFSTOPPED(status):
                if thread == self.process:
                    self.ended = True
                    return status
                continue
            event, reason = status >> 16, os.WSTOPSIG(status)
            with suppress(ProcessLookupError, FileNotFoundError):  # it was killed meanwhile
                if event == EVENT_SECCOMP:
                    self.disturb(Stopped(thread))
                if event == EVENT_STOP and reason != signal.SIGTRAP:
                    ptrace(PTRACE_LISTEN, thread)
                else:
                    ptrace(PTRACE_CONT, thread, 0, 0 if event else reason)

    def disturb(self, stopped: Stopped) -> None:
        """Write down a call and do to it what the request says."""
        name = stopped.name
        try:
            paths = list(stopped.paths()) if stopped.changes() else []
        except (ProcessLookupError, PermissionError):
            raise
        except OSError:  # no descriptor, or no memory, of the process: the kernel will refuse it as well
            return
        if not any(Path(path).is_relative_to(self.root) for path in paths):
            return
        self.calls.append(f"{name} {' -> '.join(map(self.shown, paths))}")
        names = (name, CALLS[name].kind)
        action = next((self.failing[each] for each in names if each in self.failing), "")
        for place, fault in enumerate(self.faults):
            self.seen[place] += fault["of"] in ("", *names)
            if fault["of"] in ("", *names) and self.seen[place] == fault["number"]:
                action = fault["action"]
                self.struck.append(self.calls[-1])
                if fault["lasting"]:
                    self.failing[names[1]] = action
        if action == "pause":
            action = self.pause(stopped.thread)
        if action.startswith("SIG"):
            number = signal.Signals[action]
            # As the kernel does with a signal for a process: the main thread has it if it can.
            system("tgkill", self.process, self.process, number)
            if number == signal.SIGKILL:
                raise ProcessLookupError
        elif action:
            stopped.fail(action)

    def shown(self, path: str) -> str:
        return os.path.relpath(path, self.root) if Path(path).is_relative_to(self.root) else path

    def pause(self, thread: int) -> str:
        """Stop all threads, say so, and return what shall happen to the call."""
        for other in (int(each.name) for each in Path(f"/proc/{self.process}/task").iterdir()):
            if other != thread:
                with suppress(ProcessLookupError, ChildProcessError):
                    ptrace(PTRACE_INTERRUPT, other)
                    self.held.append(os.waitpid(other, WALL))
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        send(self.channel, {"paused": self.calls[-1]})
        line = self.channel.readline()
        signal.setitimer(signal.ITIMER_REAL, left)
        if not line:
            raise ConnectionAbortedError("nobody waits for the answer")
        action: str = json.loads(line)["action"]
        return action

    def end(self) -> None:
        """Leave nothing running."""
        if not self.process:
            return
        if not self.ended:
            os.kill(self.process, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it leads a group, which what it started belongs to
            os.killpg(self.process, signal.SIGKILL)
        while not self.ended:
            self.ended = os.waitpid(-1, WALL)[0] == self.process


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise an error in whatever takes longer."""

    def raise_error(*unused: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, raise_error)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def be_command_line(
    request: dict[str, Any], outputs: list[int], gate: socket.socket, others: tuple[int, ...]
) -> NoReturn:
    """Become the process that a shell would start, once the tracer has it, and end as it would."""
    code = 1
    try:
        for each in others:
            os.close(each)
        with gate:
            gate.recv(1)
            try:
                prepare(request, outputs)
                stop_at_changes()
            except OSError as error:
                gate.sendall(str(error).encode())
                os._exit(code)
            gate.sendall(b"!")
        code = run_command_line(request["args"], request["code"])
    finally:
        os._exit(code)


def prepare(request: dict[str, Any], outputs: list[int]) -> None:
    """Give this process what a shell would give it, and nothing of the driver's."""
    os.setsid()
    for place, number in enumerate((os.open(os.devnull, os.O_RDONLY), *outputs)):
        os.dup2(number, place)
        os.close(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM):
        signal.signal(each, signal.SIG_DFL)
    os.chdir(request["cwd"])
    for name, value in request["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    tempfile.tempdir = None
    sys.argv = ["speculators", *request["args"]]


def run_command_line(args: list[str], instead: str) -> int:
    """Run the command line, or some code instead, do what an interpreter does at its end, and return the exit code."""
    from speculators.cli import cli

    code = 1
    try:
        if instead:
            exec(instead, {"__name__": "__main__"})
        else:
            cli(args, prog_name="speculators")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:  # noqa: BLE001 # whatever it is, an interpreter prints it
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for each in (sys.stdout, sys.stderr):
        with suppress(OSError):
            each.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def send(channel: TextIO, message: dict[str, Any]) -> None:
    """Send a message, of which each is one line."""
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def trace(descriptor: int, parent: int) -> None:
    """Carry out the request that a socket holds."""
    system("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rw") as channel:
        line = channel.readline()
        if os.getppid() != parent or not line:
            return
        try:
            answer = Tracer(json.loads(line), channel, descriptor).run()
        except (ConnectionAbortedError, BrokenPipeError):
            return
        except PermissionError as error:
            answer = {"error": f"processes cannot be traced here ({error}); a container may need SYS_PTRACE"}
        except Exception:  # noqa: BLE001 # it is told where somebody reads it
            answer = {"error": traceback.format_exc()}
        send(channel, answer)


def serve(control: socket.socket) -> None:
    """Fork a tracer for every socket that comes, until nobody can send any more."""
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    driver = os.getpid()
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        if os.fork():
            os.close(descriptors[0])
            continue
        try:
            control.close()
            trace(descriptors[0], driver)
        finally:
            os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
