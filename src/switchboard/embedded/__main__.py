"""The keeper: ``python -m switchboard.embedded DATA_DIR``."""

import logging
import sys
from pathlib import Path

from switchboard.embedded.keeper import keep

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s keeper: %(message)s")
    sys.exit(keep(Path(sys.argv[1]).resolve()))
