"""`kpsvd-tune`, and `python -m kpsvd_tune`, which does the same."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Load the commands and run one of them."""
    # Loading takes seconds on a cold disk, and typer answers a Ctrl-C only once it is there.
    try:
        from kpsvd_tune.commands.main import main as run
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("stopped\n")
        sys.exit(130)
    except ImportError as error:
        # A package of another version may lack what the commands import.
        from kpsvd_tune.doctor.packages import install_command, package_faults

        faults = package_faults()
        if not faults:
            raise
        said = "; ".join(text for text, _ in faults.values())
        sys.stderr.write(f"error: {error}: {said}; {install_command(list(faults))}\n")
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
