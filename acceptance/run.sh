#!/usr/bin/env bash
# Prove a GPU server: from nothing to a served, verified and measured small model of DeepSeek-V3's architecture on
# real LMDeploy, without internet. Run as root on the server, from a checkout of deploy-dsv3:
#
#   acceptance/run.sh [--bundle DIR] [--output DIR] [--deadline SECONDS] [--only PHASE,PHASE,…]
#
# What was done is remembered in /var/lib/deploy-dsv3-acceptance: a run that was stopped, or whose bundle was not
# complete, goes on where it ended. Exit 0: everything passed; 1: a phase failed; 75: a part of the bundle is missing.
# OUTPUT gets run.log, summary.md, summary.json and details.tar.gz, whatever the result.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(dirname "$here")
state=/var/lib/deploy-dsv3-acceptance
engine=/srv/deploy-dsv3-engine
inventory=$repository/inventory/gpu-acceptance.ini
image=deploy-dsv3/engine:acceptance
model=/data/models/dsv3-small
container=lmdeploy
by_hand=lmdeploy-by-hand
by_hand_port=23533
another_by_hand_port=24033
# In this order; those before `deploy` are done once.
prepare=(host docker gpus model engine control image settings)
prove=(deploy again answer restart by_hand record recreate benchmark status throughput)
# The longest that each may take [s]; one that would be cut off by the deadline is left out, and said so.
declare -A longest=([deploy]=300 [again]=60 [answer]=15 [restart]=140 [by_hand]=110 [record]=30 [recreate]=140
  [benchmark]=60 [status]=15 [throughput]=150)

bundle=$repository/.bundle
output=${OUT:-$repository/acceptance-results}
deadline=530
only=
single=

say() { printf '%s %s: %s\n' "$(date +%T)" "${single:-run}" "$*"; }
die() { say "$*" >&2; exit 1; }

while (($#)); do
  case $1 in
    --bundle) bundle=$(realpath -m "$2") ;;
    --output) output=$(realpath -m "$2") ;;
    --deadline) deadline=$2 ;;
    --only) only=$2 ;;
    --single) single=$2 ;; # internal: one phase in a shell of its own, so that its first error ends it
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
  esac
  shift 2
done
# Outside OUTPUT, which then holds few files, whatever carries it back.
details=$state/details
export PYTHONUNBUFFERED=1 ANSIBLE_FORCE_COLOR=0
# What is imported here is imported again in the container, four times a start: worth compiling once.
unset PYTHONDONTWRITEBYTECODE

# deploy-dsv3 of this checkout and Ansible from the bundle, on the Python that holds PyTorch.
control() { (become_control "$@"); }
# In place of this shell, so that a signal reaches it.
become_control() {
  exec env PATH="$state/control/bin:$PATH" PYTHONPATH="$repository/python:$state/control:$engine" \
    XDG_STATE_HOME="$details/state" "$@"
}
deploy() { control deploy-dsv3 --inventory "$inventory" --extra-vars "@$state/settings.json" --yes "$@"; }
verb() {
  local name=$1
  shift
  control deploy-dsv3 "$name" --inventory "$inventory" --extra-vars "@$state/settings.json" "$@"
}
endpoint() { python3 -c 'import json; print(json.load(open("'"$state"'/settings.json"))["node_network_address"])'; }

phase_host() {
  [[ $(id -u) == 0 ]] || die "run as root: Docker, /etc/cdi and /var/lib are written"
  PATH=$PATH:/usr/local/nvidia/bin
  command -v nvidia-smi >/dev/null || die "no nvidia-smi: install the driver first, or use deploy-dsv3's own roles"
  {
    uname -a
    head -4 /etc/os-release
    printf 'PID 1: %s\ncgroups: %s\n' "$(cat /proc/1/comm)" "$(stat -fc %T /sys/fs/cgroup || true)"
    nproc
    head -3 /proc/meminfo
    df -h / /opt /usr/local /var /tmp /dev/shm 2>/dev/null || true
    ls -l /dev/nvidia* /dev/infiniband 2>&1 || true
    nvidia-smi
    command -v python3 gcc ip iptables sudo xz curl docker dockerd systemctl || true
    env | cut -d= -f1 | sort | tr '\n' ' '
    echo
    mount | grep -vE '^(proc|sysfs|tmpfs|devpts|cgroup2?|mqueue) ' || true
  } 2>&1 | tee "$details/host.txt"
  python3 - "$details/host.json" <<'PY'
import datetime, importlib.metadata, json, platform, subprocess, sys
import torch
query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
rows = [row.split(", ") for row in subprocess.check_output(query, text=True).splitlines()]
names = ("transformers", "triton", "safetensors", "tokenizers")
versions = {"python": platform.python_version(), "torch": torch.__version__, "driver": rows[0][2]}
for name in names:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = "missing"
document = {
    "date": datetime.date.today().isoformat(),
    "gpus": [{"name": name, "memory_mib": int(memory)} for name, memory, _ in rows],
    "versions": versions,
    "kernel": platform.release(),
}
json.dump(document, open(sys.argv[1], "w"), indent=1)
print(json.dumps(document))
missing = [name for name, version in versions.items() if version == "missing"]
if missing or not torch.cuda.is_available():
    sys.exit(f"this python3 lacks {', '.join(missing) or 'a working CUDA'}: put the one that holds PyTorch on the PATH")
PY
}

