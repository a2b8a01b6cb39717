"""Theme and style sheet. Nothing comes from another host: the page works offline and tells nobody of its visitors."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Ubuntu", "Cantarell", "Noto Sans", "sans-serif"]
_MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace"]


def theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=gr.themes.colors.orange,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=_FONT,
        font_mono=_MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#0b0f19",
        block_background_fill="white",
        block_background_fill_dark="#131a2a",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="#222c42",
        block_shadow="none",
        block_radius="14px",
        container_radius="14px",
        input_radius="10px",
        button_large_radius="12px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        input_background_fill="white",
        input_background_fill_dark="#0e1422",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="#2a3550",
        button_primary_background_fill="linear-gradient(100deg, #ea580c, #db2777)",
        button_primary_background_fill_hover="linear-gradient(100deg, #f97316, #ec4899)",
        button_primary_background_fill_dark="linear-gradient(100deg, #ea580c, #db2777)",
        button_primary_background_fill_hover_dark="linear-gradient(100deg, #f97316, #ec4899)",
        button_primary_text_color="white",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
    )


def css() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def script() -> str:
    return (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
