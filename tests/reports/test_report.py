"""The HTML report: self-contained, complete, honest, and either whole or absent."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from igate_edge.contract import OutputSpec
from igate_edge.errors import UnavailableError
from igate_edge.reports.gallery import agreement, frame_metric, gallery
from igate_edge.reports.report import Evidence, headline, render, write_report

VOID = {"meta", "img", "br", "link", "input", "hr", "rect"}


class Balance(HTMLParser):
    """Every element that opens also closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_balanced_and_needs_nothing_from_outside(evidence: Evidence) -> None:
    text, _ = render(evidence)
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in text and "@import" not in text and "<script" not in text


def test_every_section_is_there(evidence: Evidence) -> None:
    text, first = render(evidence)
    headings = re.findall("<h2>([^<]*)</h2>", text)
    assert headings == [
        "Predictions on the golden frames",
        "Cost",
        "Accuracy",
        "What is shared",
        "Checks",
        "What fell back, and why",
        "Provenance",
        "How to read this",
    ]
    assert first == (
        "One pass answers semseg, depth and normals in 3.00 ms (INT8): "
        "1.50x the plain shared net's time, 2.00x as fast as 3 separate nets"
    )


def test_it_says_how_times_were_measured_and_what_fell_back(evidence: Evidence) -> None:
    text, _ = render(evidence)
    assert "measured on Test CPU, one thread, batch 1, medians of 40 interleaved rounds" in text
    assert "The engine of this machine is int8: INT8 is faster: INT8 3.00 ms, float 5.00 ms." in text
    assert "Pruning stopped at Loop node7: all its channels are kept." in text


def test_where_float_won_the_headline_is_about_float(evidence: Evidence) -> None:
    build = replace(
        evidence.build, precision="float", reason="INT8 is slower", warnings=["INT8 fell back: INT8 is slower"]
    )
    text, first = render(replace(evidence, build=build))
    assert first == "One pass answers semseg, depth and normals in 5.00 ms (float): 2.50x the plain shared net's time"
    assert text.count("INT8 is slower") == 1 and "Nothing else fell back." in text


def test_lint_is_grouped_by_code(evidence: Evidence) -> None:
    one = {
        "dialect": "trt",
        "severity": "warning",
        "code": "IG109",
        "node": "a",
        "message": "4 channels",
        "fix": "use 32",
    }
    build = replace(evidence.build, lint=[one, {**one, "node": "b"}, {**one, "severity": "info"}])
    text, _ = render(replace(evidence, build=build))
    assert text.count("IG109") == 1 and '<td class="n">2</td>' in text


def test_an_untimed_report_gives_macs_and_no_milliseconds(untimed: Evidence) -> None:
    assert headline(untimed) == (
        "One pass answers semseg, depth and normals: "
        "1.50x the MACs of the plain shared net, 0.50x those of 3 separate nets"
    )
    text, _ = render(untimed)
    assert "Not timed." in text and "interleaved" not in text


def test_a_ratio_that_means_nothing_is_not_in_the_headline(evidence: Evidence) -> None:
    assert evidence.bench is not None
    rows = [replace(row, meaningful=False, note="noise") for row in evidence.bench.rows]
    bench = replace(
        evidence.bench, rows=rows, separate_over_ours={**evidence.bench.separate_over_ours, "meaningful": False}
    )
    noisy = replace(evidence, bench=bench)
    assert "too noisy to tell" in render(noisy)[0] and ">noise<" in render(noisy)[0]
    assert headline(noisy) == "One pass answers semseg, depth and normals in 3.00 ms (INT8)"


def test_being_slower_than_separate_nets_is_said(evidence: Evidence) -> None:
    assert evidence.bench is not None
    bench = replace(evidence.bench, separate_over_ours={**evidence.bench.separate_over_ours, "ratio": 0.9})
    assert headline(replace(evidence, bench=bench)).endswith("slower than 3 separate nets")


def test_a_failed_check_stands_in_the_report(evidence: Evidence) -> None:
    verify = replace(evidence.verify, passed=False, problems=["task 'depth' (int8) is NOT as packaged"])
    text, _ = render(replace(evidence, verify=verify))
    assert "FAILED: task &#x27;depth&#x27; (int8) is NOT as packaged" in text


def test_class_names_are_text_not_markup(evidence: Evidence) -> None:
    text, _ = render(evidence)
    assert "cup <hot>" not in text and "cup &lt;hot&gt;" in text


def test_without_results_the_golden_frames_are_scored_and_called_that(evidence: Evidence) -> None:
    text, _ = render(evidence)
    assert "only the 4 golden frames: a sign of life, not an evaluation" in text
    # Depth is off by 0.5 m on every pixel.
    assert re.search(r"depth</td><td class=\"t\">RMSE, m</td><td class=\"n\">0\.500</td>", text)


def test_gallery_draws_image_labels_and_predictions_of_every_frame(evidence: Evidence) -> None:
    text = gallery(evidence.bundle.tasks, evidence.shown)
    # 4 frames x (image + 3 labels + 3 predictions), and the ball that explains normals.
    assert text.count("<img ") == 4 * 7 + 1
    assert "RMSE 0.500 m" in text and "mIoU" in text


def test_gallery_without_labels_shows_the_float_network_instead(evidence: Evidence) -> None:
    bare = [replace(s, label=dict.fromkeys(s.label)) for s in evidence.shown]
    text = gallery(evidence.bundle.tasks, bare)
    assert text.count("<img ") == 4 * 7 + 1
    assert "above: float network" in text and "RMSE" not in text


def test_gallery_takes_tasks_without_a_picture(evidence: Evidence) -> None:
    spec = OutputSpec("tag", "classification", 2, ("cat", "dog"))
    shown = [
        replace(
            s,
            label={"tag": np.int64(1)},
            float_out={"tag": np.array([0.2, 0.8])},
            engine_out={"tag": np.array([0.3, 0.7])},
        )
        for s in evidence.shown
    ]
    text = gallery([spec], shown)
    assert "dog 70 %" in text and "accuracy 1.00" in text and "0.10 from float" in text


def test_captions_are_in_the_units_of_the_task() -> None:
    depth, seg = OutputSpec("d", "depth", 1), OutputSpec("s", "semseg", 2)
    assert agreement(depth, np.full((2, 2), 1.5), np.ones((2, 2))) == "0.50 m from float"
    assert agreement(seg, np.array([[0, 1]]), np.array([[0, 0]])) == "50.0 % of pixels as float"
    assert frame_metric(depth, np.full((2, 2), 3.0), np.ones((2, 2))) == 2.0


def test_a_full_disk_leaves_the_old_report(evidence: Evidence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="No space left on device.*free disk space"):
        write_report(evidence, target)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_folder_is_made_and_the_file_written(evidence: Evidence, tmp_path: Path) -> None:
    written = write_report(evidence, tmp_path / "new" / "report.html")
    assert written.path.read_text().startswith("<!doctype html>")