phase_docker() { "$here/start_docker.sh" "$bundle" "$state"; }

phase_gpus() { "$here/describe_gpus.sh"; }

phase_model() {
  mkdir -p "$(dirname "$model")"
  rm -rf "$model"
  python3 "$here/make_model.py" "$model"
}

phase_engine() {
  rm -rf "$engine"
  python3 "$here/unpack.py" "$bundle" engine "$engine"
  say "compiling bytecode of the engine's packages, and of all that they import"
  python3 -m compileall -q -j 0 "$engine" >/dev/null || true # templates among them are no Python
  # The largest at once on all cores; what is left is compiled by being imported.
  python3 -c 'import importlib.util as u, os
for name in ("torch", "transformers", "triton", "sympy", "scipy", "sklearn", "pandas", "torchvision"):
    spec = u.find_spec(name)
    if spec and spec.origin and os.access(os.path.dirname(spec.origin), os.W_OK):
        print(os.path.dirname(spec.origin))' | xargs --no-run-if-empty python3 -m compileall -q -j 0 >/dev/null || true
  PYTHONPATH=$engine timeout 120 python3 "$here/import_engine.py" "$details/imports.json" ||
    say "some of it stays without bytecode: starts take longer"
}

phase_control() {
  rm -rf "$state/control"
  python3 "$here/unpack.py" "$bundle" control "$state/control"
  control deploy-dsv3 --version
  control ansible-playbook --version | sed -n 1p
}

phase_image() {
  "$here/build_image.sh" "$image"
  say "looking at the GPU from inside"
  docker run --rm --network host --ipc host --device nvidia.com/gpu=all \
    --volume /opt:/opt:ro --volume /usr/local:/usr/local:ro "$image" \
    python3 -c 'import torch, ray, lmdeploy; print(torch.cuda.get_device_name(0), torch.__version__, ray.__version__, lmdeploy.__version__)' ||
    die "the container sees no GPU, or its python3 no PyTorch: is PyTorch outside /opt and /usr/local? (see above)"
}

# What only this machine can tell: its address, and which limits it may raise.
phase_settings() {
  address=$(python3 "$here/node_address.py")
  limits='["memlock:-1:-1", "stack:67108864:67108864", "nofile:1048576:1048576"]'
  if ! docker run --rm --network none --ulimit memlock=-1:-1 --ulimit nofile=1048576:1048576 "$image" true; then
    say "this machine may not raise limits: the container gets those of the daemon"
    limits='[]'
  fi
  printf '{"node_network_address": "%s", "engine_ulimits": %s}\n' "$address" "$limits" | tee "$state/settings.json"
}

phase_deploy() {
  start_profile first
  local result=0
  deploy || result=$?
  keep_start first
  end_profile first "$container"
  return "$result"
}

# py-spy on every process of a start, from outside: what it costs is a few per cent of another core.
start_profile() {
  mkdir -p "$details/profile-$1"
  (become_control python3 "$here/profile_start.py" record "$details/profile-$1" >"$details/profile-$1.log" 2>&1) &
  profiler=$!
}

