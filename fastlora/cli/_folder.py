"""What the demo leaves in its output folder, and which folders it takes."""

from __future__ import annotations

from pathlib import Path

from fastlora.nn.output import check_output

REPORT = "demo.json"
ADAPTER, MERGED, PLOT = "adapter", "merged", "loss.png"


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that cannot be made, or that holds something else than an earlier demo.

    Raises:
        OSError: as `check_output`.
    """
    check_output(folder, [], mark=REPORT, overwrite=True)
