"""`python -m happyhorse ...`, or `python FOLDER ...` for the folder this file lies in."""

import sys
from pathlib import Path

if not __package__:  # run as a folder: make it the package `happyhorse`, whatever the folder is called
    import importlib.util

    root = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != root]
    spec = importlib.util.spec_from_file_location(
        "happyhorse", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["happyhorse"] = package
    spec.loader.exec_module(package)

from happyhorse.cli import main

sys.exit(main())
