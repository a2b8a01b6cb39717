"""The main flow with the model that comes with the program: a sentence in, a video on the screen and in a file."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.cli import EMBEDDED_MODEL, load_pipeline
from pipeline.recipe import read_recipe
from tests.browser.conftest import retried
from tests.browser.visitor import PROMPT, Sight, ask, downloaded, in_time, wait_for_end
from tests.media import read_media

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(EMBEDDED_MODEL, "cpu")


@retried
def test_a_sentence_becomes_a_video_and_a_seed_makes_it_again(open_page, site, tmp_path) -> None:
    spec = site.pipeline.spec
    num_frames = spec.frames_in(spec.blocks_for(2, spec.fps))
    page = open_page()
    videos = []
    for run in ("first", "second"):
        ask(page, PROMPT, seconds=2, fps=spec.fps, seed=7)
        wait_for_end(page)
        sight = Sight.of(page)
        painted = {frame["at"] for frame in sight.frames}
        assert min(painted) < spec.frames_in(1) / spec.fps, "it does not begin with its first block"
        in_time(min(painted) == 0 and len(painted) >= 0.9 * num_frames, f"painted only at {sorted(painted)}")
        assert abs(sight.duration - num_frames / spec.fps) <= 0.01
        (tmp_path / run).mkdir(exist_ok=True)  # in a second try it is there
        path = downloaded(page, tmp_path / run)
        recipe = read_recipe(path)
        assert (recipe["prompt"], recipe["seed"], recipe["model"]) == (PROMPT, 7, spec.name)
        assert recipe["frames"] == num_frames and recipe["complete"] is True
        videos.append(read_media(path).frames)
    first, second = videos
    assert len(first) == num_frames
    assert first.std(axis=(1, 2, 3)).min() > 10 and first.mean(axis=(1, 2, 3)).min() > 10, "a picture, not a blank"
    assert any(np.abs(after.astype(int) - first[0]).max() > 32 for after in first[1:]), "and it moves"
    np.testing.assert_array_equal(first, second)
