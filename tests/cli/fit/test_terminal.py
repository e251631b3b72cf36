"""What fit shows on a terminal, a pseudo-terminal of some width: one line of a bar, and none of it left behind."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from helpers import ROOT

FIT = [sys.executable, "-m", "lit_lipschitz", "fit", "--config", "digits", "--trainer.accelerator", "cpu"]
BAR = re.compile(r"^(?:epoch \d|Validation|Testing).*\d+/\d+")


class Terminal:
    """A process on a terminal, and what its screen shows.

    It knows the control sequences that a progress bar uses: carriage return, up, erase line.
    """

    def __init__(self, command, width):
        self.width, self.lines, self.row, self.column = width, [""], 0, 0
        self.most_bars = 0  # most lines of bars that were on the screen at a time
        self.text = ""  # all that was written
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
        environment.pop("COLUMNS", None)
        # A background shell ignores SIGINT and hands that down.
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)

    def run(self, interrupt_at=None):
        """Reads until the process ends; sends SIGINT once a line fits a pattern."""
        pending = ""
        while True:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:
                break
            text = data.decode(errors="replace")
            self.text += text
            pending += text
            pending = self._feed(pending)
            if interrupt_at and any(re.match(interrupt_at, line) for line in self.lines):
                interrupt_at = self.process.send_signal(signal.SIGINT)
        os.close(self._master)
        return self.process.wait(timeout=60)

    def _feed(self, text):
        for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+|\x1b.*$", text, re.S):
            if part.startswith("\x1b"):
                if not re.fullmatch(r"\x1b\[[?0-9;]*[A-Za-z]", part):
                    return part  # the rest of it has not been read yet
                if part.endswith("A"):
                    self.row = max(0, self.row - int(part[2:-1] or 1))
                elif part == "\x1b[2K":
                    self.lines[self.row] = ""
                else:
                    assert part[-1] in "mhl", part
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            else:
                self._write(part)
        self.most_bars = max(self.most_bars, len(self.bars()))
        return ""

    def _down(self):
        self.row += 1
        self.lines += [""] * (self.row + 1 - len(self.lines))

    def _write(self, part):
        for char in part:
            if self.column == self.width:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
            self.column += 1

    def bars(self):
        """The lines that are a progress bar's."""
        return [line for line in self.lines if BAR.match(line)]


@pytest.mark.parametrize("width", [pytest.param(60, marks=pytest.mark.slow), 80, 200])
def test_the_bar_is_one_line_and_none_of_it_stays(width):
    terminal = Terminal([*FIT, "--trainer.max_epochs", "3"], width)
    assert terminal.run() == 0
    assert terminal.most_bars == 1
    assert terminal.bars() == []
    assert len([line for line in terminal.lines if re.match(r" *\d/3 ", line)]) == 3
    assert len([line for line in terminal.lines if line.startswith("epoch")]) == 1
    assert terminal.lines[-4].startswith("test_loss")
    assert "loading" not in "".join(terminal.lines)


def test_after_an_interruption_nothing_of_the_bar_stays():
    terminal = Terminal([*FIT, "--trainer.max_epochs", "999"], 80)
    assert terminal.run(interrupt_at=r" *3/999 ") == 130
    assert terminal.most_bars == 1
    assert terminal.bars() == []
    assert any("resume with --ckpt_path last" in line for line in terminal.lines)


def test_something_shows_before_torch_is_imported():
    program = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(name, *more):\n"
        "        if name == 'torch': print('IMPORT', file=sys.stderr)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from lit_lipschitz.cli.main import main\n"
        "sys.exit(main())\n"
    )
    terminal = Terminal([sys.executable, "-c", program, *FIT[3:], "--trainer.fast_dev_run", "1"], 80)
    assert terminal.run() == 0
    assert "loading torch and Lightning ..." in terminal.text.partition("IMPORT")[0]
    assert "IMPORT" in terminal.text
