#!/usr/bin/env bash
# Installs the Debian packages that building and testing hutch needs, where they are missing.
set -euo pipefail
declare -A need=(
  [qemu-system-x86_64]=qemu-system-x86 [qemu-img]=qemu-utils [mmdebstrap]=mmdebstrap [nft]=nftables [ip]=iproute2
  [mke2fs]=e2fsprogs [sfdisk]=fdisk [mformat]=mtools [mkfs.vfat]=dosfstools [cpio]=cpio [zstd]=zstd [gcc]=gcc
  [iasl]=acpica-tools [busybox]=busybox-static [modprobe]=kmod [ssh-keygen]=openssh-client
  [sqlite3]=sqlite3
)
missing=()
for tool in "${!need[@]}"; do
  command -v "$tool" >/dev/null 2>&1 || missing+=("${need[$tool]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0
echo "installing ${missing[*]}" >&2
if [ "$(id -u)" -ne 0 ]; then
  echo "these Debian packages are missing: ${missing[*]}; install them, or run this as root" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
