"""Ansible module: is a folder of safetensors weights complete?"""

from __future__ import annotations

import json
import os
import struct

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: dsv3_weights
short_description: Check a folder of safetensors weights against its index
description:
  - Reads C(model.safetensors.index.json) (or takes the single C(model.safetensors)) and compares every shard that
    it names with what is on disk. The size that a shard must have follows from the shard's own header (8 bytes
    length, JSON header, then the tensors up to the largest C(data_offsets)), as the safetensors format defines it.
    Nothing is hashed or changed.
options:
  path:
    description: Folder of the weights.
    type: path
    required: true
author: deploy-dsv3 maintainers
"""

EXAMPLES = r"""
- name: Check the weights
  dsv3_weights:
    path: /data/models/DeepSeek-V3
"""

RETURN = r"""
shards:
  description: Number of shards that the index names.
  type: int
  returned: always
bytes:
  description: Bytes of all shards on disk.
  type: int
  returned: always
missing:
  description: Shards that the index names and the folder lacks.
  type: list
  returned: always
truncated:
  description: Shards whose size differs from what their header says, each with found and expected bytes.
  type: list
  returned: always
"""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# The format bounds a header to 100 MB; a larger number means that the file is not safetensors.
_MAX_HEADER_BYTES = 100_000_000


def expected_size(path: str) -> int:
    """The size in bytes that the header of the safetensors file at `path` asks for.

    Raises ValueError when the file does not begin with a safetensors header.
    """
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError("shorter than a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER_BYTES:
            raise ValueError("does not begin with a safetensors header")
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError("ends inside its header")
    header = json.loads(raw)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)


def shards_of(path: str) -> list[str]:
    """File names of the shards in folder `path`, from its index or the single file.

    Raises ValueError when there is neither.
    """
    index = os.path.join(path, _INDEX)
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        return sorted(set(weight_map.values()))
    if os.path.isfile(os.path.join(path, _SINGLE)):
        return [_SINGLE]
    raise ValueError(f"neither {_INDEX} nor {_SINGLE} is there")


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(argument_spec={"path": {"type": "path", "required": True}}, supports_check_mode=True)
    path = module.params["path"]
    remedy = "Copy the complete model to this host (for example with rsync from a host that has it) and run again."
    report = {"changed": False, "shards": 0, "bytes": 0, "missing": [], "truncated": []}
    if not os.path.isdir(path):
        module.fail_json(msg=f"The model folder {path} does not exist on this host. {remedy}", **report)
    problems = [f"{name} is missing" for name in ("config.json",) if not os.path.isfile(os.path.join(path, name))]
    try:
        shards = shards_of(path)
    except (ValueError, KeyError, OSError) as error:
        module.fail_json(msg=f"The weights in {path} cannot be read: {_INDEX}: {error}. {remedy}", **report)
    report["shards"] = len(shards)
    for shard in shards:
        file = os.path.join(path, shard)
        if not os.path.isfile(file):
            report["missing"].append(shard)
            continue
        found = os.path.getsize(file)
        report["bytes"] += found
        try:
            expected = expected_size(file)
        except (ValueError, KeyError, TypeError, OSError) as error:
            report["truncated"].append({"shard": shard, "found": found, "error": str(error)})
            continue
        if found != expected:
            report["truncated"].append({"shard": shard, "found": found, "expected": expected})
    if report["missing"]:
        problems.append(f"{len(report['missing'])} of {len(shards)} shards are missing: {_some(report['missing'])}")
    if report["truncated"]:
        bad = [
            f"{entry['shard']} ({entry['error']})"
            if "error" in entry
            else f"{entry['shard']} (has {entry['found']} bytes, its header asks for {entry['expected']})"
            for entry in report["truncated"]
        ]
        problems.append(f"{len(bad)} shards are damaged: {_some(bad)}")
    if problems:
        module.fail_json(msg=f"The weights in {path} are not complete: {'; '.join(problems)}. {remedy}", **report)
    module.exit_json(**report)


def _some(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


if __name__ == "__main__":
    main()
