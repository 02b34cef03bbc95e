"""Put the checkout that bench/ lies in first on sys.path, on import: a benchmark measures its own checkout.

Needed where the package is not installed (a bare checkout on a GPU machine), or installed from elsewhere.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path[:1]:
    sys.path.insert(0, str(ROOT))
