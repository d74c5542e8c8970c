#!/usr/bin/env bash
# Everything on a board that turns a "predicted" into a "measured", in one archive. Changes no clock and no power mode.
# usage: jetson/bringup.sh [BUNDLE] [OUT.tar.gz]      (with igate on PATH; ten minutes; not run on a device yet)
set -euo pipefail

bundle=${1:-examples/tabletop.igate}
out=${2:-igate-bringup-$(date +%Y%m%d-%H%M%S).tar.gz}
command -v igate >/dev/null || { echo "error: igate is not on PATH. Fix: . ~/igate-edge/bin/activate" >&2; exit 3; }
[ -f "$bundle" ] || { echo "error: no such bundle: $bundle. Fix: pass one written by igate export" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

# One step: its output in NAME.txt (or NAME.json, where the command has --json), its exit code in steps.txt.
step() {
  local name=$1 code=0
  shift
  printf '%-22s %s\n' "$name" "$*"
  "$@" >"$work/$name" 2>"$work/$name.err" || code=$?
  printf '%s\t%s\t%s\n' "$name" "$code" "$*" >>"$work/steps.txt"
  [ $code = 0 ] || failed=$((failed + 1))
}

step doctor.json        igate doctor --json --strict
step status.json        igate jetson status --json
step inspect.json       igate inspect "$bundle" --json
step build.json         igate build "$bundle" --backend tensorrt --json
step build-cpu.json     igate build "$bundle" --json
step verify.json        igate verify "$bundle" --backend tensorrt --json
step profile.json       igate profile --backend tensorrt --out "$work/latency-table.json" --json
step bench.json         igate bench "$bundle" --json
step record.json        igate jetson record "$bundle" --json
step status-after.json  igate jetson status --json
step trtexec.txt        sh -c 'ls /usr/src/tensorrt/bin/trtexec && dpkg-query -W "*nvinfer*" "nvidia-l4t-core"'

tar -czf "$out" -C "$work" .
echo "written: $out ($failed of $(wc -l <"$work/steps.txt") steps failed; steps.txt in it says which)"
[ $failed = 0 ]
