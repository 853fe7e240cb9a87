"""Commands that are killed at random moments. `pytest tests/faults --kills 100` does it a hundred times."""

import sys

import pytest
from tests.faults.harness import Server, campaign, prepare, table, twice

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="forks and kills as Linux does")
def test_no_kill_loses_or_breaks_anything_and_the_next_run_ends_as_if_there_had_been_none(request, tmp_path):
    server = Server(tmp_path)
    try:
        phases, kills = prepare(server, tmp_path), request.config.getoption("--kills")
        assert {phase.name: found for phase in phases if (found := twice(server, phase))} == {}
        found = campaign(server, phases, tmp_path, kills, request.config.getoption("--kill-seed"))
    finally:
        server.close()
    print(table(found))
    assert {killed.phase: killed.faults for killed in found if killed.faults} == {}
    assert len(found) == kills and all(killed.equal for killed in found)


def test_the_harness_sees_a_file_that_is_not_written_atomically(tmp_path):
    """It reports `path.write_text`: it must be able to fail."""
    from tests.faults.harness import Phase, judged, printed

    (tmp_path / "d.csv").write_text("old")
    phase = Phase("a", lambda _: [], "d.csv", old=printed(tmp_path))
    (tmp_path / "d.csv").write_text("new, and longer")
    phase.new = printed(tmp_path)
    assert judged(phase, tmp_path) == ("new", [])
    (tmp_path / "d.csv").write_text("new, and")
    assert judged(phase, tmp_path)[1] == ["d.csv: is neither the old file nor the new one"]
    (tmp_path / "d.csv").unlink()
    assert judged(phase, tmp_path) == ("none", ["d.csv: was there and has gone"])
