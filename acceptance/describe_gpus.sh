#!/usr/bin/env bash
# Tell Docker of this machine's GPUs: a CDI specification, by nvidia-ctk where it is installed, else by hand.
#
#   describe_gpus.sh [FILE]      default /etc/cdi/nvidia.yaml; one that exists is left as it is
#
# The hand-written one names the device files and mounts the driver's libraries and tools at their own paths.
set -euo pipefail

file=${1:-/etc/cdi/nvidia.yaml}
say() { printf '%s gpus: %s\n' "$(date +%T)" "$*"; }

PATH=$PATH:/usr/local/nvidia/bin
if [[ -e $file ]]; then
  say "$file exists"
  exit 0
fi
shopt -s nullglob
gpus=(/dev/nvidia[0-9]*)
((${#gpus[@]})) || { say "no /dev/nvidia0: is the driver loaded?" >&2; exit 1; }
install -d "$(dirname "$file")"
if command -v nvidia-ctk >/dev/null; then
  nvidia-ctk --quiet cdi generate --format=yaml >"$file.new"
else
  common=(/dev/nvidiactl /dev/nvidia-uvm /dev/nvidia-uvm-tools /dev/nvidia-modeset)
  nodes() { for node in "$@"; do [[ -e $node ]] && printf '        - {path: %s}\n' "$node"; done; true; }
  device() { printf '  - name: "%s"\n    containerEdits:\n      deviceNodes:\n' "$1"; shift; nodes "$@"; }
  # Where a driver lives that was handed into a virtual machine, else the libraries among the system's own.
  mounts=(/usr/local/nvidia)
  if [[ ! -d /usr/local/nvidia ]]; then
    mapfile -t mounts < <(ldconfig -p | awk '/lib(cuda|nvidia-ml|nvidia-ptxjitcompiler|nvidia-nvvm)\.so/ {print $NF}' |
      sort -u)
    mounts+=("$(command -v nvidia-smi)")
  fi
  {
    printf 'cdiVersion: "0.5.0"\nkind: nvidia.com/gpu\ndevices:\n'
    device all "${gpus[@]}"
    for gpu in "${gpus[@]}"; do device "${gpu#/dev/nvidia}" "$gpu"; done
    printf 'containerEdits:\n  deviceNodes:\n'
    nodes "${common[@]}" | sed 's/^    //'
    printf '  mounts:\n'
    for mount in "${mounts[@]}"; do
      printf '    - {hostPath: %s, containerPath: %s, options: [ro, nosuid, nodev, rbind]}\n' "$mount" "$mount"
    done
  } >"$file.new"
fi
mv "$file.new" "$file"
say "$file names ${#gpus[@]} GPU(s)"
