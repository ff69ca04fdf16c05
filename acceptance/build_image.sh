#!/usr/bin/env bash
# Make an engine image out of this machine: its own root file system, in which the bundle's LMDeploy and Ray lie.
#
#   build_image.sh NAME [MOUNTED …]
#
# NAME is the image's name and tag; MOUNTED are folders that stay out of the image and are mounted into the container
# instead (default /opt and /usr/local: PyTorch and CUDA, several GB). No registry and no base image is needed. The
# image stays on this machine; homes, host keys and password hashes are left out of it all the same.
set -euo pipefail

engine=/srv/deploy-dsv3-engine
name=$1
shift
mounted=("$@")
(($#)) || mounted=(/opt /usr/local)
say() { printf '%s image: %s\n' "$(date +%T)" "$*"; }

# A Python that an installer put below a home is needed in the image.
python=$(python3 -c 'import sys; print(sys.base_prefix)')
contents_only=(/proc /sys /dev /run /tmp /var/tmp /var/cache /mnt /media /boot /data)
for home in /root /home; do
  if [[ $python/ == "$home"/* ]]; then say "$home goes in: python3 is $python"; else contents_only+=("$home"); fi
done
contents_only+=(/var/lib/docker /var/lib/containerd /var/lib/deploy-dsv3 /var/lib/deploy-dsv3-acceptance "${mounted[@]}")
exclude=("${contents_only[@]/#/--exclude=.}")
exclude=("${exclude[@]/%//*}")
exclude+=('--exclude=./etc/shadow*' '--exclude=./etc/gshadow*' '--exclude=./etc/ssh' '--exclude=./swap*')
[[ $PWD == / ]] || exclude+=("--exclude=.$PWD")

# What makes python3 find PyTorch, and PyTorch the driver, is in this shell's environment.
change=(
  --change "ENV PATH=$engine/bin:$PATH:/usr/local/nvidia/bin"
  --change "ENV PYTHONPATH=$engine"
  --change 'CMD ["bash"]'
)
for variable in LD_LIBRARY_PATH CUDA_HOME CUDA_PATH TRITON_PTXAS_PATH \
  NCCL_NVLS_ENABLE NVSHMEM_DISABLE_NVLS TORCH_SYMM_MEM_DISABLE_MULTICAST; do
  [[ -z ${!variable:-} ]] || change+=(--change "ENV $variable=${!variable}")
done

say "importing / without ${mounted[*]}"
set +e # tar says 1 when a file changed while it was read, which a log may do
tar --create --one-file-system --numeric-owner --warning=no-file-changed --warning=no-file-ignored \
  --directory=/ "${exclude[@]}" . | docker import "${change[@]}" - "$name" >/dev/null
status=("${PIPESTATUS[@]}")
set -e
((status[0] <= 1 && status[1] == 0)) || { say "tar ended with ${status[0]}, docker import with ${status[1]}" >&2; exit 1; }
say "$(docker image inspect --format '{{.Id}} {{.Size}}' "$name" | awk '{printf "%s, %.1f GB", $1, $2 / 1e9}')"
