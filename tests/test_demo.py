import json

import pytest
from PIL import Image

from clipindex.demo import run_demo
from clipindex.errors import UsageError
from clipindex.store import published_shards


def test_the_demo_shows_real_zero_shot_and_can_be_run_again(tmp_path):
    out = tmp_path / "demo"
    steps = []
    summary = run_demo(out, steps.append)
    by_name = {step.name: step for step in summary.steps}
    assert steps == summary.steps
    assert by_name["digits"].classified.acc1 >= 0.95
    assert by_name["shapes"].classified.acc1 >= 0.80
    assert by_name["photos"].rejects == 0
    for step in summary.steps:
        assert step.rows + step.rejects == step.samples
        assert sum(record.rows for record in published_shards(out / step.name).values()) == step.rows
    with Image.open(summary.sheet) as sheet:
        assert len(sheet.getcolors(1 << 24)) > 100  # pictures, not a blank page
    assert json.loads((out / "digits" / "predictions" / "metrics.json").read_bytes())["acc1"] >= 0.95
    assert [step.rows for step in run_demo(out).steps] == [step.rows for step in summary.steps]


def test_it_does_not_overwrite_what_is_not_a_demo(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="something else"):
        run_demo(tmp_path)
    assert (tmp_path / "mine.txt").exists()
