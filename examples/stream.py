"""Show how far each block of a clip has come, then save the clip: the snippet of the README, as a program."""

from __future__ import annotations

import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import GenerationRequest, SelfForcingPipeline  # noqa: E402

pipeline = SelfForcingPipeline.from_pretrained(ROOT / "weights" / "embedded")
request = GenerationRequest(prompt="a red balloon rises over the mountains at sunset", seed=7, seconds=5)

frames = []
for block in pipeline.stream(request):  # each block arrives while the rest does not exist yet
    frames.append(block.frames)  # uint8 [T, H, W, 3]
    print(f"{block.start_frame + len(block.frames)} of {block.run.num_frames} frames after {block.elapsed:.2f} s")

imageio.imwrite("stream.mp4", np.concatenate(frames), fps=block.run.fps)
