"""report.html holds everything itself, whatever state the run is in."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo_flex.compare import compare
from grpo_flex.console import Console
from grpo_flex.metrics import RunLog
from grpo_flex.report import write_report
from grpo_flex.status import status, summary
from tests.unit.run_stand_in import StandInConfig, make_run, sample

VOID = {"meta", "img", "br", "path", "use", "rect"}


class Elements(HTMLParser):
    """Start tags with their attributes, and whether every element that was opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag

    def data(self, tag: str, kind: str) -> list[bytes]:
        prefix = f"data:{kind};base64,"
        sources = [a.get("src", "") for t, a in self.found if t == tag]
        assert all(s.startswith(prefix) for s in sources)
        return [base64.b64decode(s.removeprefix(prefix)) for s in sources]


@pytest.fixture(scope="module")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs"), StandInConfig(steps=30))


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", "", page)))


def test_nothing_is_fetched(image_run: Path) -> None:
    page = write_report(image_run).read_text()
    without_namespaces = re.sub(r"xmlns(:\w+)?=\"[^\"]*\"", "", page)
    assert not re.search(r"https?:|//www|@import|<script|<link", without_namespaces)
    elements = Elements(page)
    assert elements.open == []
    assert all(a["src"].startswith("data:") for _, a in elements.found if "src" in a)
    references = re.findall(r"url\(([^)]*)\)", page) + re.findall(r"href=\"([^\"]*)\"", page)
    assert all(reference.startswith("#") for reference in references)


def test_ids_that_are_referred_to_exist_and_are_unique(image_run: Path) -> None:
    page = write_report(image_run).read_text()
    clips = re.findall(r'<clipPath id="([^"]*)"', page)
    assert len(clips) == len(set(clips))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(clips)


def test_pictures_are_embedded_as_they_were_sampled(image_run: Path) -> None:
    from PIL import Image

    pictures = [
        Image.open(io.BytesIO(b)) for b in Elements(write_report(image_run).read_text()).data("img", "image/png")
    ]
    assert [p.size for p in pictures] == [(64, 64)] * 8  # four prompts, before and after


def test_headline_prompts_configuration_and_metrics_are_there(image_run: Path) -> None:
    page = write_report(image_run).read_text()
    text = text_of(page)
    assert "0.500 → 0.800 +0.300" in text
    assert "a red circle left of a small &lt;white&gt; square" in text
    assert "optimizer.lr 0.001" in text and "models/&lt;pencil&gt;" in text
    assert "policy/grad_norm" in text
    assert page.count("<svg") >= 8


def test_colours_follow_the_theme(image_run: Path) -> None:
    page = write_report(image_run).read_text()
    assert "prefers-color-scheme: dark" in page
    assert "var(--s1)" in page and "#0102" not in page and "#0103" not in page


def test_clips_play_in_the_page(tmp_path: Path) -> None:
    elements = Elements(write_report(make_run(tmp_path, upto=5, frames=3)).read_text())
    (film,) = elements.data("video", "video/mp4")
    assert film[4:8] == b"ftyp"


def test_a_run_without_any_step(tmp_path: Path) -> None:
    text = text_of(write_report(make_run(tmp_path, upto=-1)).read_text())
    assert "No held-out evaluation yet" in text and "No step has been logged yet" in text


def test_a_run_with_its_first_evaluation_only(tmp_path: Path) -> None:
    text = text_of(write_report(make_run(tmp_path, upto=0)).read_text())
    assert "before training 0.500" in text and "Samples before training" in text
    assert "step 0 of 20, not finished" in text


def test_a_run_without_evaluation_or_configuration(tmp_path: Path) -> None:
    with RunLog(tmp_path, StandInConfig()) as log:
        log.log(1, {"reward/mean": float("nan"), "policy/kl": 0.1})
    text = text_of(write_report(tmp_path).read_text())
    assert "reward/mean not a number" in text


def test_a_heldout_score_that_was_never_a_number(tmp_path: Path) -> None:
    """Nor is it one in tables of runs and in what the terminal shows."""
    out, nan = io.StringIO(), {"heldout/oracle": float("nan")}
    with RunLog(tmp_path, StandInConfig()) as log, Console(2, run_dir=tmp_path, out=out) as console:
        for step in (0, 1, 2):
            log.samples(step, [replace(sample(0, 0.5), scores={"oracle": float("nan")})])
            log.log(step, nan)
            console.step(step, nan)
    assert "heldout/oracle not a number" in text_of(write_report(tmp_path).read_text())
    assert "Curves and samples" in compare([tmp_path], tmp_path / "picture.png")
    status(tmp_path, out)
    summary(tmp_path, out=out)
    assert "finished at step 2" in out.getvalue()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run"):
        write_report(tmp_path)
