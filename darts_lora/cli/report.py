"""darts-lora report: a search, and finetunes of what it found, as one HTML file.
Not here: how it is drawn (darts_lora/views/report.py)."""

import os
from dataclasses import dataclass, field

from darts_lora.base.options import run
from darts_lora.run.runs import Search, load_finetune
from darts_lora.views.report import write_report


@dataclass
class ReportRun:
    """What is reported."""

    search_dir: str = "runs/search"
    """Folder of a search, finished or not."""
    finetune_dir: list[str] = field(default_factory=list)
    """Folders of evaluated finetunes (uniform ranks too), set side by side."""
    output: str | None = None
    """File of the report; default: report.html in search_dir. Pictures go beside it."""


def main(options: ReportRun) -> None:
    """Write one self-contained HTML file, and its pictures as PNGs, about a search."""
    search = Search.load(options.search_dir)
    finetunes = [load_finetune(folder, search) for folder in options.finetune_dir]
    output = options.output or os.path.join(options.search_dir, "report.html")
    write_report(search, finetunes, output)
    print(f"Report: {output}")


def start() -> None:
    """Parse the command line and run."""
    run(main, ReportRun)
