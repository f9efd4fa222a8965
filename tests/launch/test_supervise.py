"""launch/supervise.py: what is started again, what is not, what is killed, and what is left behind: nothing.

The commands here are small scripts; tests/parallel/test_survival.py has real runs.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"

# What a run does that a supervisor sees; `attempt` counts from 1.
BEGIN = """
import json, os, pathlib, signal, subprocess, sys, time
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
counter = workdir / "counter"
attempt = int(counter.read_text()) + 1 if counter.exists() else 1
counter.write_text(str(attempt))

def beat(step, phase="step", slow=False, process=0, of=1):
    (workdir / "heartbeats").mkdir(exist_ok=True)
    state = {"process": process, "of": of, "host": "b", "pid": os.getpid(), "step": step, "phase": phase, "slow": slow}
    path = workdir / f"heartbeats/rank-{process}.json"
    path.with_suffix(".tmp").write_text(json.dumps(state | {"moved": time.time()}))
    os.replace(path.with_suffix(".tmp"), path)

def save(step):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)

print("attempt", attempt, flush=True)
"""


@pytest.fixture
def command(tmp_path):
    """Writes a script; returns what runs it under the supervisor."""

    def write(body, *options):
        (tmp_path / "w").mkdir(exist_ok=True)
        (tmp_path / "run.py").write_text(BEGIN + body)
        own = [sys.executable, str(LAUNCH / "supervise.py"), *options]
        return [*own, "--", str(tmp_path / "run.py"), "train", "--workdir", str(tmp_path / "w")]

    return write


def started(command):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(command):
    process = started(command)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def report(tmp_path):
    return json.loads((tmp_path / "w/supervisor.json").read_text())


def incidents(tmp_path):
    path = tmp_path / "w/incidents.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) if line.endswith("}") else None for line in lines]


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def soon(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_what_dies_is_started_again_until_it_is_done(command, tmp_path):
    body = """
save(attempt * 10)
if attempt == 1:
    (workdir / "incidents.jsonl").write_text('{"cut')  # by a kill
    os.kill(os.getpid(), 9)
sys.exit({2: 7}.get(attempt, 0))
"""
    status, out, err = run(command(body, "--restarts=1"))  # each attempt gets further, so that 1 is enough
    assert status == 0 and out == "attempt 1\nattempt 2\nattempt 3\n"
    found = report(tmp_path)
    assert (found["outcome"], found["restarts"]) == ("done", 2)
    assert [(a["status"], a["step"], a["further"]) for a in found["attempts"]] == [
        (137, 10, True),
        (7, 20, True),
        (0, 30, True),
    ]
    assert found["attempts"][0]["how"] == "was ended by SIGKILL" and found["attempts"][1]["log"] == ["attempt 2"]
    cut, *rows = incidents(tmp_path)
    assert cut is None and [(row["kind"], row["step"]) for row in rows] == [("restart", 10), ("restart", 20)]
    assert "ended with exit status 7" in rows[1]["text"] and abs(rows[1]["time"] - time.time()) < 60
    assert "was ended by SIGKILL" in err and "started again in 1 s" in err


@pytest.mark.parametrize(("status", "outcome"), [(2, "for the user to mend"), (143, "stopped"), (138, "stopped")])
def test_what_the_user_has_to_mend_or_asked_for_is_not_started_again(status, outcome, command, tmp_path):
    ended, out, _ = run(command(f"sys.exit({status})"))
    assert (ended, out) == (status, "attempt 1\n")
    assert report(tmp_path)["outcome"] == outcome and not incidents(tmp_path)


def test_a_host_of_several_has_a_report_of_its_own_without_credentials(command, tmp_path):
    body = "print('hf_' + 24 * 'a')\nsys.exit(attempt == 1)"
    with_one = [*command(body, "--host=1"), "--config.data.token=" + "gh" + "p_" + 24 * "b"]
    assert run(with_one)[0] == 0
    text = (tmp_path / "w/supervisor-1.json").read_text()
    found = json.loads(text)
    assert (found["outcome"], found["restarts"]) == ("done", 1) and not incidents(tmp_path)  # host 0 tells of those
    assert "train --workdir" in found["command"] and 24 * "a" not in text and 24 * "b" not in text
    assert found["attempts"][0]["log"] == ["attempt 1", "***"]
    assert run(command("", "--host=0"))[0] == 0 and (tmp_path / "w/supervisor-0.json").exists()


@pytest.mark.parametrize(
    ("when", "status", "outcome"),
    [
        ("(workdir / 'counter').read_text() == '3'", 2, "for the user to mend"),  # while the other one runs
        ("len(report(1)['attempts']) == 2", 143, "stopped"),  # while it waits before it is started again
    ],
)
def test_a_host_ends_as_another_did_and_does_not_wait_for_it(when, status, outcome, command, tmp_path):
    body = f"""
