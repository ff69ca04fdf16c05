"""Record a running api_server: the requests of an earlier recording, sent again, with the answers of today.

    python tests/contract/record.py --url http://127.0.0.1:23333 --keyed-url http://127.0.0.1:23334 \
        --source "LMDeploy 0.19.0, …" --lmdeploy 0.19.0

Both servers serve a small model with a context of 32768 tokens, such as acceptance/make_model.py's; the second runs
with `--api-keys sk-sample`. `--model` is the name that they serve it under; the recording says `dsv3`. Writes
tests/contract/recorded/lmdeploy-VERSION.json, or a file of that name into another folder. Needs nothing but Python;
`acceptance/run.sh` calls it on a GPU server.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from exchanges import RECORDED, load, read_metrics, read_routes, send


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="a server without API keys")
    parser.add_argument("--keyed-url", required=True, help="one with --api-keys sk-sample")
    parser.add_argument("--lmdeploy", required=True, metavar="VERSION")
    parser.add_argument("--source", required=True, help="what was recorded: versions, GPU, model, date")
    parser.add_argument("--model", default="dsv3", help="name that both serve the model under (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RECORDED, metavar="FOLDER")
    arguments = parser.parse_args()
    _, known = load()
    exchanges = []
    for exchange in known:
        url = arguments.keyed_url if exchange.keyed else arguments.url
        answer = send(url, exchange.request, model=arguments.model)
        keyed = {"keyed": True} if exchange.keyed else {}
        exchanges.append({"name": exchange.name, **keyed, "request": exchange.request, "response": answer})
    recording = {
        "source": arguments.source,
        "lmdeploy": arguments.lmdeploy,
        "routes": read_routes(arguments.url),
        "exchanges": exchanges,
        "metrics": read_metrics(arguments.url),
    }
    target = arguments.output / f"lmdeploy-{arguments.lmdeploy}.json"
    target.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n")
    print(
        f"{target}: {len(exchanges)} exchanges, {len(recording['routes'])} routes, {len(recording['metrics'])} metrics"
    )


if __name__ == "__main__":
    main()
