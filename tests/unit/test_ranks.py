"""Why ranks ended: what happened first comes before what followed from it."""

import json

import pytest

from dinov3.ranks import _explain

SAVE_FAILED = (2, "step_000000007: the checkpoint could not be written: disk full")
LOST = (4, "rank 0: another rank is gone")
SAVED = (130, "stopped by SIGTERM after step 7; run the same command to go on.")
KILLED = {"1": -9}


@pytest.mark.parametrize(
    ("stopped", "reports", "ends", "code", "message"),
    [
        (True, [SAVED], {}, 130, "stopped by SIGTERM after step 7"),
        (True, [], {}, 130, "interrupted. The same command goes on"),
        (True, [LOST], KILLED, 130, "interrupted. The same command goes on"),
        (True, [SAVE_FAILED, SAVE_FAILED], {}, 2, "could not be written: disk full"),
        (True, [LOST, SAVE_FAILED], {}, 2, "could not be written: disk full"),
        (False, [LOST, SAVE_FAILED], {}, 2, "could not be written: disk full"),
        (False, [LOST], KILLED, 2, "rank 1 was killed by SIGKILL"),
        (False, [LOST], {}, 2, "another rank is gone"),
        (False, [], {}, 2, "the ranks ended without a word"),
    ],
)
def test_the_reason_is_that_of_the_rank_that_failed_first(
    tmp_path, stopped, reports, ends, code, message
):
    for rank, (own, said) in enumerate(reports):
        report = {"code": own, "message": said, "time": float(rank)}
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps(report))
    (tmp_path / "ends.json").write_text(json.dumps(ends))
    found = _explain(tmp_path, stopped=stopped)
    assert found[0] == code
    assert message in found[1]
