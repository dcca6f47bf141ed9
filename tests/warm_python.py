"""Python programs in forks of a process that has loaded the libraries, which takes seconds each time otherwise.

As a program, this file is that process: it reads requests from standard input and answers with exit statuses.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn


class WarmPython:
    """Runs `python script.py ...`, `python -c code ...` and `python -m module ...` one after the other.

    Args:
        environment: of all programs; that of this process by default. Libraries read it when they are imported.
        modules: what is imported before.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        modules: Sequence[str] = ("noprop_hf.planning", "noprop_hf.watching"),
    ):
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self, *command: str, cwd: Path, variables: Sequence[Mapping[str, str]] = ({},), timeout: float = 540
    ) -> tuple[int, str]:
        """Run a program, once for each set of more `variables` of the environment, all at a time.

        Of what libraries and the interpreter read when they begin, only a `PYTHONPATH` among them has an effect.

        Returns:
            The highest exit status, and all that was printed.

        Raises:
            TimeoutError: it takes more than `timeout` seconds. Nothing can be run after that.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryFile("w+") as output:
            path = f"/proc/{os.getpid()}/fd/{output.fileno()}"
            request = {"command": command, "cwd": str(cwd), "output": path, "variables": list(map(dict, variables))}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                self.close()
                raise TimeoutError(f"{command} takes more than {timeout} seconds")
            status = int(self.process.stdout.readline())
            output.seek(0)
            return status, output.read()

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(command: list[str]) -> None:
    """What the interpreter does with its arguments."""
    if command[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *command[2:]], ""
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    elif command[0] == "-m":
        sys.argv, sys.path[0] = command[1:], os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(command[0]).absolute().parent)
        runpy.run_path(command[0], run_name="__main__")


def run_and_exit(command: list[str]) -> NoReturn:
    """Run a program and exit as the interpreter does, without taking all modules apart, which takes half a second."""
    status = 0
    try:
        run(command)
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def serve() -> None:
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # `Trainer` collects garbage, which takes long with all modules
    for line in sys.stdin:
        request, children = json.loads(line), []
        for variables in request["variables"]:
            children.append(os.fork())
            if children[-1] == 0:
                os.chdir(request["cwd"])
                os.environ.update(variables)
                sys.path[1:1] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
                output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(output, stream.fileno())
                os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
                run_and_exit(request["command"])
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(max(statuses, key=abs), flush=True)


if __name__ == "__main__":
    serve()
