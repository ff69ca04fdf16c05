#!/usr/bin/env bash
# Start a Docker daemon on a machine that has none: programs from the bundle, no systemd, no package manager.
#
#   start_docker.sh BUNDLE STATE
#
# Does nothing where Docker answers already. The daemon outlives this shell; its log is STATE/dockerd.log, and
# STATE/docker-files lists what was laid over /.
set -euo pipefail

bundle=$1 state=$2
say() { printf '%s docker: %s\n' "$(date +%T)" "$*"; }
die() { say "$*" >&2; exit 1; }

if docker version >/dev/null 2>&1; then
  say "$(docker version --format 'server {{.Server.Version}}') answers already"
  exit 0
fi

mkdir -p "$state"
if ! command -v dockerd >/dev/null; then
  compgen -G "$bundle/docker.tar.xz.*" >/dev/null ||
    die "no dockerd on the PATH and no $bundle/docker.tar.xz.*: carry that part of the bundle, then run again"
  say "unpacking $(du -ch "$bundle"/docker.tar.xz.* | tail -1 | cut -f1)"
  rm -rf "$state/docker-tree"
  "$(dirname "$0")/unpack.py" "$bundle" docker "$state/docker-tree"
  # Never over a file of the system: its own libraries serve where it has them.
  (cd "$state/docker-tree" && find . \( -type f -o -type l \) -printf '%P\n') | while read -r file; do
    [[ -e /$file ]] && continue
    install -d "/$(dirname "$file")"
    cp -a "$state/docker-tree/$file" "/$file"
    echo "/$file"
  done >"$state/docker-files"
  rm -rf "$state/docker-tree"
  ldconfig
fi
for program in dockerd docker containerd containerd-shim-runc-v2 runc docker-init; do
  "$program" --version >/dev/null 2>"$state/$program.error" || "$program" -v >/dev/null 2>&1 ||
    die "$program does not run here (glibc 2.38 or newer is needed): $(head -1 "$state/$program.error")"
done

# The engine uses the host's network, so no bridge, no NAT and no firewall rule is wanted.
if [[ ! -e /etc/docker/daemon.json ]]; then
  install -d /etc/docker
  cat >/etc/docker/daemon.json <<'JSON'
{
  "bridge": "none",
  "iptables": false,
  "ip6tables": false,
  "ip-forward": false,
  "userland-proxy": false,
  "features": {"cdi": true},
  "cdi-spec-dirs": ["/etc/cdi", "/var/run/cdi"]
}
JSON
  echo /etc/docker/daemon.json >>"$state/docker-files"
fi

mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup

say "starting dockerd"
setsid nohup dockerd >"$state/dockerd.log" 2>&1 </dev/null &
daemon=$!
for _ in $(seq 60); do
  docker version >/dev/null 2>&1 && break
  kill -0 "$daemon" 2>/dev/null || die "dockerd ended: $(tail -3 "$state/dockerd.log")"
  sleep 0.5
done
docker version >/dev/null 2>&1 || die "dockerd does not answer after 30 s: $(tail -3 "$state/dockerd.log")"
say "$(docker info --format '{{.ServerVersion}}, storage {{.Driver}}, cgroup v{{.CgroupVersion}} by {{.CgroupDriver}}')"
