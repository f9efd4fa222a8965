"""Being asked to stop: which signals ask, what the second one does, and what was there before."""

import os
import signal

import pytest

from vidgen.training.resilience import SIGNALS, StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_asks_and_the_second_ends(number, capfd):
    before = [signal.getsignal(n) for n in SIGNALS]
    with StopSignal() as stop:
        assert not stop.requested and stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.requested and stop.number == number and stop.name == number.name
        assert f"{number.name}: stopping after a step and saving" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            stop._handle(number, None)
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_which_one_came_first_is_kept():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            stop._handle(signal.SIGTERM, None)
        assert stop.number == signal.SIGUSR1