end_profile() {
  kill "$profiler" 2>/dev/null || true
  wait "$profiler" || true
  docker logs "$2" >"$details/profile-$1/engine.log" 2>&1 || true
  python3 "$here/profile_start.py" report "$details/profile-$1" --log "$details/profile-$1/engine.log" || true
  # The traces themselves are large, and compress well.
  gzip --quiet --force "$details/profile-$1"/*-*.json || true
}

# What the launcher says of the start that just ended; it needs a moment to have its own first token.
keep_start() {
  local status=/var/lib/deploy-dsv3/state/status.json
  for _ in $(seq 20); do
    grep -q '"phase": "serving"' "$status" 2>/dev/null && break
    sleep 0.5
  done
  cp -f "$status" "$details/start-$1.json" 2>/dev/null || true
}

# The promise of every deployment: a second run changes nothing.
phase_again() {
  deploy --json >"$details/again.json" || die "the second run failed: see details/again.json"
  python3 - "$details/again.json" <<'PY'
import json, sys
hosts = json.load(open(sys.argv[1]))["hosts"]
changed = {host: stats["changed"] for host, stats in hosts.items() if stats["changed"]}
if changed or not hosts:
    sys.exit(f"the second run changed something: {changed or 'no host at all'}")
print("changed=0 on every host")
PY
}

phase_answer() {
  python3 "$here/ask.py" "http://$(endpoint):23333" dsv3-small 60 | tee "$details/answer-first.json"
  python3 "$here/ask.py" "http://$(endpoint):23333" dsv3-small 60 >"$details/answer-second.json"
  same_answer first second
}

phase_benchmark() {
  verb benchmark --profile smoke --tokenizer "$model" --any-batch-size --output "$details/benchmark"
}

# The caches of the first start are on the host.
phase_restart() {
  docker restart --time 60 "$container"
  python3 "$here/ask.py" "http://$(endpoint):23333" dsv3-small 300 | tee "$details/answer-restart.json"
  keep_start restart
  du -sh /var/cache/deploy-dsv3/*/* | tee "$details/caches.txt" || true
  same_answer first restart
}

# The same server without deploy-dsv3 around it, to measure and record against; its start is looked at closely.
phase_by_hand() {
  start_profile by-hand
  local result=0
  python3 "$here/by_hand.py" start "$container" "$by_hand" "$by_hand_port" sk-sample
  python3 "$here/ask.py" "http://$(endpoint):$by_hand_port" dsv3-small 105 sk-sample | tee "$details/answer-by-hand.json" ||
    result=$?
  end_profile by-hand "$by_hand"
  ((result == 0)) || docker logs --tail 60 "$by_hand"
  return "$result"
}

# The answers that the lab's stand-in is held to; they replace those in tests/contract/recorded.
phase_record() {
  local version source
  version=$(control python3 -c 'from importlib.metadata import version; print(version("lmdeploy"))')
  source=$(control python3 "$here/summarise.py" --source "$details")
  python3 "$repository/tests/contract/record.py" --url "http://$(endpoint):23333" \
    --keyed-url "http://$(endpoint):$by_hand_port" --model dsv3-small --output "$output" \
    --lmdeploy "$version" --source "$source"
}

# One deployed server and two by hand, whose difference is what no difference looks like: without API keys, of one age,
# with the same requests behind them, and all started anew while there is time, for every start makes its own server.
phase_throughput() {
  local address start=0 from last=0
  address=$(endpoint)
  while ((SECONDS + last + last / 10 < deadline)); do
    from=$SECONDS
    start_three "$start"
    control python3 "$here/throughput.py" "$details" "deployed=http://$address:23333" \
      "by hand 1=http://$address:$by_hand_port" "by hand 2=http://$address:$another_by_hand_port" \
      --rounds 3 --until $((deadline - SECONDS - 10))
    last=$((SECONDS - from)) start=$((start + 1))
  done
}

# All at once, in an order that changes with START.
start_three() {
  local turn port
  docker stop --time 60 "$container" >/dev/null
  python3 "$here/by_hand.py" stop "$by_hand" >/dev/null 2>&1 || true
  python3 "$here/by_hand.py" stop "$by_hand-2" >/dev/null 2>&1 || true
  for turn in 0 1 2; do
    case $(((turn + $1) % 3)) in
      0) docker start "$container" ;;
      1) python3 "$here/by_hand.py" start "$container" "$by_hand" "$by_hand_port" ;;
      2) python3 "$here/by_hand.py" start "$container" "$by_hand-2" "$another_by_hand_port" ;;
    esac >/dev/null
  done
  for port in 23333 "$by_hand_port" "$another_by_hand_port"; do
    python3 "$here/ask.py" "http://$(endpoint):$port" dsv3-small 120
  done
}

# A new container on the same host finds the caches of the old one.
phase_recreate() {
  python3 "$here/by_hand.py" stop "$by_hand" || true
  docker logs --timestamps "$container" >"$details/engine-first.log" 2>&1
  docker rm --force "$container" >/dev/null
  deploy
  keep_start recreate
  python3 "$here/ask.py" "http://$(endpoint):23333" dsv3-small 60 | tee "$details/answer-recreate.json"
  same_answer first recreate
}

phase_status() { verb status --json | tee "$details/deploy-status.json"; }

