"""The python tool: whatever the code does, the call is answered, and nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from atpo_fast.config import ConfigError, ToolsConfig
from atpo_fast.environment import PythonTool, ToolError, bubblewrap, check_tools, parse_call
from atpo_fast.environment.python_tool import _MAX_OUTPUT_BYTES, bare_code
from atpo_fast.environment.sandbox import kernel

HERE = Path(__file__).resolve().parents[1] / "helpers"
TIME_OUT = "TimeoutError: the code ran longer than 0.5 seconds."
LONG = str(1_000_000 + os.getpid())  # seconds to sleep: tells this run's processes from others'


class Confined:
    """The tool in a process that may do less than this one (`confined_python.py`)."""

    def __init__(self, python: str, *options: str, folder: Path | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "confined_python.py"), python, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
            env=os.environ | {"WANDB_API_KEY": "secret"} | ({} if folder is None else {"TMPDIR": str(folder)}),
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            _, errors = self._process.communicate()
            pytest.skip(f"cannot be confined with {options}: {errors.strip().splitlines()[-1:]}")

    def __call__(
        self, code: str, *, timeout_seconds: float = 300.0, times: int = 1, memory_mb: int = 2048
    ) -> dict[str, Any]:
        """Answers to `times` calls, log messages, and the process' handles, threads and memory."""
        assert self._process.stdout is not None
        self.ask(code, timeout_seconds=timeout_seconds, times=times, memory_mb=memory_mb)
        state: dict[str, Any] = json.loads(self._process.stdout.readline())
        return state

    def ask(self, code: str, *, timeout_seconds: float = 300.0, times: int = 1, memory_mb: int = 2048) -> None:
        """Start calls, and do not wait for their answers."""
        assert self._process.stdin is not None
        job = {"code": code, "timeout_seconds": timeout_seconds, "times": times, "memory_mb": memory_mb}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def answer(self, code: str, **options: Any) -> str:
        return str(self(code, **options)["answers"][0])

    @cached_property
    def log(self) -> list[str]:
        """The messages of a few calls, asked for once."""
        messages: list[str] = self("1", times=2)["log"]
        return messages

    @property
    def process_id(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.communicate()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


WEAK = ("--user", "--no-namespaces")
WAYS = [(), ("--user",), WEAK, (*WEAK, "--no-landlock"), (*WEAK, "--bubblewrap")]


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """Give the interpreter of an environment without packages.

    Start-up files of packages (*.pth) run with every start, and may take half of it. Tests that call `PythonTool`
    itself have the environment of the tests.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        venv.create(folder, symlinks=True)
        yield f"{folder}/bin/python"


@pytest.fixture(scope="module", params=WAYS, ids="".join)
def tool(request: pytest.FixtureRequest, python: str) -> Iterator[Confined]:
    """As the tests run; as a plain user; as one where the kernel refuses namespaces; there also without Landlock; and
    there, but with bubblewrap."""
    if "--user" in request.param and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    confined = Confined(python, *request.param)
    yield confined
    confined.close()


def isolated(tool: Confined) -> bool:
    """Whether this kernel gives the tool namespaces of its own."""
    return "own namespaces" in tool.log[0]


def sees_little(tool: Confined) -> bool:
    """Whether this kernel hides files from the code, by namespaces or by Landlock."""
    return "only Python and the system's programs" in tool.log[0]


def processes_with(text: str) -> list[str]:
    """Processes whose command line holds a text; dead ones have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def assert_gone(text: str) -> None:
    for _ in range(12_000):  # killed processes need a moment to end
        if not processes_with(text):
            return
        time.sleep(0.01)
    pytest.fail(f"still running: {processes_with(text)}")


# ---- answers


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("print(1)\n2 + 3", "1\n5"),  # a bare last expression is printed
        ("print('a')", "a"),  # and the None of print is not
        ("x = 4\nx", "4"),
        ("'é'", "é"),
        ("import sys\nsys.stdout.buffer.write(b'\\xff a')\nNone", "\ufffd a"),  # no UTF-8
        ("import atexit, threading\nt = threading.Timer(0.05, print, ['b'])\nt.start()\nprint('a')", "a\nb"),
        ("class A: pass\nimport pickle\ntype(pickle.loads(pickle.dumps(A()))).__module__", "__main__"),
        ("import os\nopen('f', 'w').write('x')\nos.listdir(), os.environ['HOME'] == os.getcwd()", "(['f'], True)"),
        ("import sys\nsys.stdin.read() == ''", "True"),
    ],
)
def test_answers(tool: Confined, code: str, answer: str) -> None:
    """Fails if code runs in another way than in an interpreter of its own with an empty folder."""
    assert tool.answer(code) == answer


