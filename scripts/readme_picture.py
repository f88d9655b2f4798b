"""Draw the README's picture anew from the committed results. Needs kaleido and a browser.

    python scripts/readme_picture.py

The figure of SARR with a white ground; a palette of 64 colours keeps the file small.
"""
import io
from pathlib import Path

from PIL import Image

from safeeraser.report import read_results
from safeeraser.plot import sarr_figure

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    figure = sarr_figure(read_results(ROOT / "benchmarks/results/world.json"))
    figure.update_layout(paper_bgcolor="white", font_color="#333", title_subtitle_font_color="#333")
    picture = Image.open(io.BytesIO(figure.to_image("png", width=800, scale=2)))
    picture.convert("RGB").quantize(64).save(ROOT / "nbs/images/sarr.png", optimize=True)