def report(host):
    path = workdir / f"supervisor-{{host}}.json"
    return json.loads(path.read_text()) if path.exists() else {{"attempts": []}}

if sys.argv[-1] == "--host=0":
    while not {when}:
        time.sleep(0.02)
    sys.exit({status})
while {status} == 2 and attempt == 3 and report(0)["outcome"] == "running":
    time.sleep(0.02)
sys.exit(75)
"""
    hosts = [[*command(body, f"--host={host}"), f"--host={host}"] for host in range(2)]
    before = {"outcome": "given up", "status": 75, "attempts": [{"how": "ended with exit status 75"}]}  # yesterday
    (tmp_path / "w/supervisor-2.json").write_text(json.dumps(before))
    first = started(hosts[0])
    assert first.stdout.readline() == "attempt 1\n"
    ended, out, err = run(hosts[1])
    first.communicate(timeout=30)
    assert (first.returncode, ended, out) == (status, status, "attempt 2\nattempt 3\n")
    told = f"the supervisor of host 0 has ended: {outcome}; its last attempt ended with exit status {status}. This one"
    assert told in err and "started again in 1 s" in err
    found = json.loads((tmp_path / "w/supervisor-1.json").read_text())
    assert (found["outcome"], found["status"], found["restarts"]) == (outcome, status, 1)


def test_what_gets_no_further_is_given_up_with_a_report(command, tmp_path):
    body = "beat(attempt == 1 and 7 or 5)\nprint('of no use', file=sys.stderr)\nsys.exit(75)"
    status, out, err = run(command(body, "--restarts=2"))
    assert status == 75 and out.count("attempt") == 3
    assert [a["step"] for a in report(tmp_path)["attempts"]] == [7, 7, 7]
    assert [a["further"] for a in report(tmp_path)["attempts"]] == [True, False, False]
    assert "started again in 1 s (1 of 2 without progress)" in err
    assert "started again in 2 s (2 of 2 without progress)" in err
    assert "given up: 2 restarts brought it no further than step 7:" in err
    assert "  attempt 3 ended with exit status 75 after " in err and err.rstrip().endswith("of no use")
    assert report(tmp_path)["outcome"] == "given up"


def test_what_hangs_is_killed_with_all_it_started_and_started_again(command, tmp_path):
    body = """
if attempt == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    os.kill(child.pid, signal.SIGSTOP)
    (workdir / "pids").write_text(f"{os.getpid()} {child.pid}")
    beat(4)
    time.sleep(600)
beat(5)
beat(5, "ended")
"""
    began = time.monotonic()
    status, _, err = run(command(body, "--hang=1.5"))
    assert status == 0 and time.monotonic() - began < 40
    assert "supervise.py: hung, process 0 on b for " in err and " s in step 4 (step), and was killed after " in err
    assert not any(alive(pid) for pid in (tmp_path / "w/pids").read_text().split())


def test_what_compiles_has_longer_and_what_moves_is_left_alone(command, tmp_path):
    body = "beat(0, 'compile', slow=True)\ntime.sleep(3)\nfor n in range(8):\n    beat(n)\n    time.sleep(0.3)"
    status, out, _ = run(command(body, "--hang=1"))
    assert (status, out) == (0, "attempt 1\n")
    # Process 0 is in its first step and waits for the other, which still compiles.
    both = "beat(0, 'compile', True, 1)\nbeat(1)\ntime.sleep(2.5)\nbeat(1, process=1)\ntime.sleep(0.7)\n"
    both += "beat(2, 'ended')\nbeat(2, 'ended', process=1)"
    status, out, _ = run(command(both, "--hang=1"))
    assert (status, out) == (0, "attempt 2\n")
    # What an earlier attempt left behind is no sign of this one's.
    status, out, _ = run(command("time.sleep(3)", "--hang=1"))
    assert (status, out) == (0, "attempt 3\n")


def test_what_has_ended_and_is_still_there_is_killed_and_started_again_unless_the_run_was_done(command, tmp_path):
    body = """