same_answer() {
  python3 - "$details/answer-$1.json" "$details/answer-$2.json" <<'PY'
import json, sys
first, second = (json.load(open(name))["text"] for name in sys.argv[1:])
if first != second:
    sys.exit(f"temperature 0 gave two answers: {first!r} and {second!r}")
print("the same tokens again")
PY
}

collect() {
  local name
  for name in "$by_hand" "$by_hand-2"; do
    docker logs --timestamps "$name" >"$details/engine-${name#lmdeploy-}.log" 2>&1 || true
    python3 "$here/by_hand.py" stop "$name" >/dev/null 2>&1 || true
  done
  docker logs --timestamps "$container" >"$details/engine.log" 2>&1 || true
  docker inspect "$container" >"$details/container.json" 2>/dev/null || true
  docker exec "$container" ray status >"$details/ray-status.txt" 2>&1 || true
  cp -f /var/lib/deploy-dsv3/state/status.json /etc/deploy-dsv3/release.json /etc/deploy-dsv3/engine/serve.json \
    /etc/deploy-dsv3/engine/node.json /etc/cdi/nvidia.yaml "$state/dockerd.log" "$state/settings.json" "$details/" \
    2>/dev/null || true
  nvidia-smi -q >"$details/nvidia-smi.txt" 2>&1 || true
  control python3 "$here/summarise.py" "$details" || say "no summary (is the control part of the bundle there?)"
  cp -f "$details"/summary.* "$details"/throughput.* "$output/" 2>/dev/null || true
  keep_details
}

keep_details() { tar --create --gzip --file "$output/details.tar.gz" --directory "$state" details; }

run_phase() {
  local name=$1 began result=0
  began=$(date +%s.%N)
  printf '%s ──── %s (%d s so far)\n' "$(date +%T)" "$name" "$SECONDS"
  bash "$here/run.sh" --single "$name" --bundle "$bundle" --output "$output" \
    --deadline $((deadline - SECONDS)) || result=$?
  local seconds
  seconds=$(awk -v a="$began" -v b="$(date +%s.%N)" 'BEGIN {printf "%.1f", b - a}')
  printf '%s\t%s\t%s\n' "$name" "$seconds" "$([[ $result == 0 ]] && echo passed || echo "failed ($result)")" \
    >>"$details/phases.tsv"
  keep_details # a run may be cut off
  return "$result"
}

# Whether the archive of a phase came anew since it was unpacked.
newer() { [[ $1 == control && $bundle/control.tar.xz.00 -nt $state/done.control ]]; }

# Whether an archive of the bundle is complete here.
have() {
  python3 - "$bundle" "$1" <<'PY'
import json, pathlib, sys
bundle, name = pathlib.Path(sys.argv[1]), sys.argv[2]
if not (bundle / "bundle.json").exists():
    sys.exit(f"missing: {bundle / 'bundle.json'}")
parts = json.loads((bundle / "bundle.json").read_text())[name]["parts"]
missing = [str(bundle / part["name"]) for part in parts if not (bundle / part["name"]).exists()]
if missing:
    sys.exit(f"missing: {', '.join(missing)}")
PY
}

main() {
  mkdir -p "$details"
  : >"$details/phases.tsv"
  local phase code result=0
  for phase in "${prepare[@]}"; do
    [[ -z $only || ,$only, == *,$phase,* ]] || continue
    if [[ -e $state/done.$phase && $phase != host ]] && ! newer "$phase"; then
      [[ $phase != docker ]] || "$here/start_docker.sh" "$bundle" "$state" # a daemon may have ended since
      continue
    fi
    if [[ $phase == engine || $phase == control ]] && ! have "$phase"; then
      say "the rest needs another part of the bundle: carry it here and run again"
      return 75
    fi
    run_phase "$phase" || { result=1; break; }
    touch "$state/done.$phase"
  done
  if ((result == 0)); then
    for phase in "${prove[@]}"; do
      [[ -z $only || ,$only, == *,$phase,* ]] || continue
      if ((SECONDS + longest[$phase] > deadline)) && [[ $phase != deploy ]]; then
        say "left out for lack of time: $phase"
        printf '%s\t0\tleft out\n' "$phase" >>"$details/phases.tsv"
        continue
      fi
      run_phase "$phase" || {
        code=$? result=1
        # With 5 everything runs and verification alone complains: the other proofs are worth having.
        [[ $phase != deploy || $code == 5 ]] || break
      }
    done
  fi
  collect
  say "$([[ $result == 0 ]] && echo passed || echo FAILED) after $SECONDS s: $output"
  return "$result"
}

if [[ -n $single ]]; then
  "phase_$single"
else
  mkdir -p "$output"
  main 2>&1 | tee "$output/run.log"
  exit "${PIPESTATUS[0]}"
fi
