"""Several processes that share the shards of a run: parts without contact, and Ray actors."""

import functools
import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from image_files import write_pictures
from PIL import Image

import medsiglip_jax
from medsiglip_jax import cli
from medsiglip_jax.cli import loading, runners
from medsiglip_jax.data import inputs
from medsiglip_jax.files import limits, locks, places, storage
from medsiglip_jax.inference import decoders, ray_actor, ray_cluster, ray_runner, run_folder, share
from medsiglip_jax.inference import embed as embedding
from medsiglip_jax.inference.embed import EmbedOptions, Incomplete, embed, embed_part
from medsiglip_jax.inference.manifest import Manifest, Weights
from medsiglip_jax.inference.share import Share

OPTIONS = EmbedOptions(shard_size=4, batch_size=2)
SHARDS = 7  # of the 26 rows


@pytest.fixture(scope="module")
def model(checkpoint):
    return medsiglip_jax.load(checkpoint)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty-five images and a damaged one."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(1)
    write_pictures(folder, 25, rng)
    (folder / "17.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    return folder


@pytest.fixture(scope="module")
def rows(images):
    return inputs.rows([images])


@pytest.fixture(scope="module")
def whole(model, rows, tmp_path_factory):
    """The files of a run of one process, by name."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    embed(model, rows, folder, OPTIONS)
    return content(folder)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_parts_in_any_order_make_the_files_of_one_run(model, rows, whole, tmp_path, order):
    """Part 0 may be the last to run. Until then each says which are missing."""
    seen = []
    for done, index in enumerate(order, start=1):
        part = Share(index, 3)
        seen.append(0)

        def count(progress):
            seen[-1] += progress.rows

        result = embed_part(model, rows, tmp_path / "out", part, OPTIONS, count)
        assert seen[-1] == part.rows(len(rows), 4)
        if done < 3:
            assert isinstance(result, Incomplete)
            assert result.to_dict()["missing_parts"] == sorted(order[done:])
            assert "manifest.json" not in content(tmp_path / "out")
    assert content(tmp_path / "out") == whole
    assert sum(seen) == len(rows)
    assert embed_part(model, rows, tmp_path / "out", Share(1, 3), OPTIONS) == result


def test_a_part_that_was_stopped_is_repeated_alone(model, rows, whole, tmp_path):
    def stop(progress):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        embed_part(model, rows, out, Share(2, 3), OPTIONS, stop)
    for index in (0, 1):
        assert isinstance(embed_part(model, rows, out, Share(index, 3), OPTIONS), Incomplete)
    embed_part(model, rows, out, Share(2, 3), OPTIONS)
    assert content(out) == whole


def test_parts_that_start_and_finish_together(model, rows, whole, tmp_path):
    """All begin at one moment, and all have written their shards before the first looks what is
    missing: one writes the manifest, and all return it."""
    begin, last = threading.Barrier(3), threading.Barrier(3)

    def run(index):
        part, left = Share(index, 3), [Share(index, 3).rows(len(rows), 4)]

        def wait(progress):
            left[0] -= progress.rows
            if not left[0]:
                last.wait(60)

        begin.wait(60)
        return embed_part(model, rows, tmp_path / "out", part, OPTIONS, wait)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, range(3)))
    complete = [result for result in results if not isinstance(result, Incomplete)]
    assert complete and all(result == complete[0] for result in complete)
    assert content(tmp_path / "out") == whole


def test_who_dies_while_it_writes_the_manifest_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_POLL_SECONDS", 0.01)
    looks, manifest = (
        [],
        Manifest(model=Weights(), preprocess="x", normalized=True, dim=1, parts=()),
    )

    def commit(check):
        looks.append(check)
        return manifest

    with ThreadPoolExecutor(1) as pool:
        with locks.lock(tmp_path / ".lock-commit"):  # another part
            waiting = pool.submit(run_folder.once, tmp_path, commit)
            assert not waiting.done() and not looks
        assert waiting.result(60) == manifest and len(looks) == 1


def test_a_manifest_that_is_refused_ends_the_part(tmp_path):
    """The error of a part that used another decoder is of the type of a lock that is held."""

    def commit(check):
        raise FileExistsError("part-00001.parquet: holds rows of another run (versions differ)")

    with pytest.raises(FileExistsError, match="versions differ"):
        run_folder.once(tmp_path, commit)


def test_parts_of_other_decoders_are_refused_before_the_work(model, rows, tmp_path, monkeypatch):
    embed_part(model, rows, tmp_path / "out", Share(0, 3), OPTIONS)
    monkeypatch.setattr(decoders, "_version", lambda name: "0.0")
    monkeypatch.setattr(decoders, "of_every_run", lambda: run_versions)
    run_versions = json.loads((tmp_path / "out" / "run.json").read_text())["versions"]
    with pytest.raises(FileExistsError, match="versions differ: .*to finish the run"):
        embed_part(model, rows, tmp_path / "out", Share(1, 3), OPTIONS)
    assert not (tmp_path / "out" / "part-00001.parquet").exists()


def test_a_part_that_runs_already_is_refused_and_others_are_not(model, rows, tmp_path):
    with locks.lock(tmp_path / "out" / ".lock-1"):
        with pytest.raises(FileExistsError, match="another run is writing here"):
            embed_part(model, rows, tmp_path / "out", Share(1, 3), OPTIONS)
        embed_part(model, rows, tmp_path / "out", Share(0, 3), OPTIONS)


def test_of_two_runs_that_begin_at_once_one_is_refused(model, rows, tmp_path, monkeypatch):
    """Each finds an empty folder; the second must find what the first has written meanwhile."""
    out = tmp_path / "out"
    embed_part(model, rows, out, Share(0, 3), OPTIONS)
    before = (out / "run.json").read_bytes()
    monkeypatch.setattr(run_folder, "visible", lambda folder: set())
    with pytest.raises(FileExistsError, match=r"another run \(preprocess differ\)"):
        embed_part(model, rows, out, Share(1, 3), replace(OPTIONS, preprocess="serving"))
    embed_part(model, rows, out, Share(1, 3), OPTIONS)
    assert (out / "run.json").read_bytes() == before


def test_a_file_that_must_be_new_is_written_once(tmp_path):
    with limits.use(limits.parse("memory", None, None, None)):
        remote = places.at("memory://bucket/new")
    for place in (tmp_path / "new", remote):
        with storage.new_file(place, exclusive=True) as partial:
            partial.write_text("first")
        with pytest.raises(FileExistsError), storage.new_file(place, exclusive=True) as partial:
            partial.write_text("second")
        assert place.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_every_shard_has_one_owner():
    for count in (1, 2, 3, 64):
        parts = [Share(index, count) for index in range(count)]
        shards = [number for part in parts for number in part.of(SHARDS)]
        assert sorted(shards) == list(range(SHARDS))
        assert sum(part.rows(26, 4) for part in parts) == 26
        for part in parts:
            assert part.owners(part.of(SHARDS)) in ([part.index], [])


@pytest.mark.parametrize("text", ["3/3", "1", "0/0", "-1/3", "1/3/5", "a/b", "", "1 /3"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ValueError, match="parts are counted from 0; expected "):
        share.parse(text)


def test_the_command_says_what_is_missing(checkpoint, images, tmp_path, capsys):
    command = ["embed", "--model", str(checkpoint), str(images), "--shard-size", "4", "--json"]
    out = ["--output", str(tmp_path / "out")]
    assert cli.main([*command, *out, "--part", "1/2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"part": "1/2", "shards": 7, "missing_shards": 4, "missing_parts": [0]}
    assert cli.main([*command, *out, "--part", "0/2"]) == 3  # one image is damaged
    last = capsys.readouterr().out
    assert cli.main([*command, "--output", str(tmp_path / "whole")]) == 3
    assert capsys.readouterr().out == last
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    (tmp_path / "out/.lock-commit").touch()  # as a kill right after the manifest leaves it
    assert cli.main([*command, *out, "--part", "1/2"]) == 3
    assert not (tmp_path / "out/.lock-commit").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--part", "2/2"], "--part 2/2: parts are counted from 0; expected 0/2 to 1/2"),
        (["--part", "0/2", "--distributed"], "--part cannot be used with --distributed"),
        (["--part", "0/2", "--runner", "ray"], "--runner ray cannot be used with --part"),
        (["--runner", "ray", "--process-id", "1"], "ray cannot be used with --process-id"),
        (["--actors", "2"], "--actors needs --runner ray"),
        (["--address", "auto"], "--address needs --runner ray"),
        (["--runner", "ray", "--actors", "0"], "--actors 0: expected at least 1"),
        (["--runner", "ray", "--dtype", "auto"], "--dtype auto cannot be used with --runner ray"),
        (["--runner", "ray", "--actor-resources", "GPU"], "expected such as GPU=1,CPU=8"),
        (["--runner", "ray", "--actor-resources", "CPU=0"], "expected more than 0"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, capsys, flags, said):
    command = ["embed", "--model", "m", "--output", str(tmp_path / "out"), str(tmp_path), *flags]
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- ray


def test_without_ray_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["embed", "--model", "m", "--output", str(tmp_path / "out"), str(tmp_path)]
    assert cli.main([*command, "--runner", "ray"]) == 1
    assert "pip install 'medsiglip-jax[ray]'" in capsys.readouterr().err


def hosts(*resources):
    return [{"Alive": True, "Resources": r} for r in resources] + [{"Alive": False}]


@pytest.mark.parametrize(
    "cluster, resources, room",
    [
        ([{"CPU": 8.0}], {"CPU": 8}, 1),
        ([{"CPU": 8.0}, {"CPU": 16.0}], {"CPU": 8}, 3),
        ([{"CPU": 0.0}, {"CPU": 4.0}], {"CPU": 4}, 1),  # a head that does no work
        ([{"CPU": 96.0}, {"CPU": 64.0, "GPU": 8.0}], {"GPU": 1, "CPU": 8}, 8),
        ([{"CPU": 2.0, "GPU": 4.0}], {"GPU": 1, "CPU": 1}, 2),
        ([{"CPU": 96.0, "TPU": 4.0}] * 3, {"TPU": 4, "CPU": 96}, 3),
        ([], {"CPU": 1}, 0),
    ],
)
def test_an_actor_takes_a_gpu_or_a_host(monkeypatch, cluster, resources, room):
    class Ray:
        @staticmethod
        def nodes():
            return hosts(*cluster)

    monkeypatch.setattr(ray_cluster, "import_ray", lambda: Ray)
    assert ray_cluster.default_resources() == resources
    assert ray_cluster.room(resources) == room


def test_a_host_that_is_not_like_the_others_is_refused(model, rows, tmp_path, monkeypatch):
    """It sees other files, has other weights or other decoders: its vectors would be wrong."""

    class Ray:
        get = staticmethod(lambda job: job)

    monkeypatch.setattr(ray_actor, "import_ray", lambda: Ray)
    run = embedding.record(model, rows, OPTIONS, None)
    job = embedding.Job(rows, tmp_path, OPTIONS, run, None)
    start = functools.partial(ray_actor.Actor().start, folder=str(tmp_path))
    load = lambda: model  # noqa: E731
    with pytest.raises(ValueError, match="does not see .*run.json: --output has to be a folder"):
        start(load, [job], probe="")
    with run_folder.hold(tmp_path, run):
        pass
    with pytest.raises(ValueError, match="does not see /no/such.png: all hosts have to reach"):
        start(load, [job], probe="/no/such.png")
    other = medsiglip_jax.init(model.config, seed=5)
    with pytest.raises(ValueError, match=r"would make other embeddings .*model.* differ"):
        start(lambda: other, [job], probe="")
    assert start(load, [job], probe=ray_actor.probe(rows))


@pytest.fixture
def cluster():
    """A cluster with room for two actors, on this machine."""
    ray_cluster.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 << 20
    )
    yield
    ray_cluster.import_ray().shutdown()


@pytest.mark.slow
def test_an_actor_that_is_killed_costs_nothing(checkpoint, model, tmp_path, cluster):
    """Of two actors one is killed at its work; then one finds more errors than are accepted."""
    from torture_shards import actors

    rng = np.random.default_rng(0)
    for i in range(40):  # large enough that the actors are still at work when one is killed
        pixels = rng.integers(0, 256, (1500, 1500, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png", compress_level=1)
    (tmp_path / "17.jpg").write_bytes(b"no image")
    rows, seen, killed = inputs.rows([tmp_path]), [], []
    embed(model, rows, tmp_path / "whole", OPTIONS)

    def kill(progress):
        seen.append(progress)
        if not killed and (pids := actors(b"ray::Actor.embed")):
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    load = functools.partial(medsiglip_jax.load, str(checkpoint))
    runner = ray_runner.RayRunner(load, actors=2, resources={"CPU": 1}, batch_size=2)
    with pytest.warns(UserWarning, match="an actor was lost on .* with shard"):
        embed(model, rows, tmp_path / "out", OPTIONS, kill, runner)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sum(progress.rows for progress in seen) == 41
    assert sum(progress.errors for progress in seen) == 1
    strict = replace(OPTIONS, max_errors=0)
    with pytest.raises(ValueError, match="1 inputs could not be read, more than max_errors=0"):
        embed(model, rows[16:18], tmp_path / "few", strict, runner=runner)


def test_actors_have_the_limits_of_the_command(monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: limits.current())
    before, bounds = limits.current(), limits.Limits(timeout=7.0, read_timeout=3.0)
    try:
        assert runners._load_in_actor({}, bounds) == bounds == limits.current()
    finally:
        limits.keep(before)


def test_actors_keep_programs_as_commands_do(tmp_path, monkeypatch):
    """They have the environment of the command, by which jax would write as it does itself."""
    from jax._src import compilation_cache as theirs

    from medsiglip_jax.files.compilation_cache import CompilationCache

    monkeypatch.setattr(theirs, "get_file_cache", None)
    monkeypatch.setattr(loading, "load", lambda *_: theirs.get_file_cache(str(tmp_path))[0])
    assert isinstance(runners._load_in_actor({}, limits.current()), CompilationCache)


@pytest.mark.parametrize("flags, count", [([], None), (["--workers", "3"], 3)])
def test_whoever_embeds_is_told_how_many_threads(checkpoint, images, monkeypatch, flags, count):
    told = []

    def see(model, rows, output, options, *_):
        told.append(options.workers)
        raise ValueError("seen")

    monkeypatch.setattr(embedding, "embed", see)
    command = ["embed", "--model", str(checkpoint), "--output", "out", str(images), *flags]
    assert cli.main(command) == 2 and told == [count]


def test_the_batch_of_the_options_is_that_of_the_actors():
    """Unless the runner was given one: the files are those of a run without Ray."""
    sizes = [ray_runner.RayRunner(int, batch_size=size).rows_per_call(OPTIONS, 2) for size in
             (None, 5, 0)]  # fmt: skip
    assert sizes == [OPTIONS.batch_size, 5, 128]
    assert ray_runner.RayRunner(int, batch_size=0).rows_per_call(OPTIONS, 0) == 8
