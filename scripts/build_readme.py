"""README.md from nbs/index.ipynb, without Quarto. With --check nothing is written: exit 1 when it is stale."""
import posixpath, re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TARGET, IMAGES = ROOT / "nbs/index.ipynb", ROOT / "README.md", "README_files"
NOTE = "<!-- Made from nbs/index.ipynb by scripts/build_readme.py: edit it there. -->\n\n"

DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*([\w-]+)(?::?[ \t]*(.*))?\n?", re.M)   # `#| hide`, `#|echo: false`
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])([^)"'\s]+)""")                       # ](target), src="target"
SHOWN = {"text/plain", "text/markdown", "image/png", "image/jpeg", "image/svg+xml"}   # no HTML, plotly or widget data
MAX_IMAGE = 200_000   # bytes: a README is looked at often and cloned always


def check_size(name, size):
    if size > MAX_IMAGE: sys.exit(f"build_readme: {name} has {size:,} bytes, more than {MAX_IMAGE:,}: show a smaller picture")


def from_root(match):
    "A link of the notebook (relative to nbs/) as a link of the README (relative to the root); a dead one is an error."
    opening, target = match.groups()
    if re.match(r"[a-z][a-z+.-]*:|[#/]", target, re.I): return match[0]          # URL, anchor, absolute
    path, anchor = re.match(r"([^#]*)(.*)", target).groups()
    path = posixpath.normpath(posixpath.join("nbs", path))
    file = ROOT / path
    if not file.exists(): sys.exit(f"build_readme: nbs/index.ipynb links to {target}, which does not exist")
    if file.suffix in {".png", ".jpg", ".jpeg", ".gif", ".svg"}: check_size(path, file.stat().st_size)
    return f"{opening}{path}{anchor}"


def tidy(cell):
    "The cell as a reader of the README should see it, or None."
    if cell.cell_type == "markdown":
        if cell.get("attachments"): sys.exit("build_readme: a pasted picture in nbs/index.ipynb: make it a file and link to it")
        cell.source = LINK.sub(from_root, cell.source)
        return cell
    if cell.cell_type != "code": return None                                     # raw: front matter
    said = {name: value.strip() for name, value in DIRECTIVE.findall(cell.source)}
    if said.keys() & {"hide", "default_exp"}: return None
    cell.source = DIRECTIVE.sub("", cell.source).strip()
    if said.get("echo") == "false": cell.metadata["transient"] = {"remove_source": True}   # nbconvert's own mark
    outputs = [] if said.get("output") == "false" else cell.outputs
    cell.outputs = [o for o in outputs if o.output_type != "error" and o.get("name") != "stderr"]
    for o in cell.outputs:
        if "data" in o: o.data = {mime: data for mime, data in o.data.items() if mime in SHOWN}
    cell.outputs = [o for o in cell.outputs if o.get("data", True)]
    return cell if cell.source or cell.outputs else None


def build():
    "Relative path -> bytes of the README and of each picture in it."
    nb = nbformat.read(SOURCE, as_version=4)
    nb.cells = [c for c in map(tidy, nb.cells) if c]
    nb.metadata = {"language_info": {"name": "python"}}                          # the fences' language
    text, resources = MarkdownExporter().from_notebook_node(nb, {"output_files_dir": IMAGES})
    text = NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    files = resources.get("outputs") or {}
    for name, data in files.items(): check_size(name, len(data))
    return {TARGET.name: text.encode(), **files}


def main(check):
    wanted = build()
    present = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in [TARGET, *(ROOT / IMAGES).glob("*")] if p.is_file()}
    stale = sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))
    if check: return f"build_readme: stale: {', '.join(stale)}. Run `make export`." if stale else 0
    for name in stale:
        path = ROOT / name
        if name not in wanted: path.unlink(); continue
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(wanted[name])


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
