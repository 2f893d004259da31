"""The installed command, started in a moment: forked from a process that has imported what takes seconds.

`Warm` puts a program ``speculators`` into a folder, which hands its arguments, folder, variables and standard streams
to a server, this module. What runs then is the installed entry point, in a process of its own.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

FROZEN = ("HF_", "TRANSFORMERS_")
"""Beginnings of variables that are read when libraries are imported: with other ones, a command starts from nothing."""

CLIENT = """\
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    socket.send_fds(server, [b" "], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16)))
"""


class Warm:
    """A running server, and the folder of the program."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="warm-", dir="/tmp"))  # addresses of sockets are short
        address, client, program = (str(self.folder / name) for name in ("socket", "client.py", "speculators"))
        Path(client).write_text(CLIENT)
        Path(program).write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-IS", client, address])} "$@"\n')
        Path(program).chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            command = [sys.executable, __file__, str(listener.fileno())]
            self._server = subprocess.Popen(command, pass_fds=[listener.fileno()])

    def close(self) -> None:
        """End the server, and remove the program."""
        self._server.kill()
        self._server.wait()
        shutil.rmtree(self.folder)


def serve(listener: socket.socket) -> None:
    """Answer until killed; returns in the processes of commands."""
    from transformers import LlamaForCausalLM  # noqa: F401 # with torch, most of what a command waits for

    gc.collect()
    gc.freeze()  # so that commands do not copy all of it when they end
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    began_with = frozen(os.environ)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return become(connection, began_with)
        connection.close()


def frozen(variables: Mapping[str, str]) -> dict[str, str]:
    """Pick what was read once and for all."""
    return {name: value for name, value in variables.items() if name.startswith(FROZEN)}


def become(connection: socket.socket, began_with: Mapping[str, str]) -> None:
    """Be the command that is asked for, beside a process that tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    asked = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    command = os.fork()
    if command:
        for each in streams:
            os.close(each)
        _, status = os.waitpid(command, 0)
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    for number, each in enumerate(streams):
        os.dup2(each, number)
        os.close(each)
    arguments, folder, variables = json.loads(asked)
    os.chdir(folder)
    if frozen(variables) != began_with:
        os.execve(sys.executable, [sys.executable, "-m", "speculators", *arguments], variables)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["speculators", *arguments]


if __name__ == "__main__":
    del sys.path[0]  # the tests
    (installed,) = entry_points(group="console_scripts", name="speculators")
    serve(socket.socket(fileno=int(sys.argv[1])))
    sys.exit(installed.load()())