def test_processes_of_code(tool: Confined) -> None:
    """Fails if code cannot compute in several processes, which need semaphores in /dev/shm; with Landlock alone, where
    that is the trainer's, it cannot."""
    answer = tool.answer("from multiprocessing import Pool\nwith Pool(2) as pool: print(pool.map(abs, [-1, -2]))")
    assert answer.endswith("Permission denied" if sees_little(tool) and not isolated(tool) else "[1, 2]")
    assert tool.answer("import os\nr, w = os.pipe()\nif not os.fork(): os.write(w, b'x'), os._exit(0)\nos.read(r, 1)")


FENCE = "`" * 3


@pytest.mark.parametrize(
    "written",
    [
        f"\n{FENCE}python\nx = 1\nprint(x + 1)\n{FENCE}\n",
        f"{FENCE}\nx = 1\nx + 1\n{FENCE}",
        f"\n  {FENCE}py\n  for x in (1,):\n      print(x + 1)\n  {FENCE}\n",
        f"{FENCE}Python3 \nprint(2)",
        "~~~\nprint(2)\n~~~",
        "\n    x = 1\n    if x:\n        print(x + 1)\n",
        " x = 1\n print(x + 1)",
        "\tx = 1\n\n\tprint(x + 1)\n",
        "x = 1\nprint(x + 1)",
    ],
)
def test_code_as_models_write_it(written: str) -> None:
    """Fails if code in a fence, or that is indented as a whole, is a syntax error."""
    call = parse_call(f"<think> I compute. </think> <python>{written}</python>", ["python"])
    assert call is not None and PythonTool()(call.argument) == "2"


@pytest.mark.parametrize("code", [f"x = [\n{FENCE!r}\n]\nprint(1)", "x = '`'", "if x:\n    pass", FENCE, "~~~"])
def test_code_without_a_fence_stays(code: str) -> None:
    """Fails if what only looks like a fence is cut out of code."""
    assert bare_code(code) == code


def test_errors_are_the_answer() -> None:
    """Fails if a traceback names lines or files of the sandbox, or code that cannot run is tried again."""
    tool = PythonTool()
    assert tool("print(1)\n1 / 0") == (
        'Traceback (most recent call last):\n  File "<string>", line 2, in <module>\n'
        "ZeroDivisionError: division by zero"
    )
    assert tool("print(").startswith('File "<string>", line 1\n') and "Traceback" not in tool("print(")
    assert tool("raise SystemExit(7)") == "The code ended with status 7."
    assert tool("import sys\nsys.exit('why')") == "why"
    assert tool("import atexit\natexit.register(print, 'b')\nprint('a')\nraise SystemExit") == "a\nb"
    assert tool("import ctypes\nctypes.string_at(0)") == "The code ended with signal SIGSEGV."
    assert "null byte" in tool("x = '\0'")
    assert "SyntaxError" in tool("x = '\ud800'") or "UnicodeEncodeError" in tool("x = '\ud800'")
    with pytest.raises(ToolError, match="2,000,004 characters of code are too many"):
        tool("x = " + "y" * 2_000_000)
    with pytest.raises(ToolError, match="returned empty output"):
        tool("x = 1")