(workdir / "config.json").write_text('{"train": {"steps": 9}}')
if attempt == 1:
    beat(4, "ended", process=1, of=2)
    for n in range(6):  # the other goes on, and is waited for
        beat(n, of=2)
        time.sleep(0.3)
(workdir / "last").write_text(str(os.getpid()))
beat({1: 5, 2: 9}[attempt], "ended", of=3 - attempt)
time.sleep(600)
"""
    status, out, err = run(command(body, "--hang=1"))
    assert (status, out) == (0, "attempt 1\nattempt 2\n") and not alive((tmp_path / "w/last").read_text())
    attempts = report(tmp_path)["attempts"]
    assert report(tmp_path)["outcome"] == "done" and [(a["status"], a["step"]) for a in attempts] == [(75, 5), (0, 9)]
    assert attempts[0]["seconds"] > 1.8 and "ended, as all its processes say, was still there 1 s" in attempts[0]["how"]
    assert "done, after 2 attempts; the last came to the run's end, as all its processes say, was still there" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_ends_it(number, command, tmp_path):
    body = """
came = []
for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(n, lambda n, _: came.append(n))
print("ready", flush=True)
while not came:
    time.sleep(0.05)
time.sleep(0.5)
print("saved", len(came), flush=True)
sys.exit(128 + came[0])
"""
    process = started(command(body))
    assert [process.stdout.readline() for _ in range(2)] == ["attempt 1\n", "ready\n"]
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number and out == "saved 1\n"
    assert report(tmp_path)["outcome"] == "stopped"


def test_a_signal_between_two_attempts_ends_it_too(command, tmp_path):
    process = started(command("sys.exit(1)"))
    assert soon(lambda: len(incidents(tmp_path)) == 2)  # it waits for 2 s now
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143 and report(tmp_path)["outcome"] == "stopped"


LEAVES = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
(workdir / "child").write_text(str(child.pid))
"""


def test_what_a_command_leaves_behind_is_ended(command, tmp_path):
    assert run(command(LEAVES))[0] == 0
    assert not alive((tmp_path / "w/child").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="children that end with their parents are a matter of Linux")
def test_no_rank_outlives_a_supervisor_that_is_killed(tmp_path):
    (tmp_path / "rank.py").write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ['VIDGEN_PROCESS']).write_text(str(os.getpid()))\n"
        "time.sleep(600)"
    )
    run = [str(LAUNCH / "local.py"), "--processes=2", "--", str(tmp_path / "rank.py"), "--workdir", str(tmp_path)]
    process = subprocess.Popen([sys.executable, str(LAUNCH / "supervise.py"), "--", *run])
    ranks = [tmp_path / f"rank-{n}" for n in range(2)]
    assert soon(lambda: all(rank.exists() and rank.read_text() for rank in ranks))
    os.kill(int(ranks[1].read_text()), signal.SIGSTOP)
    process.kill()
    process.wait()
    assert soon(lambda: not any(alive(rank.read_text()) for rank in ranks), 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--restarts=-1", "--", "true", "--workdir=x"), "--restarts=-1: expected 0 or more"),
        (("--hang=-2", "--", "true", "--workdir=x"), "--hang=-2.0: expected 0 or more"),
        ((), "nothing to run: expected -- and a command"),
        (("--", "true"), "the command has no --workdir"),
        (("--", "no-such-program", "--workdir=x"), "no-such-program: not found; expected a program, or a script"),
        (("--", "none.py", "--workdir", "x"), "none.py: not found"),
        (("--", "true", "--workdir=/dev/null/x"), "--workdir=/dev/null/x: Not a directory; expected a directory"),
    ],
)
def test_bad_calls(arguments, says, tmp_path):
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "supervise.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == "" and says in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_teaches_and_a_dry_run_says_what_would_be_run(command, tmp_path):
    status, out, _ = run([sys.executable, str(LAUNCH / "supervise.py"), "--help"])
    assert status == 0
    for words in ("launch/supervise.py -- vidgen train", "--restarts", "--hang", "supervisor.json"):
        assert words in out
    status, out, _ = run(command("", "--dry_run"))
    assert status == 0 and out == f"{sys.executable} {tmp_path}/run.py train --workdir {tmp_path}/w\n"
    assert not list((tmp_path / "w").iterdir())
