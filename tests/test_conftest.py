"""The tests' own plugin: CPU time by test, and the reasons of slow tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.helpers import cpu_time
cpu_time.LEAST = 0.3
def pytest_configure(config):
    config.pluginmanager.register(cpu_time.CpuTimes())
"""


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a folder of its own under the plugin, which shows what takes 0.3 seconds, and no other plugin."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    alone = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **alone}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


CHILDREN = r"""
import subprocess, sys, time
SPIN = "import time\nwhile time.process_time() < 0.4: pass\n"
running = []
def test_ended():
    subprocess.run([sys.executable, "-c", SPIN], check=True)
def test_running():
    code = SPIN + "print(flush=True); time.sleep(100)"
    running.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
    running[0].stdout.readline()
def test_cheap():
    time.sleep(0.4)
def teardown_module():
    running[0].kill()
"""


def test_cpu_time_is_measured_and_printed(tmp_path: Path) -> None:
    """Fails if the time of a test or of its child processes is not counted, or a cheap test is shown."""
    done = run(tmp_path, CHILDREN)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert {line.split("::")[1] for line in lines if "::" in line} == {"test_ended", "test_running"}
    assert sum(line.endswith("s CPU  .") for line in lines) == 1  # the folder
    assert "in 3 tests" in next(line for line in lines if "CPU-minutes in all" in line)


def test_slow_tests_say_why(tmp_path: Path) -> None:
    """Fails if a test can be marked slow without a word, or not with one."""
    marks = {"bare": "", "blank": "(reason=' ')", "explained": "(reason='sleeps')"}
    tests = [f"@pytest.mark.slow{mark}\ndef test_{name}():\n    pass\n" for name, mark in marks.items()]
    done = run(tmp_path, "import pytest\n" + "".join(tests))
    assert done.returncode == 4 and "reason=" in done.stderr
    assert [name for name in marks if f"test_{name}" in done.stderr] == ["bare", "blank"]
