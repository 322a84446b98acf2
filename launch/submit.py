"""`python launch/submit.py recipe=i2i` is `synthos submit recipe=i2i`, from any folder and always of this clone."""

import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    # The checkout takes the place of launch/: this clone imports itself, and nothing here shadows the standard library.
    sys.path = [str(here.parent), *(entry for entry in sys.path if not entry or Path(entry).resolve() != here)]
    from launch.cli import main

    sys.exit(main(["submit", *sys.argv[1:]]))
