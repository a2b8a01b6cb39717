"""The folder of a judge, `weights/probe`: the trained probe, the latent space of its world, and its own accuracy.

It holds all that judging a model needs besides the model, so that nobody has to render a data set for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import WeightsError
from training.pca import PatchPCA, read_pca, write_pca
from training.probe import READ, AttributeProbe
from training.world import ATTRIBUTES

PCA_FILE, REPORT_FILE = "pca.safetensors", "report.json"
SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "probe"


@dataclass(frozen=True)
class Judge:
    """What judges a model.

    Attributes:
        probe: reads what frames show.
        pca: encodes real clips, for the decoders' scores.
        held_out: share of attributes that the probe reads rightly from real clips of combinations it never saw.
    """

    probe: AttributeProbe
    pca: PatchPCA
    held_out: dict[str, float]


def save_judge(folder: Path, probe: AttributeProbe, pca: PatchPCA, held_out: dict[str, float]) -> dict[str, Any]:
    """Write the folder; returns the report that is in it."""
    probe.save(folder)
    write_pca(pca, folder / PCA_FILE)
    report = {
        "parameters": sum(parameter.numel() for parameter in probe.parameters()),
        "attributes": {name: list(ATTRIBUTES[name]) for name in READ},
        "held_out": {name: round(value, 4) for name, value in held_out.items()},
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def load_judge(folder: Path) -> Judge:
    """Read the folder.

    Raises:
        WeightsError: there is none, it is damaged, or it was made for another world than this one.
    """
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder} holds no probe; make one with python -m training.probe --out {folder}."
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"The {REPORT_FILE} in {folder} is damaged: make the probe anew.") from error
    for name in READ:
        known = report.get("attributes", {}).get(name)
        if known != list(ATTRIBUTES[name]):
            raise WeightsError(
                f"The probe in {folder} was made for another world: its {name} is {known}, but this one's is "
                f"{list(ATTRIBUTES[name])}. Make one with python -m training.probe --out {folder}."
            )
    try:
        return Judge(AttributeProbe.load(folder), read_pca(folder / PCA_FILE), report["held_out"])
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"The probe in {folder} is damaged or incomplete: make it anew.") from error
