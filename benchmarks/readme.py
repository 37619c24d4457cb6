"""Write the newest committed result of each theme into the README, between its markers."""

import json
import re
from pathlib import Path
from typing import Any

from reporting import RESULTS

README = Path(__file__).parents[1] / "README.md"


def main() -> None:
    """Replace what stands between `<!-- THEME -->` and `<!-- /THEME -->` by that theme's newest table."""
    text = README.read_text()
    for theme in re.findall(r"<!-- /(\w+) -->", text):
        newest = max(RESULTS.glob(f"{theme}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[-1])
        before, _, rest = text.partition(f"<!-- {theme} -->")
        after = rest.partition(f"<!-- /{theme} -->")[2]
        table = _table(json.loads(newest.read_text()), newest.name)
        text = f"{before}<!-- {theme} -->\n{table}\n<!-- /{theme} -->{after}"
    README.write_text(text)


def _table(document: dict[str, Any], source: str) -> str:
    names = list(document["rows"][0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in document["rows"]]
    where = f"{document['cores']} cores of {document['cpu']}, torch {document['packages']['torch']}"
    return "\n".join(["", *lines, "", f"{where}; [benchmarks/results/{source}](benchmarks/results/{source})", ""])


def _cell(value: str | float | int) -> str:
    if isinstance(value, float):
        return f"{value:.5f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) else value


if __name__ == "__main__":
    main()
