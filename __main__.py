"""`python -m happyhorse ...`, or `python FOLDER ...` for the folder this file lies in."""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Run the command line and return its exit code; Ctrl-C ends it quietly even during the imports."""
    try:
        from happyhorse.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


def _be_a_package() -> None:
    """Make the folder of this file the package `happyhorse`, whatever it is called."""
    root = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]
    spec = importlib.util.spec_from_file_location(
        "happyhorse", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["happyhorse"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    if not __package__:
        _be_a_package()
    sys.exit(main())
