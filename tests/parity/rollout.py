"""Golden cases 2 to 5 and the checkpoint file: the transformer, alone and rolled out block by block with its cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.cache import CacheWindow, KVCache
from pipeline.checkpoint import load_checkpoint, transformer_from_wan
from pipeline.sampler import DenoisingSteps, FlowSchedule, denoise_block, flow_to_clean
from pipeline.transformer import CausalWanTransformer3DModel
from tests.parity.report import Row, largest_error

TOLERANCE = 1e-5
Tensors = dict[str, torch.Tensor]


def read(path: Path) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Config, weights (`w.` removed) and everything else of a golden file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        config = json.loads(file.metadata()["config"])
    weights = {name[2:]: value for name, value in tensors.items() if name.startswith("w.")}
    return config, weights, {name: value for name, value in tensors.items() if not name.startswith("w.")}


class Rollout:
    """The authors' inference loop on recorded noise, made of the pipeline's own parts.

    `results` gets flow and x0 of every call under the golden files' names.
    """

    def __init__(self, model: CausalWanTransformer3DModel, data: Tensors, shift: float, steps: list[float]) -> None:
        self.model = model
        self.data = data
        self.schedule = FlowSchedule(shift)
        self.steps = DenoisingSteps.from_schedule(self.schedule, steps)
        self.text = model.encode_text(data["prompt_embeds"])
        self.results: Tensors = {}

    def run(
        self,
        cache: KVCache,
        block_sizes: list[int],
        *,
        prefix: str = "",
        initial_sizes: list[int] | None = None,
        context_noise: float = 0.0,
        merged: bool = False,
    ) -> torch.Tensor:
        """Generate blocks of the given sizes behind the initial latents; all latents [B, F, C, h, w]."""
        draws = self._draws(prefix)
        noise = self.data[f"{prefix}noise"]
        finished: list[torch.Tensor] = []
        start = 0
        for index, size in enumerate(initial_sizes or []):
            latents = self.data[f"{prefix}initial_latent"][:, start : start + size]
            cache.begin_block(size)
            self._call(cache, latents, [context_noise] * size, f"{prefix}ctx{index}")
            finished.append(latents)
            start += size
        start = 0
        for index, size in enumerate(block_sizes):
            name = f"{prefix}block{index}"
            merge = merged and index > 0
            cache.begin_block(size, merged=merge)
            block_noise = noise[:, start : start + size]

            def predict(latents, timestep, step, merge=merge, size=size, name=name):
                times = [timestep] * size
                if merge and step == 0:
                    previous = finished[-1]
                    both = torch.cat([previous, latents], 1)
                    times = [context_noise] * previous.shape[1] + times
                    return self._call(cache, both, times, f"{name}.merged")[:, previous.shape[1] :]
                return self._call(cache, latents, times, f"{name}.step{step}")

            def draw(step, block_noise=block_noise):
                return block_noise if step == 0 else next(draws).view_as(block_noise)

            *_, clean = denoise_block(predict, draw, self.steps)
            finished.append(clean)
            start += size
            if not merged:
                self._call(cache, clean, [context_noise] * size, f"{name}.clean")
        return torch.cat(finished, dim=1)

    def _call(self, cache: KVCache, latents: torch.Tensor, times: list[float], name: str) -> torch.Tensor:
        timestep = torch.tensor(times).expand(latents.shape[0], -1)
        flow = self.model(latents, timestep, self.text, cache=cache)
        sigma = self.schedule.sigma(timestep)[..., None, None, None]
        self.results[f"{name}.flow"] = flow
        self.results[f"{name}.x0"] = flow_to_clean(flow, latents, sigma)
        return flow

    def _draws(self, prefix: str) -> Iterator[torch.Tensor]:
        count = 0
        while True:
            name = f"{prefix}renoise.{count}"
            yield self.data[name if name in self.data else f"renoise.{count}"]
            count += 1


@torch.inference_mode()
def check_bidirectional(path: Path) -> list[Row]:
    """Case 2: one forward without cache or mask, with the intermediate values that were recorded."""
    config, weights, data = read(path)
    model = transformer_from_wan(config["model"], weights)
    frames = data["x"].shape[2]
    timestep = data["t"][:, None].expand(-1, frames)
    embeds = torch.zeros(len(data["t"]), config["model"]["text_len"], config["model"]["text_dim"])
    for index in range(len(embeds)):
        context = data[f"context.{index}"]
        embeds[index, : len(context)] = context
    hidden: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _a, out: hidden.append(out)) for block in model.blocks]
    noisy = data["x"].transpose(1, 2)
    flow = model(noisy, timestep, model.encode_text(embeds))
    for hook in hooks:
        hook.remove()
    time_embedding, time_modulation = model.embed_time(data["t"][:, None])
    measured = {
        "out": flow.transpose(1, 2),
        "x0_shift8": flow_to_clean(flow, noisy, FlowSchedule(8.0).sigma(timestep)[..., None, None, None]),
        "time_emb": time_embedding[:, 0],
        "time_proj": time_modulation[:, 0].flatten(1),
        "text_emb": model.condition_embedder.text_embedder(embeds),
        **{f"hidden.{index}": value for index, value in enumerate(hidden)},
    }
    return [Row(name, largest_error(value, data[name]), TOLERANCE) for name, value in measured.items()]


@torch.inference_mode()
def check_chunkwise(path: Path) -> list[Row]:
    """Case 3: every call of a rollout, the latents, and the cache at the end; with the clean pass apart and merged."""
    config, weights, data = read(path)
    return chunkwise_rows(transformer_from_wan(config["model"], weights), config, data)


def chunkwise_rows(model: CausalWanTransformer3DModel, config: dict[str, Any], data: Tensors) -> list[Row]:
    frames, size = config["frames"], config["num_frame_per_block"]
    sizes = block_sizes(frames, size, config["independent_first_frame"])
    height, width = config["latent"]
    window = CacheWindow(size, window_frames=frames, positions="absolute")
    rollout = Rollout(model, data, config["shift"], config["denoising_step_list"])
    noise = float(config.get("context_noise", 0))
    rows = []
    for merged in (False, True):
        cache = model.make_cache(window, height, width, batch=config["batch"])
        latents = rollout.run(cache, sizes, context_noise=noise, merged=merged)
        label = "latents, merged clean pass" if merged else "latents"
        rows.append(Row(label, largest_error(latents, data["latents"]), TOLERANCE))
        if merged:
            continue
        rows += compare_calls(rollout.results, data)
        for name, expected in data.items():
            if name.startswith("cache."):
                _, layer, kind = name.split(".")
                key, value = cache.in_order(int(layer))
                rows.append(Row(name, largest_error(key if kind == "k" else value, expected), TOLERANCE))
    return rows


@torch.inference_mode()
def check_framewise(path: Path) -> list[Row]:
    """Case 4: frame by frame, independent first frames, given initial latents."""
    config, weights, data = read(path)
    model = transformer_from_wan(config["model"], weights)
    height, width = config["latent"]
    rows = []
    for variant, settings in config["variants"].items():
        size, initial = settings["num_frame_per_block"], settings["initial_frames"]
        independent = settings["independent_first_frame"]
        frames = initial + settings["noise_frames"]
        initial_sizes = block_sizes(initial, size, independent) if initial else []
        sizes = block_sizes(settings["noise_frames"], size, independent and not initial)
        rollout = Rollout(model, data, config["shift"], config.get("denoising_step_list", [1000, 750, 500, 250]))
        for merged in (False, True):
            cache = model.make_cache(CacheWindow(size, window_frames=frames, positions="absolute"), height, width)
            latents = rollout.run(cache, sizes, prefix=f"{variant}.", initial_sizes=initial_sizes, merged=merged)
            label = f"{variant}.latents" + (", merged clean pass" if merged else "")
            rows.append(Row(label, largest_error(latents, data[f"{variant}.latents"]), TOLERANCE))
        rows += compare_calls(rollout.results, data, f"{variant}.")
    return rows


@torch.inference_mode()
def check_rolling(path: Path) -> list[Row]:
    """Case 5: windows and sinks of any size with absolute positions."""
    config, weights, data = read(path)
    model = transformer_from_wan(config["model"], weights)
    height, width = config["latent"]
    size = config["num_frame_per_block"]
    sizes = block_sizes(config["frames"], size, config.get("independent_first_frame", False))
    rows = []
    for variant, settings in config["variants"].items():
        window = CacheWindow(size, settings["local_attn_size"], settings["sink_size"], positions="absolute")
        rollout = Rollout(model, data, config["shift"], config.get("denoising_step_list", [1000, 750, 500, 250]))
        # Noise is the same for all variants and recorded once.
        rollout.data = data | {f"{variant}.noise": data["noise"]}
        for merged in (False, True):
            cache = model.make_cache(window, height, width)
            latents = rollout.run(cache, sizes, prefix=f"{variant}.", merged=merged)
            label = f"{variant}.latents" + (", merged clean pass" if merged else "")
            rows.append(Row(label, largest_error(latents, data[f"{variant}.latents"]), TOLERANCE))
            if not merged:
                rows += compare_calls(rollout.results, data, f"{variant}.")
                key, _ = cache.in_order(0)
                rows.append(Row(f"{variant}.cache.0.k", largest_error(key, data[f"{variant}.cache.0.k"]), TOLERANCE))
    return rows


@torch.inference_mode()
def check_checkpoint(path: Path) -> list[Row]:
    """A published-style `.pt` with the `.json` beside it must reproduce the case-3 file beside it."""
    model_config = json.loads(path.with_suffix(".json").read_text())
    beside = sorted(path.parent.glob("case3_*.safetensors"))
    if not beside:
        raise FileNotFoundError(f"no case3_*.safetensors beside {path.name} to compare with")
    config, _, data = read(beside[0])
    model = transformer_from_wan(model_config, load_checkpoint(path))
    return chunkwise_rows(model, config, data)


def block_sizes(frames: int, size: int, independent_first: bool) -> list[int]:
    """[size, size, ...], or [1, size, ...] when the first frame stands alone."""
    first = [1] if independent_first else []
    rest, remainder = divmod(frames - len(first), size)
    if remainder:
        raise ValueError(f"{frames} frames do not divide into blocks of {size}")
    return first + [size] * rest


def compare_calls(results: Tensors, data: Tensors, prefix: str = "") -> list[Row]:
    """One row per quantity of all recorded calls: the worst flow and the worst x0."""
    rows = []
    for kind in ("flow", "x0"):
        names = [name for name in data if name.startswith(prefix) and name.endswith(f".{kind}")]
        if missing := set(names) - results.keys():
            raise ValueError(f"the rollout made no call {sorted(missing)[0]}")
        if names:  # the copies kept with the tests hold no single calls
            worst = max(largest_error(results[name], data[name]) for name in names)
            rows.append(Row(f"{prefix}{kind} of {len(names)} calls", worst, TOLERANCE))
    return rows


CASES = {
    "case2_bidirectional": check_bidirectional,
    "case3_kv_chunkwise": check_chunkwise,
    "case4_framewise_i2v": check_framewise,
    "case5_rolling": check_rolling,
    "self_forcing_tiny": check_checkpoint,
}
