"""Progress bars: silent where nobody looks, drawn on a terminal, gone afterwards."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbits.cli import main
from fewbits.core.progress import progress

pty = pytest.importorskip("pty")

ERASED = "\x1b[1A\x1b[2K"
"""One line up, and that line erased: the terminal is as it was."""


class Terminal:
    """A pseudo-terminal as standard error, within a ``with`` block; `drawn` is what it got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.drawn = ""

    def __enter__(self) -> Terminal:
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w")
        for name, value in (("TERM", "xterm"), ("COLUMNS", "100")):
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.setattr(sys, "stderr", self.stream)
        return self

    def __exit__(self, *error: object) -> None:
        self.monkeypatch.undo()
        self.stream.close()
        received = b""
        # Once the other end is closed, reading ends with an error (Linux) or with nothing.
        with contextlib.suppress(OSError):
            while piece := os.read(self.master, 2**16):
                received += piece
        os.close(self.master)
        self.drawn = received.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    return Terminal(monkeypatch)


def test_silent_where_standard_error_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("encoding", 3) as bar:
        for _ in range(3):
            bar.step("docs.npy")
    assert stream.getvalue() == ""


def test_silent_where_it_is_not_wanted(terminal: Terminal) -> None:
    with terminal, progress("encoding", 3, show=False) as bar:
        bar.step("docs.npy")
    assert terminal.drawn == ""


def test_bar_on_a_terminal_counts_and_goes_away(terminal: Terminal) -> None:
    with terminal, progress("encoding", 4) as bar:
        bar.step("first.npy", 0)
        bar.step("second.npy", 3)
    assert "encoding" in terminal.drawn
    assert "━" in terminal.drawn
    assert " 75%" in terminal.drawn
    assert "second.npy" in terminal.drawn
    assert terminal.drawn.endswith(ERASED)


def test_names_are_not_taken_for_markup(terminal: Terminal) -> None:
    with terminal, progress("encoding", 1) as bar:
        bar.step("[red]docs[/nothing].npy")
    assert "[red]docs[/nothing].npy" in terminal.drawn


def test_errors_pass_through_and_take_the_bar_away(terminal: Terminal) -> None:
    def interrupted() -> None:
        with terminal, progress("encoding", 4) as bar:
            bar.step("docs.npy")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.drawn.endswith(ERASED)


def test_one_bar_may_hold_another(terminal: Terminal) -> None:
    with terminal, progress("comparing", 2) as outer:
        outer.step("bebr")
        with progress("training", 2) as inner:
            inner.step("step 1")
    assert "comparing" in terminal.drawn
    assert "training" in terminal.drawn


def test_commands_draw_a_bar(
    terminal: Terminal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = tmp_path / "docs.npy"
    np.save(docs, np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32))
    for command, label in (("compare", "comparing"), ("encode", "encoding")):
        option = "--methods" if command == "compare" else "--method"
        with terminal:
            assert main([command, str(docs), option, "int8"]) == 0
        assert label in terminal.drawn
        assert "int8" in capsys.readouterr().out
