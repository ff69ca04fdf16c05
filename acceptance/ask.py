#!/usr/bin/env python3
"""Ask a served model for a completion until it answers; print how long that took and what it said, as JSON.

    ask.py URL MODEL [TIMEOUT_S [KEY]]

The prompt and temperature 0 are always the same: two runs of one engine must give the same tokens.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request

PROMPT = "The quick brown fox jumps over the lazy dog."


def main() -> int:
    url, model = sys.argv[1], sys.argv[2]
    timeout = float(sys.argv[3]) if len(sys.argv) > 3 else 300.0
    key = sys.argv[4] if len(sys.argv) > 4 else ""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )
    start = time.monotonic()
    problem = "no answer"
    while (waited := time.monotonic() - start) < timeout:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                document = json.load(answer)
        except (OSError, ValueError) as error:  # refused while it loads; a broken answer while it starts
            problem = str(error)
            time.sleep(0.5)
            continue
        seconds = round(time.monotonic() - start, 1)
        text = document["choices"][0]["text"]
        print(json.dumps({"waited_s": seconds, "text": text, "usage": document["usage"]}))
        return 0
    print(f"no completion from {url} after {waited:.0f} s: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
