"""README.md from nbs/index.ipynb, without Quarto.

Code cells appear as fenced code (their outputs don't: what a reader should see is in the text);
cells marked `#| hide` are left out and other directives are stripped.
"""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+).*\n?", re.M)
NOTE = "<!-- made from nbs/index.ipynb by scripts/build_readme.py -->"


def cell_markdown(cell) -> str:
    if cell.cell_type == "markdown":
        return cell.source
    if cell.cell_type != "code" or {"hide", "default_exp"} & set(DIRECTIVE.findall(cell.source)):
        return ""
    return f"```python\n{DIRECTIVE.sub('', cell.source).strip()}\n```"


def main():
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells
    text = "\n\n".join(filter(None, (cell_markdown(c).strip() for c in cells)))
    (ROOT / "README.md").write_text(f"{NOTE}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
