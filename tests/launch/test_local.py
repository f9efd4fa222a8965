"""launch/local.py: who is started with what, who is told, and how it ends. The processes here are small scripts."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.py"


def start(*arguments, cwd=None):
    return subprocess.Popen(
        [sys.executable, str(LOCAL), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def run(*arguments, cwd=None):
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def script(tmp_path):
    """Writes a script that knows its `rank`; returns its path."""

    def write(body):
        path = tmp_path / "script.py"
        path.write_text(f"import os, signal, sys, time\nrank = int(os.environ['VIDGEN_PROCESS'])\n{body}\n")
        return path

    return write


def test_each_process_finds_out_who_it_is_and_the_first_one_speaks(script, tmp_path):
    names = "VIDGEN_COORDINATOR VIDGEN_PROCESSES VIDGEN_PROCESS JAX_PLATFORMS JAX_NUM_CPU_DEVICES".split()
    say = script(f"print(*(os.environ[k] for k in {names}), *sys.argv[1:])\nprint('aside', rank, file=sys.stderr)")
    arguments = ("--processes=3", "--devices", "5", "--", say, "--workdir", tmp_path / "w", "--x=1")
    status, out, err = run(*arguments)
    assert status == 0 and err == "aside 0\n"
    logs = [(tmp_path / f"w/logs/rank-{rank}.log").read_text().splitlines() for rank in range(3)]
    said = [next(line for line in log if "aside" not in line) for log in logs]
    assert out == said[0] + "\n"
    assert [f"aside {rank}" in log for rank, log in enumerate(logs)] == [True] * 3
    coordinator = out.split()[0]
    assert coordinator.startswith("127.0.0.1:") and int(coordinator.split(":")[1]) > 0
    assert said == [f"{coordinator} 3 {rank} cpu 5 --workdir {tmp_path}/w --x=1" for rank in range(3)]

    run(*arguments)  # logs are added to
    assert len((tmp_path / "w/logs/rank-2.log").read_text().splitlines()) == 4


def test_vidgen_is_what_it_runs(tmp_path):
    status, out, err = run("--processes=1", "--logs=logs", "--", "--version", cwd=tmp_path)
    assert (status, err) == (0, "") and out.startswith("vidgen ") and (tmp_path / "logs/rank-0.log").read_text() == out


def test_when_one_fails_the_others_are_ended_and_its_last_words_shown(script, tmp_path):
    logs = tmp_path / "logs"
    run("--logs", logs, "--", script("print('of an earlier run')"))
    fails = script(
        "if rank == 1:\n    print('\\n'.join(f'line {n}' for n in range(30)))\n    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"
    )
    began = time.time()
    status, _, err = run("--logs", logs, "--", fails)
    assert status == 3 and time.time() - began < 20
    told, *tail = err.splitlines()
    assert told == (
        f"local.py: process 1 of 2 failed with exit status 3; the others were ended. {logs}/rank-1.log ends with:"
    )
    assert tail == [f"  line {n}" for n in range(15, 30)]

    script("if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)")
    status, _, err = run("--logs", logs, "--", fails)
    assert status == 137
    assert (
        err.splitlines()[0].startswith("local.py: process 1 of 2 was ended by SIGKILL") and len(err.splitlines()) == 1
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_all_and_what_they_make_of_it_is_the_status(number, script, tmp_path):
    waits = script(
        "def stop(number, frame):\n    print('saved', rank)\n    sys.exit(128 + number)\n"
        "for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):\n    signal.signal(n, stop)\n"
        "print('ready')\ntime.sleep(60)"
    )
    process = start("--processes=3", "--logs", tmp_path, "--", waits)
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(3)]
    while not all(log.exists() and log.read_text() == "ready\n" for log in logs):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and (out, err) == ("ready\nsaved 0\n", "")
    assert [log.read_text() for log in logs] == [f"ready\nsaved {rank}\n" for rank in range(3)]


def test_who_dies_of_the_signal_did_not_fail(script, tmp_path):
    process = start("--logs", tmp_path, "--", script("print('ready')\ntime.sleep(60)"))
    while not all((tmp_path / f"rank-{rank}.log").exists() for rank in range(2)) or not all(
        (tmp_path / f"rank-{rank}.log").read_text() for rank in range(2)
    ):
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--processes=0", "--", "train"), "local.py: error: --processes=0: expected at least 1"),
        (("--devices=-1", "--", "train"), "local.py: error: --devices=-1: expected at least 1"),
        (("--processes=2",), "nothing to run: expected -- and a verb of vidgen"),
        (("--logs=x", "--"), "nothing to run: expected -- and a verb of vidgen"),
        (("--", "train", "--config", "c.py"), "--logs is missing, and the command has no --workdir"),
        (("--logs=/dev/null/x", "--", "train"), "--logs=/dev/null/x: Not a directory; expected a directory"),
        (("train", "--workdir=x"), "unrecognized arguments: train --workdir=x"),
    ],
)
def test_bad_calls(arguments, says, tmp_path):
    status, out, err = run(*arguments, cwd=tmp_path)
    assert status == 2 and out == "" and says in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_help_teaches():
    status, out, _ = run("--help")
    assert status == 0
    for words in ("python launch/local.py --processes 2 --devices 2 -- train --config", "--devices", "rank-N.log"):
        assert words in out


def test_a_dry_run_prints_what_a_shell_can_run_as_it_is(script, tmp_path):
    say = script("print(rank, os.environ['JAX_NUM_CPU_DEVICES'], *sys.argv[1:])")
    logs = tmp_path / "the logs"
    status, out, err = run("--devices=3", "--logs", logs, "--dry_run", "--", say, "a b")
    assert (status, err) == (0, "") and len(out.splitlines()) == 3 and not logs.exists()
    logs.mkdir()
    subprocess.run(["bash", "-c", out], check=True, timeout=60)
    assert [(logs / f"rank-{rank}.log").read_text() for rank in range(2)] == ["0 3 a b\n", "1 3 a b\n"]
