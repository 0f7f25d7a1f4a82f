"""What a log is told of long work: a line a minute, and no bar."""

import re
import time

import pytest

from medsiglip_jax.cli import output

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def often(monkeypatch):
    """Lines come every 20 ms, not every minute."""
    monkeypatch.setattr(output, "_SECONDS_BETWEEN_LINES", 0.02)


def until(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_short_work_says_nothing(capsys):
    with output.progress_bar("image", 10) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_a_log_gets_lines_and_no_control_characters(often, capsys):
    said = ""

    def lines():
        nonlocal said
        said += capsys.readouterr().err
        return said.splitlines()

    with output.progress_bar("image", 4000) as bar:
        until(lambda: any(line.startswith("0 of 4,000 images in 0:00:00") for line in lines()))
        bar.update(1000)
        bar.set_postfix({"device busy": "87%"})
        until(lambda: re.search(
            r"^1,000 of 4,000 images in 0:00:0\d, [\d.e+]+/s, 0:00:0\d left, device busy 87%$",
            "\n".join(lines()), re.M,
        ))  # fmt: skip
        bar.update(3000)  # done: what follows is other work
        time.sleep(0.05)
        lines()
        said = ""
        time.sleep(0.1)
        assert not lines()
    assert "\r" not in said and "\x1b" not in said


def test_of_work_without_an_end_a_line_comes_only_when_there_is_news(often, capsys):
    with output.progress_bar("file") as bar:
        time.sleep(0.1)
        assert capsys.readouterr().err == ""
        bar.update(12)
        time.sleep(0.2)
    assert capsys.readouterr().err.count("12 files in 0:00:00") == 1


def test_rows_of_an_earlier_run_do_not_count_for_the_rate():
    lines = output._Lines("input", 100, 50)
    lines.update(10)
    assert lines.line(20.0) == "60 of 100 inputs in 0:00:20, 0.5/s, 0:01:20 left"
    lines.close()


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with output.progress_bar("image", 4) as bar:
        bar.update(4)
    assert "100%" in capsys.readouterr().err
