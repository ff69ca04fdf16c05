"""Start of the bundle that runs in the engine's image on the head (see `deploy_dsv3.benchmark.head`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

try:
    from deploy_dsv3.benchmark.worker import main
except ImportError as missing:
    error = {
        "message": f"the engine's image cannot make the load: {missing}",
        "remedy": "Make it from the control machine: --from control.",
        "exit_code": 2,
    }
    Path(sys.argv[1], "progress.json").write_text(json.dumps({"state": "failed", "error": error}))
    Path(sys.argv[2]).unlink(missing_ok=True)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
