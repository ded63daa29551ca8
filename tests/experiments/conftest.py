"""The experiment is a folder of the repository and no part of the package: found behind whatever is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
