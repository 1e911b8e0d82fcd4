"""Looks of the page: a theme without web fonts, and the styles of our own pieces."""

from pathlib import Path

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Consolas", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """Soft shapes, one accent colour, fonts of the reader's own machine."""
    return gr.themes.Soft(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="*neutral_50",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        block_label_background_fill="transparent",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_weight="500",
        block_title_text_weight="500",
        block_shadow="none",
        block_border_width="1px",
    )


CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

# Links to runs open in place; with a modifier key, in a tab of their own.
OPEN_RUN_JS = """
element.addEventListener('click', (e) => {
  const link = e.target.closest('a[data-run]');
  if (!link || e.ctrlKey || e.metaKey || e.shiftKey || e.button) return;
  e.preventDefault();
  trigger('select', {run: link.dataset.run});
});
"""
# The address of the page names the run that is shown, so that a reload or another tab shows it again.
ADDRESS_JS = """(run) => {
  const url = new URL(window.location.href);
  if (run) url.searchParams.set('run', run); else url.searchParams.delete('run');
  window.history.replaceState(null, '', url);
  if (run && window.innerWidth < 700) document.querySelector('#stage')?.scrollIntoView({behavior: 'smooth'});
}"""
COPY_JS = "(text) => { navigator.clipboard && navigator.clipboard.writeText(text); }"
