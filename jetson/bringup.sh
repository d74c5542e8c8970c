#!/usr/bin/env bash
# Everything on a board that turns a "predicted" into a "measured", in one archive. Changes no clock and no power mode.
# usage: jetson/bringup.sh [BUNDLE] [OUT.tar.gz]      (with igate on PATH; ten minutes; not run on a device yet)
set -euo pipefail

bundle=${1:-examples/tabletop.igate}
out=${2:-igate-bringup-$(date +%Y%m%d-%H%M%S).tar.gz}
[ $# -le 2 ] || { echo "error: too many arguments. Fix: jetson/bringup.sh [BUNDLE] [OUT.tar.gz]" >&2; exit 2; }
command -v igate >/dev/null || { echo "error: igate is not on PATH. Fix: . ~/igate-edge/bin/activate" >&2; exit 3; }
[ -f "$bundle" ] || { echo "error: no such bundle: $bundle. Fix: pass one written by igate export" >&2; exit 2; }
# Now, not after ten minutes of measuring.
if [ -e "$out" ]; then echo "error: $out exists. Fix: pass another name as second argument" >&2; exit 2; fi
if [ ! -d "$(dirname -- "$out")" ] || [ ! -w "$(dirname -- "$out")" ]; then
  echo "error: the archive cannot be written: $out. Fix: pass a path in a folder of yours as second argument" >&2
  exit 3
fi
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
  [ $code = 0 ] && return
  failed=$((failed + 1))
  # The reason: the last line that the step said on stderr, or its answer's cause.
  local why
  why=$(sed -n 's/^ *"cause": "\(.*\)",*$/\1/p' "$work/$name" | head -n 1)
  [ -n "$why" ] || why=$(grep -v '^$' "$work/$name.err" | tail -n 1 || true)
  printf '%-22s FAILED (%s): %s\n' '' "$code" "$why"
}

step doctor.json        igate doctor --json --strict
step status.json        igate jetson status --json
step inspect.json       igate inspect "$bundle" --json
step build.json         igate build "$bundle" --backend tensorrt --json
step build-cpu.json     igate build "$bundle" --json
step verify.json        igate verify "$bundle" --backend tensorrt --json
step profile.json       igate profile --backend tensorrt --out "$work/latency-table.json" --json
step bench-cpu.json     igate bench "$bundle" --json
step record.json        igate jetson record "$bundle" --backend tensorrt --json
step record-fast.json   igate jetson record "$bundle" --backend tensorrt --rate 0 --json
step status-after.json  igate jetson status --json
step onnx.json          igate build "$bundle" --onnx "$work/model.onnx" --json
step versions.txt       dpkg-query -W '*nvinfer*' nvidia-l4t-core
# The same graph in NVIDIA's own program: what our session is compared with.
step trtexec.txt        /usr/src/tensorrt/bin/trtexec --onnx="$work/model.onnx" --stronglyTyped --useCudaGraph \
                          --profilingVerbosity=detailed --exportLayerInfo="$work/trtexec-layers.json"

rm -f "$work/model.onnx" # made from the bundle, which you have
tar -czf "$out.part" -C "$work" .
mv -- "$out.part" "$out"
echo "written: $out ($failed of $(wc -l <"$work/steps.txt") steps failed; steps.txt in it says which)"
[ $failed = 0 ]
