"""What is on the page: every component, its place and its name. What happens between them is `web.page`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import gradio as gr

from pipeline.config import FPS_RANGE, OPTIONS, SECONDS_RANGE
from pipeline.loading import LoadingState
from web import pieces, status
from web.adapter import AdaptedPipeline
from web.compare_panel import ComparePanel
from web.enhance import PromptHelp, SuggestionBox
from web.generation import DEFAULT_SECONDS
from web.models import ModelMenu
from web.player import live_video
from web.start_panel import StartPanel

EXAMPLES_FILE = Path(__file__).resolve().parent.parent / "examples" / "prompts.json"

ARRIVAL_POLL_SECONDS = 0.4
PLACE_POLL_SECONDS = 1.0
WARMING_POLL_SECONDS = 1.0

SWITCHES = {
    "compile": ("torch.compile", "Compiled in the background, then used. Meant for GPUs: a CPU gains nothing."),
    "fp8": ("FP8 quantization", "Keeps the weights in 8 bits: about half the memory, slightly different pictures."),
    "taehv": ("TAEHV VAE", "Decodes with a small autoencoder: faster, a bit softer."),
}


PRESET = "On, because this device may lack the memory otherwise."


class Layout:
    """The components, as they are while there is no model yet. To be made inside a `gr.Blocks`.

    Args:
        loading: How far the model is.
        longest: Seconds of video that may be asked for.
        help: What makes suggestions for prompts.
        menu: Makes the Model menu, if there is to be one.
        ticked: Switches that are on for a visitor who comes, where the model has them.
    """

    def __init__(
        self,
        loading: LoadingState,
        longest: float,
        help: PromptHelp,
        menu: Callable[[], ModelMenu] | None = None,
        ticked: Collection[str] = (),
    ) -> None:
        self._longest = longest
        self._ticked = ticked
        self._help = help
        self.header = gr.HTML(pieces.header(None), elem_id="header", padding=False)
        gr.HTML(pieces.ANNOUNCEMENTS, elem_id="announcements", padding=False)
        # What somebody else has changed. Not a toast: those do not reach a page that is asking for nothing.
        self.news = gr.HTML("", elem_id="news", padding=False, visible=menu is not None)
        # In the order in which a phone shows them, and the Tab key goes; a wide window has the second at the right.
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(min_width=0, elem_id="ask"):
                with gr.Column(min_width=0, elem_id="prompt-box"):
                    self.prompt = gr.Textbox(
                        label="Prompt",
                        placeholder=f"Describe the video, for example: {_examples()[0]}",
                        lines=3,
                        max_lines=8,
                        elem_id="prompt",
                    )
                    self.suggestion = SuggestionBox()
                self.notice = gr.HTML("", elem_id="notice", padding=False)
                with gr.Row(elem_id="buttons"):
                    self.generate = gr.Button(
                        "Generate", variant="primary", size="lg", elem_id="generate", interactive=False
                    )
                    self.stop = gr.Button("Stop", variant="stop", size="lg", elem_id="stop", visible=False)
            with gr.Column(min_width=0, elem_id="result"):
                self.video = live_video(label="Video", show_label=False, elem_id="video")
                with gr.Row(elem_id="under-video"):
                    gr.HTML(pieces.PLAYER_BUTTONS, elem_id="player", padding=False)
                    self.download = gr.DownloadButton("Download MP4", interactive=False, size="sm", elem_id="download")
                self.status = gr.HTML(
                    status.loading(loading), label="Status", show_label=False, elem_id="status", padding=False
                )
                self.warming = gr.HTML("", elem_id="warming", padding=False)
                # Carries a click's ticket from one event to the next. Not a `gr.State`: that is read when an event
                # begins, and by then may hold a later click's; this travels with the event. API clients do not see it.
                self.ticket = gr.Button("", visible="hidden", elem_id="ticket")
                # Pressed by the script: a button in HTML cannot set a component's value.
                self.use_seed = gr.Button("", visible="hidden", elem_id="use-seed")
            with gr.Column(min_width=0, elem_id="more"):
                self.start = StartPanel()
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    self._lay_out_settings(longest)
                self.compare = ComparePanel({name: label for name, (label, _) in SWITCHES.items()})
                self.models = None if menu is None else menu()
                gr.Examples(
                    examples=[[prompt] for prompt in _examples()],
                    inputs=[self.prompt],
                    label="Try one of these",
                    cache_examples=False,
                    examples_per_page=20,
                    elem_id="examples",
                    api_visibility="private",
                )
                # Or dropped anywhere on the page: the script hands the file to this button.
                self.dropped = gr.UploadButton(
                    "Take all settings from a video made here", file_types=[".mp4"], size="sm", elem_id="restore"
                )
                with gr.Accordion("Words", open=False, elem_id="words", visible=False) as self.words:
                    self.word_list = gr.HTML("", padding=False)
        self.arrival = gr.Timer(ARRIVAL_POLL_SECONDS)
        self.place_timer = gr.Timer(PLACE_POLL_SECONDS, active=False)
        self.warming_timer = gr.Timer(WARMING_POLL_SECONDS, active=False)

    @property
    def inputs(self) -> list[Any]:
        """What makes a request, in the order of its fields for programs."""
        options = [self.options[name] for name in OPTIONS]
        return [self.prompt, self.seed, self.fps, self.seconds, *options]

    def _lay_out_settings(self, longest: float) -> None:
        # Numbers, not sliders: what is typed arrives as it is, and the request says what is wrong with it.
        with gr.Row(elem_id="numbers"):
            self.seed = gr.Number(label="Seed", info="-1: random", value=-1, step=1, min_width=90, elem_id="seed")
            self.fps = gr.Number(label="Target FPS", info=f"{FPS_RANGE[0]:g} to {FPS_RANGE[1]:g}", step=1, min_width=90)
            self.seconds = gr.Number(
                label="Length (s)",
                info=f"{SECONDS_RANGE[0]:g} to {longest:g}",
                value=min(DEFAULT_SECONDS, longest),
                step=0.5,
                min_width=90,
            )
        self.settings_notice = gr.HTML("", elem_id="settings-notice", padding=False)
        self.options = {
            name: gr.Checkbox(label=label, info=info, elem_id=f"option-{name}")
            for name, (label, info) in SWITCHES.items()
        }

    @property
    def fitted(self) -> list[Any]:
        """The components that depend on the model."""
        fitted = [
            self.arrival,
            self.header,
            self.status,
            self.generate,
            self.fps,
            self.settings_notice,
            self.warming_timer,
            self.words,
            self.word_list,
            self.suggestion.button,
            self.suggestion.by,
            self.suggestion.hint,
        ]
        return [*fitted, *self.options.values(), *self.compare.fitted, *self.start.fitted]

    def without_model(self) -> dict[Any, dict[str, Any]]:
        """Component -> its settings while there is no model."""
        return {
            self.generate: {"interactive": False},
            **self.suggestion.fitted_to([]),
            **self.compare.without_model(),
        }

    def fitted_to(self, model: AdaptedPipeline) -> dict[Any, dict[str, Any]]:
        """Component -> its settings for this model, whatever model it was fitted to before."""
        words = model.known_words()
        plan = pieces.settings_notice(self.seed.value, model.fps, self.seconds.value, self._longest, model)
        unavailable, notes = model.unavailable_options(), model.option_notes()
        fitted = {
            self.arrival: {"active": False},
            self.header: {"value": pieces.header(model)},
            self.status: {"value": status.idle(pieces.describe(model))},
            self.generate: {"interactive": True},
            self.fps: {
                "value": model.fps,
                "info": f"{FPS_RANGE[0]:g} to {FPS_RANGE[1]:g}; natural: {model.native_fps:g}",
            },
            self.settings_notice: {"value": plan},
            # Asks once how far torch.compile is with this model, and goes on if its box is ticked.
            self.warming_timer: {"active": True},
            self.words: {"label": f"The {len(words)} words this model knows", "visible": bool(words)},
            self.word_list: {"value": pieces.word_list(words)},
            **self.suggestion.fitted_to(self._help.kinds(model), model),
        }
        for name, option in self.options.items():
            said = " ".join(filter(None, (SWITCHES[name][1], notes.get(name))))
            fitted[option] = {"info": said, "interactive": True}
            if name in self._ticked:
                fitted[option] |= {"value": True}
            if name in model.preset:
                fitted[option] |= {"value": True, "info": f"{said} {PRESET}"}
            if name in unavailable:
                fitted[option] = {"info": unavailable[name], "interactive": False, "value": False}
        return fitted | self.compare.fitted_to(unavailable, model.preset) | self.start.fitted_to(model)


def _examples() -> list[str]:
    return json.loads(EXAMPLES_FILE.read_text(encoding="utf-8"))
