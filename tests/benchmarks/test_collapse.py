# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The program that draws planted faults: its networks, its table and its picture."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import collapse

ROW = {"epoch": 0, "train_loss": 1.0, "rank_me": 9.0, "probe_knn": None}


def logs() -> dict[str, list[dict]]:
    """Curves of two epochs; `rank_me` of the last run falls."""
    return {
        title: [ROW, {**ROW, "epoch": 1, "rank_me": 9.0 - 2 * number}]
        for number, title in enumerate(collapse.RUNS)
    }


def test_fault_is_the_lack_of_grn_alone():
    flags = {"in_chans": 3, "stem_stride": 1, "drop_path_rate": 0.0, "decoder_embed_dim": 8}
    healthy = {name for name, _ in collapse.healthy(**flags).named_parameters()}
    fault = {name for name, _ in collapse.without_grn(**flags).named_parameters()}
    lost = {name for name in healthy if ".grn." in name and name.startswith("encoder.")}
    assert healthy - fault == lost != set()


def test_points_are_those_that_were_measured():
    assert collapse.points(logs()["healthy"], "rank_me") == [(1, 9.0), (2, 9.0)]
    assert collapse.points(logs()["healthy"], "probe_knn") == []


def test_picture_has_a_curve_in_the_color_of_each_run(tmp_path):
    panel = np.array(collapse.draw_panel("rank_me", logs())).reshape(-1, 3)
    for color in collapse.COLORS.values():
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (panel == wanted).all(1).sum() > 20, color
    whole = collapse.draw_runs(logs())
    assert whole.size[0] == 3 * collapse.draw_panel("rank_me", logs()).size[0]


@pytest.mark.parametrize("only", [["healthy"], [*collapse.RUNS]])
def test_runs_that_are_there_are_printed_and_drawn(tmp_path, capsys, only):
    for title, log in logs().items():
        folder = tmp_path / title.replace(" ", "-")
        folder.mkdir()
        log[-1]["alarms"] = ["collapse: of " + title]
        (folder / "log.txt").write_text("".join(f"{json.dumps(row)}\n" for row in log))
    words = ["--folder", str(tmp_path), "--output", str(tmp_path / "drawn.png"), "--only", *only]
    collapse.main(collapse.get_args_parser().parse_args(words))
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["| healthy | train_loss 1 | rank_me 9 |", "    collapse: of healthy"]
    assert len(said) == 2 * len(only)
    assert Image.open(tmp_path / "drawn.png").size[0] > 900