def test_output_is_bounded() -> None:
    """Fails if the answer is longer than asked for, or the wrong end of it is kept."""
    text = PythonTool(max_chars=1000)("for _ in range(10_000): print('x' * 100)")
    assert len(text) <= 1000 and text.startswith("xxx")
    error = PythonTool(max_chars=1000)("import sys\nsys.stderr.write('y' * 100_000 + 'end')\nraise SystemExit(1)")
    assert len(error) <= 1000 and error.endswith("end")


def test_environment_is_clean(tool: Confined) -> None:
    """Fails if a secret of the trainer's environment reaches the code, or the trainer's process can be looked into."""
    assert "secret" not in tool.answer("import os\nos.environ")
    if isolated(tool):
        assert "secret" not in tool.answer(f"open('/proc/{tool.process_id}/environ').read()")
        assert int(tool.answer("import os\nlen([name for name in os.listdir('/proc') if name.isdigit()])")) == 2


# ---- faults, each also without namespaces and without privileges


def test_a_fork_bomb(tool: Confined) -> None:
    """Fails if processes are not limited, or outlive the call."""
    started = tool.answer(
        "import subprocess\nn = 0\ntry:\n    while True:\n"
        f"        subprocess.Popen(['sleep', '{LONG}'], start_new_session=True)\n        n += 1\n"
        "except OSError: print(n)"
    )
    assert 10 <= int(started) < 64  # before the bomb, whose remains would raise the limit
    assert_gone(f"\0{LONG}\0")
    assert "Resource temporarily unavailable" in tool.answer("import os\nwhile True: os.fork()")


