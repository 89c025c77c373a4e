#!/usr/bin/env python3
"""Write docs/api.txt, web/lesson/numbers.json, and the parts of documents between <!-- name --> and
<!-- /name -->.

python docs/make.py             write them
python docs/make.py --check     change nothing; exit code 1 if a document is out of date
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from probe.format import attributes, dimensions
from probe.reading.pixels import trained
from probe.settings import cost, experiment, noising
from probe.settings.edits import EDIT_KINDS, Donor, Edit
from probe.settings.fields import Strict
from probe.studies import measures

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "ceiling: the true mask at 16x16",
    "attention, all heads",
    "contribution",
    "centred Gaussian",
    "uniform",
)


def short_truth() -> str:
    """Return a few rows and columns of the table in docs/attention-truth.md."""
    text = (ROOT / "docs" / "attention-truth.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    kept = [cells[0], ["---"] * len(cells[0]), *(row for row in cells[2:] if row[0] in SHORT)]
    return "\n".join(f"| {' | '.join(row[:5])} |" for row in kept)


def edits_table() -> str:
    """Return every kind of edit, what it does, and the fields that it has of its own."""
    lines = ["| kind | what it changes | its fields |", "|---|---|---|"]
    for name, kind in EDIT_KINDS.items():
        own = [field for field in kind.model_fields if field not in (*Edit.model_fields, "kind")]
        what = " ".join((kind.__doc__ or "").split())
        lines.append(f"| `{name}` | {what} | {', '.join(f'`{field}`' for field in own)} |")
    return "\n".join(lines)


def edit_fields_table() -> str:
    """Return every field of edits once: those of all, then each where it first stands."""
    lines = ["| field | default | what it is |", "|---|---|---|"]
    seen = set[str]()
    kinds: list[type[Strict]] = [Edit, *EDIT_KINDS.values(), Donor]
    for kind in kinds:
        prefix = "donor." if kind is Donor else ""
        for name, field in kind.model_fields.items():
            if name == "kind" or prefix + name in seen:
                continue
            seen.add(prefix + name)
            default = "" if field.is_required() else field.get_default(call_default_factory=True)
            text = "" if field.is_required() or name == "donor" else f"`{json.dumps(default)}`"
            if text and prefix == "":
                text += _required_by(name)
            lines.append(f"| `{prefix}{name}` | {text} | {field.description} |")
    return "\n".join(lines)


def _required_by(name: str) -> str:
    """Return which kinds of edit have no default of a field that others have one of."""
    kinds = [f"`{kind}`" for kind, of in EDIT_KINDS.items() if _is_required(of, name)]
    return f"; none of {', '.join(kinds)}" if kinds else ""


def _is_required(kind: type[Strict], name: str) -> bool:
    return name in kind.model_fields and kind.model_fields[name].is_required()


def pixels_table() -> str:
    """Return what was trained on pixels and latents, and how well it draws."""
    shown = trained()
    assert shown is not None
    autoencoders = {of["f"]: of for of in shown["autoencoders"]}
    lines = [
        "| | steps | PFLOP | its autoencoder's | recognised | KID |",
        "|---|---|---|---|---|---|",
    ]
    for run in shown["runs"]:
        own = autoencoders.get(run["f"], {}).get("flops")
        extra = "" if own is None else f"{own / 1e15:.2f}"
        for point in run["points"]:
            if point["step"] >= 1000:
                share, low, high = (100 * number for number in point["both"])
                kid, least, most = point["kid"]
                lines.append(
                    f"| f = {run['f']} | {point['step']:,} | {point['flops'] / 1e15:.2f} | {extra} "
                    f"| {share:.0f}% ({low:.0f} to {high:.0f}) | {kid:.1f} ({least:.1f} to "
                    f"{most:.1f}) |"
                )
    return "\n".join(lines)


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"attention_truth": short_truth},
    "docs/experiment.md": {
        "fields": experiment.table,
        "noising": noising.table,
        "cost": cost.table,
    },
    "docs/edits.md": {"kinds": edits_table, "edit_fields": edit_fields_table},
    "docs/grids.md": {"measures": measures.table},
    "docs/pixels.md": {"trained": pixels_table},
    "docs/format.md": {
        "schema": dimensions.schema_table,
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
            raise ValueError(
                f"{document} needs the markers <!-- {name} --> and <!-- /{name} -->, once each"
            )
        part = table()
        text = re.sub(
            pattern, lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text, flags=re.S
        )
    return text


def write_api(check: bool) -> int:
    """Write docs/api.txt anew, or only say how it differs. Return 1 if it was out of date."""
    api = runpy.run_path(str(ROOT / "docs" / "api.py"))
    file = ROOT / "docs" / "api.txt"
    text, new = file.read_text(encoding="utf-8"), api["listing"]()
    if new == text:
        return 0
    print(api["difference"](text, new))
    if not check:
        file.write_text(new, encoding="utf-8")
        print("docs/api.txt was written")
    return 1


def lesson_numbers() -> str:
    """Return the numbers in the text of the page's lesson, as its file holds them."""
    made = runpy.run_path(str(ROOT / "web" / "lesson" / "numbers.py"))["numbers"]()
    return f"{json.dumps(made, indent=2)}\n"


def write_numbers(check: bool) -> int:
    """Write web/lesson/numbers.json anew. Return 1 if it was out of date."""
    file = ROOT / "web" / "lesson" / "numbers.json"
    new = lesson_numbers()
    if file.is_file() and file.read_text(encoding="utf-8") == new:
        return 0
    print(f"web/lesson/numbers.json {'is out of date' if check else 'was written'}")
    if not check:
        file.write_text(new, encoding="utf-8")
    return 1


def main(arguments: list[str]) -> int:
    old = write_api(bool(arguments)) + write_numbers(bool(arguments))
    for document in PARTS:
        file = ROOT / document
        text = file.read_text(encoding="utf-8")
        if (new := made(document, text)) != text:
            old += 1
            print(f"{document} is out of date" if arguments else f"{document} was written")
            if not arguments:
                file.write_text(new, encoding="utf-8")
    return 1 if old and arguments else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
