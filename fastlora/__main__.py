"""`python -m fastlora`: the same as the command `fastlora`."""

from __future__ import annotations

from fastlora.cli.main import main

if __name__ == "__main__":
    main()
