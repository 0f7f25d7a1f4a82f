"""Flags that several commands share."""

from dataclasses import replace

import pytest

from medsiglip_jax import cli
from medsiglip_jax.cli import loading, parser, reading
from medsiglip_jax.preprocess.dicom.rules import Rules
from medsiglip_jax.preprocess.parts import Parts


def test_queries_are_read_as_it_is_recorded():
    flagged = parser.Parser()
    reading.add_queries(flagged)
    recorded = Rules(frame=5, volume="ct")
    for flags, frame, series in (([], 5, False), (["--series"], 5, True), (["--frame", "3"], 3, 0)):
        rules, parts = reading.queries(flagged.parse_args(flags), recorded)
        assert (rules, parts) == (replace(recorded, frame=frame), Parts(frame, bool(series)))


@pytest.mark.parametrize("flags", [["--processes", "2"], ["--process-id", "1"]])
def test_a_process_of_several_has_to_know_where_the_others_are(flags):
    flagged = parser.Parser()
    loading.add_processes(flagged)
    with pytest.raises(ValueError, match="--processes and --process-id need --coordinator"):
        loading.join_other_processes(flagged.parse_args(flags))
    assert loading.join_other_processes(flagged.parse_args([]))


def test_no_flag_is_short_for_another(capsys):
    assert cli.main(["embed", "x", "--model", "m", "--output", "o", "--max-error=3"]) == 2
    assert "unrecognized arguments: --max-error=3" in capsys.readouterr().err
    assert cli.main(["--versio"]) == 2
