"""How many threads read, and what happens when what they read never comes."""

import os
import subprocess
import sys
import threading
import time

import pytest

from medsiglip_jax.files import limits, threads

CORES = len(os.sched_getaffinity(0))


def groups(tmp_path, own, **files):
    """A folder of control groups; the names of files have "__" for "/" and "_max" for ".max"."""
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max")
        path = path.with_name(path.name.replace("cpu_cfs", "cpu.cfs"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "cgroup", tmp_path / "own"


V1 = "12:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/\n"


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 2),  # rounded up
        ("0::/\n", {"cpu_max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu_max": "max 100000\n"}, 8),
        ("0::/\n", {}, 8),
        ("", {"cpu_max": "100000 100000\n"}, 8),
        # The strictest of a group and those above it, whichever that is.
        ("0::/a/b\n", {"a__b__cpu_max": "max 100000\n", "a__cpu_max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a__b__cpu_max": "200000 50000\n", "a__cpu_max": "max 100000\n"}, 4),
        ("0::/a\n", {"a__cpu_max": "500000 100000\n", "cpu_max": "210000 100000\n"}, 3),
        # A container's view: a path of the host that is not mounted, or one above its root.
        ("0::/kubepods/pod1\n", {"cpu_max": "250000 100000\n"}, 3),
        ("0::/../../x\n", {"x__cpu_max": "100000 100000\n"}, 1),
        # Version 1.
        (V1, {"cpu,cpuacct__docker__ab__cpu_cfs_quota_us": "600000\n",
              "cpu,cpuacct__docker__ab__cpu_cfs_period_us": "100000\n"}, 6),
        (V1, {"cpu,cpuacct__cpu_cfs_quota_us": "25000\n",
              "cpu,cpuacct__cpu_cfs_period_us": "50000\n"}, 1),
        (V1, {"cpu,cpuacct__docker__ab__cpu_cfs_quota_us": "-1\n",
              "cpu,cpuacct__docker__ab__cpu_cfs_period_us": "100000\n"}, 8),
        # What nobody writes, and a quota above the cores.
        ("0::/\n", {"cpu_max": "none at all\n"}, 8),
        ("0::/\n", {"cpu_max": "900000 100000\n"}, 8),
        ("no colons\n0::\n", {"cpu_max": "200000 100000\n"}, 2),
    ],
)  # fmt: skip
def test_a_container_has_the_cores_of_its_quota(tmp_path, monkeypatch, own, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    assert threads.processors(*groups(tmp_path, own, **files)) == expected


def test_a_process_that_is_bound_to_few_cores_has_those(tmp_path):
    code = "from medsiglip_jax.files import threads; print(threads.processors())"
    bound = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {code}"
    found = subprocess.run([sys.executable, "-c", bound], capture_output=True, text=True)
    assert found.stdout == "1\n", found.stderr
    assert threads.processors(tmp_path, tmp_path / "none") == CORES


def test_the_number_of_threads_can_be_given():
    with threads.use(3), threads.use(None):
        assert threads.workers() == 3
    assert threads.workers() == threads.processors()
    with pytest.raises(ValueError, match="--workers 0: expected at least 1"), threads.use(0):
        pass


def test_work_begins_in_order_on_so_many_threads_and_they_end():
    begun, most, running, lock = [], 0, 0, threading.Lock()

    def work(number):
        nonlocal most, running
        with lock:
            begun.append(number)
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1
        if number == 40:
            raise KeyError(number)
        return number * 2

    with threads.Threads("testing", 3) as pool:
        results = pool.map(work, range(50), str)
        assert [next(results) for _ in range(40)] == [2 * n for n in range(40)]
        with pytest.raises(KeyError):
            next(results)
    assert begun == sorted(begun) and 1 < most <= 3
    assert not [t for t in threading.enumerate() if t.name.startswith("testing")]


def hanging(monkeypatch, seconds):
    """A read that never ends until the event returned is set, under a limit of `seconds`."""
    monkeypatch.setattr(limits, "_limits", limits.parse(None, None, None, seconds))
    return threading.Event()


def test_what_hangs_is_named_and_does_not_hold_the_caller(monkeypatch):
    release = hanging(monkeypatch, 0.1)
    with pytest.raises(threads.Stalled, match=r"^b: not read within 0\.1 s; is its disk"):
        with threads.Threads("testing", 2) as pool:
            list(pool.map(lambda n: release.wait() if n == "b" else n, "abcdef", str))
    assert threads.are_left()
    release.set()
    for thread in threads._left:
        thread.join()
    assert not threads.are_left()


def test_zero_waits_for_ever_and_errors_of_the_work_are_its_own(monkeypatch):
    hanging(monkeypatch, 0.0)

    def work(_):
        time.sleep(0.05)
        raise TimeoutError("of a socket")

    with threads.Threads("testing", 1) as pool, pytest.raises(TimeoutError, match="of a socket"):
        list(pool.map(work, [1], str))


def test_a_list_may_take_long_while_it_grows(monkeypatch):
    release = hanging(monkeypatch, 0.3)

    def make(step):
        for _ in range(8):
            time.sleep(0.06)
            step()
        return "done"

    assert threads.watched(make, "the list") == "done"
    with pytest.raises(threads.Stalled, match="the list: not read within"):
        threads.watched(lambda step: release.wait(), "the list")
    release.set()
    with pytest.raises(KeyError):
        threads.watched(lambda step: {}["x"], "the list")