def test_sockets(tool: Confined) -> None:
    """Fails if code can reach a server of this machine (here: one that listens for it)."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = tool.answer(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)")
        # In a namespace nobody listens; a filter refuses the socket.
        assert answer.endswith("Errno 13] Permission denied") or "Error: [Errno" in answer
        other = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)\nprint('reached')"
        code = f"import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', {other!r}]).returncode)"
        assert tool.answer(code) == "1"  # nor can a program that it starts
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_sockets_in_the_file_system(tool: Confined) -> None:
    """Fails if code can speak to a server of this machine that listens at a path, such as a database's."""
    import socket

    with tempfile.TemporaryDirectory(dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as server:
        Path(folder).chmod(0o777)
        server.bind(f"{folder}/s")
        Path(f"{folder}/s").chmod(0o777)
        server.listen()
        server.setblocking(False)
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect('{folder}/s')\nprint('reached')"
        assert tool.answer(code).endswith("PermissionError: [Errno 13] Permission denied")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert tool.answer("import socket\na, b = socket.socketpair()\na.send(b'x')\nb.recv(1)") == "b'x'"


def test_files_of_the_run(tool: Confined) -> None:
    """Fails if code can read the accepted answers in the run folder, the data, or the home of the trainer."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        Path(folder, "answers.jsonl").write_text("gold")
        Path(folder, "answers.jsonl").chmod(0o666)
        paths = f"{folder}/answers.jsonl", __file__, "/etc/hostname", f"/proc/{tool.process_id}/environ"
        attempts = [*(f"open({path!r}).read()" for path in paths), f"open('{folder}/new', 'w')"]
        attempts.append(f"__import__('os').unlink('{folder}/answers.jsonl')")
        code = "for attempt in {attempts!r}:\n    try: print('done:', eval(attempt))\n    except OSError as e: print(e)"
        if sees_little(tool):
            refused = tool.answer(code.format(attempts=attempts)).splitlines()
            assert len(refused) == len(attempts) and all(line.startswith("[Errno ") for line in refused), refused
            assert os.listdir(folder) == ["answers.jsonl"]


def test_writing_files(tool: Confined) -> None:
    """Fails if a file can be changed outside of the working directory, or one inside may be of any size."""
    if isolated(tool):
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # where everybody may write
            Path(folder).chmod(0o777)
            assert "No such file or directory" in tool.answer(f"open('{folder}/file', 'w')")
            assert not os.listdir(folder)
        assert "Read-only file system" in tool.answer("open('/dev/shm/../../tmp/file', 'w')")
        assert "Read-only file system" in tool.answer("open('/usr/file', 'w')")
    else:
        messages = tool("1")["log"]  # after many calls
        assert len(messages) == 2  # said once
        assert messages[1].startswith("WARNING PYTHON TOOL NOT FULLY CONFINED (processes: followed one by one")
        assert ("other files, and the trainer's, are open" in messages[1]) == (not sees_little(tool))
    big = "f = open('big', 'wb')\nfor _ in range(1000): f.write(bytes(1 << 20))"
    assert "OSError" in tool.answer(big)


def test_memory_in_sum(tool: Confined) -> None:
    """Fails if processes that each keep to the limit take many times as much together, or if what they share since a
    fork is counted more than once. A process needs 15 MB of addresses itself."""
    hold = (
        "import mmap, os, time\nshared = b'x' * ({shared} << 20)\nfor _ in range(6):\n    if os.fork() == 0:\n"
        "        own = {own}\n        time.sleep({seconds})\n        os._exit(0)\ntime.sleep({seconds})\nprint('held')"
    )
    stopped = "MemoryError: the processes of the code held more than 64 MB."
    for own in ("b'x' * (15 << 20)", "mmap.mmap(-1, 15 << 20)\n        own.write(b'x' * (15 << 20))\n        "):
        assert tool.answer(hold.format(shared=0, own=own, seconds=60), memory_mb=64) == stopped
    assert tool.answer(hold.format(shared=20, own=0, seconds=0.25), memory_mb=64) == "held"


@pytest.mark.parametrize(
    "call",
    ["memfd_create(b'x', 0)", "unshare(0x10000000)", "mount(b'a', b'/tmp', b'tmpfs', 0, 0)", "shmget(0, 9, 512)"],
)
def test_calls_that_hold_memory_or_give_rights(tool: Confined, call: str) -> None:
    """Fails if code can hold memory that no process is charged for, or become root of a namespace of its own."""
    answer = tool.answer(f"import ctypes\nctypes.CDLL(None, use_errno=True).{call}, ctypes.get_errno()")
    assert answer in ("(-1, 1)", "(-1, 38)")


def test_ten_gigabytes(tool: Confined) -> None:
    """Fails if memory is not limited."""
    assert tool.answer("x = bytearray(10 << 30)").endswith("MemoryError")


def test_printing_for_ever(tool: Confined) -> None:
    """Fails if output is gathered until time or memory run out."""
    answer = tool.answer("while True: print('x' * 1000)")
    assert answer.startswith("xxx") and answer.endswith("\nThe code was stopped: it printed too much.")
    assert len(answer) < 30_000 < _MAX_OUTPUT_BYTES


@pytest.mark.parametrize(
    "code",
    [
        "import signal\nfor s in (15, 2, 1, 3): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        f"import os, time\nos.close(1), os.close(2)\ntime.sleep({LONG})",
        f"import subprocess, time\nsubprocess.Popen(['sleep', '{LONG}'], start_new_session=True)\ntime.sleep({LONG})",
    ],
)
def test_endless_code(tool: Confined, code: str) -> None:
    """Fails if a time-out does not end the code and all that it started, whatever they do about it."""
    assert tool.answer(code, timeout_seconds=0.5) == TIME_OUT
    assert_gone(f"\0{LONG}\0")


def test_a_daemon_left_behind(tool: Confined) -> None:
    """Fails if a process that left its session outlives the call, or holds the answer back."""
    assert (
        tool.answer(f"import subprocess\nsubprocess.Popen(['sleep', '{LONG}'], start_new_session=True)\n'left'")
        == "left"
    )
    twice = (
        "import os\nif os.fork() == 0:\n    os.setsid()\n"
        f"    if os.fork() == 0: os.execvp('sleep', ['sleep', '{LONG}'])\n    os._exit(0)\nos.wait()\n'left'"
    )
    assert tool.answer(twice) == "left"
    assert_gone(f"\0{LONG}\0")


def test_signals_reach_nobody_else(tool: Confined) -> None:
    """Fails if code can end the tool with a signal to its group or its parent."""
    assert tool.answer("import os\nos.kill(0, 9)") == "The code ended with signal SIGKILL."
    assert tool.answer("import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.kill(0, 15)\n'on'") == "on"
    assert tool.answer("1") == "1"


def test_nothing_leaks(tool: Confined) -> None:
    """Fails if calls leave handles, threads, memory, processes or folders behind."""
    folders = {path.name for path in Path("/tmp").glob("atpo_python_*")}
    code = f"import os\nos.posix_spawnp('sleep', ['sleep', '{LONG}'], {{}}, setsid=True)\nprint('x' * 100_000)"
    before = tool(code, times=2)
    after = tool(code, times=8)
    assert len(after["answers"]) == 8 and all(answer.startswith("xxx") for answer in after["answers"])
    assert after["handles"] == before["handles"] and after["threads"] == before["threads"]
    assert after["memory_kb"] < before["memory_kb"] + 2048  # it stays the same, but for an arena of Python's
    assert {path.name for path in Path("/tmp").glob("atpo_python_*")} <= folders
    assert_gone(f"\0{LONG}\0")


def test_a_killed_trainer_leaves_no_code_running(python: str, tmp_path: Path) -> None:
    """Fails if code goes on when the process that runs the tool is killed."""
    trainer = Confined(python, folder=tmp_path)  # where the killed tool leaves its working directory
    trainer.ask(f"import subprocess; print('up'); subprocess.run(['sleep', '{LONG}'])")
    for _ in range(12_000):
        if processes_with(f"\0{LONG}\0"):
            break
        time.sleep(0.01)
    trainer.kill()
    assert_gone(f"\0{LONG}\0")


def test_bubblewrap_is_asked_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the tool needs bubblewrap, or starts a program that is not there with every call."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not bubblewrap.is_needed_and_works.__wrapped__()


def test_full_confinement_can_be_required() -> None:
    """Fails if a run starts that asked for full confinement and does not get it, or does not start where it does."""
    if os.geteuid() != 0:
        pytest.skip("bubblewrap may confine code fully for others than root")
    if not PythonTool().confinement().weak:
        check_tools(ToolsConfig(builtin=["python"], python_confinement="require"))
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=require_without_namespaces, args=(sending,))
    process.start()
    sending.close()
    said = receiving.recv()
    process.join()
    assert "tools.python_confinement=require, but code cannot be confined fully here (processes:" in said


def require_without_namespaces(answer: Connection) -> None:
    """Require full confinement where the kernel refuses namespaces; sends what is said."""
    kernel.no_new_privileges()
    assert kernel.deny_system_calls({"unshare": 1})
    try:
        check_tools(ToolsConfig(builtin=["python"], python_confinement="require"))
        answer.send("confined")
    except ConfigError as error:
        answer.send(str(error))


def test_root_without_namespaces(python: str) -> None:
    """Fails if root's code keeps its privileges where the kernel refuses namespaces."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    tool = Confined(python, "--no-namespaces")
    assert "Error" in tool.answer("import os\nos.chown('.', 1, 1)") and "Error" in tool.answer("import os\nos.nice(-1)")
    assert "Resource temporarily unavailable" in tool.answer("import os\nwhile True: os.fork()")
    assert "Permission denied" in tool.answer("import socket\nsocket.socket()")
    tool.close()


def test_calls_from_many_threads() -> None:
    """Fails if calls share a folder or a pipe."""
    tool, answers = PythonTool(), {}

    def call(number: int) -> None:
        answers[number] = tool(f"import os\nopen('f', 'w').write('{number}')\nos.listdir(), open('f').read()")

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"(['f'], '{number}')" for number in range(8)}
