#!/usr/bin/env python3
"""Write the generated parts of the documents: what lies between <!-- name --> and <!-- /name -->.

python docs/make.py             write them
python docs/make.py --check     change nothing; exit code 1 if a document is out of date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from probe import attributes, dimensions, schema

FOLDER = Path(__file__).resolve().parent
PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "format.md": {
        "schema": schema.table,
        "dimensions": dimensions.dimensions_table,
        "relations": dimensions.relations_table,
        "reserved": dimensions.reserved_table,
        "families": dimensions.families_table,
        "guidance": dimensions.guidance_table,
        "attributes": attributes.table,
    },
}


def made(document: str, text: str) -> str:
    """Return a document's text with its parts made anew. Raise ValueError if it lacks a marker."""
    for name, table in PARTS[document].items():
        pattern = rf"(<!-- {name} -->\n).*?\n?(<!-- /{name} -->)"
        if len(re.findall(pattern, text, re.S)) != 1:
            raise ValueError(f"{document} needs the markers <!-- {name} --> and <!-- /{name} -->, once each")
        part = table()
        text = re.sub(pattern, lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text, flags=re.S)
    return text


def main(arguments: list[str]) -> int:
    old = 0
    for document in PARTS:
        file = FOLDER / document
        text = file.read_text(encoding="utf-8")
        if (new := made(document, text)) != text:
            old += 1
            print(f"docs/{document} is out of date" if arguments else f"docs/{document} was written")
            if not arguments:
                file.write_text(new, encoding="utf-8")
    return 1 if old and arguments else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
