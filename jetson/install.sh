#!/usr/bin/env bash
# Install igate_edge on a Jetson. All checks come first and take a second; nothing is changed until they pass.
# Running it again is fine: what is there already stays. Not run on a device yet.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: jetson/install.sh [options]
  --dry-run         show what would be done, change nothing
  --venv DIR        the virtual environment (default: ~/igate-edge, with --service /opt/igate-edge)
  --pycuda          also build pycuda, the second way to GPU memory (three minutes; needs CUDA headers)
  --service BUNDLE  also install the systemd unit that serves this bundle (needs root)
  --root DIR        look for the board's files below DIR: to try the checks on another machine; implies --dry-run
TEXT
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root="" venv="" dry=0 pycuda=0 bundle=""
problems=()

main() {
  options "$@"
  board
  tensorrt
  memory
  [ $pycuda = 0 ] || headers
  [ -z "$bundle" ] || service_checks
  [ -n "$root" ] || system_checks
  report
  carry_out
}

options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry=1 ;;
      --pycuda) pycuda=1 ;;
      --venv | --service | --root)
        [ $# -gt 1 ] && [ -n "$2" ] || wrong "$1 needs a value"
        case $1 in
          --venv) venv=$2 ;;
          --service) bundle=$2 ;;
          --root) root=${2%/} dry=1 ;;
        esac
        shift ;;
      -h | --help) usage; exit 0 ;;
      *) wrong "unknown option $1" ;;
    esac
    shift
  done
  # The unit's user sees no home folder.
  if [ -z "$venv" ] && [ -n "$bundle" ]; then venv=/opt/igate-edge; fi
  venv=$(realpath -m -- "${venv:-$HOME/igate-edge}")
}

wrong() {
  printf 'error: %s\n' "$1" >&2
  usage >&2
  exit 2
}

# What, evidence, fix: in that order, as everywhere in igate_edge.
problem() { problems+=("$1: $2. Fix: $3."); }

# Which L4T this is, and with it which TensorRT, cuda-bindings and Python belong here.
board() {
  local release major minor model
  model=$(tr -d '\0' 2>/dev/null <"$root/proc/device-tree/model" || true)
  release=$(sed -n 's/^# R\([0-9]*\) (release), REVISION: \([0-9.]*\).*/\1.\2/p' "$root/etc/nv_tegra_release" 2>/dev/null || true)
  major=${release%%.*} minor=${release#*.} minor=${minor%%.*}
  case $major in
    36) if [ "${minor:-0}" -lt 4 ]; then
          problem "this JetPack is too old" "L4T R$release is JetPack 6.0, with TensorRT 8.6" \
            "upgrade to JetPack 6.1 or newer (L4T R36.4)"
        fi
        jetpack=6 bindings='cuda-bindings>=12.6,<13' ;;
    38 | 39) jetpack=7 bindings='cuda-bindings>=13,<14' ;;
    '') jetpack='' bindings='' ;;
    *) jetpack='' bindings=''
       problem "this JetPack is not supported" "L4T R$release" "flash JetPack 6 (L4T R36) or 7 (R38, R39)" ;;
  esac
  if [ -n "$major" ]; then
    echo "board:    ${model:-unknown}, L4T R$release${jetpack:+, JetPack $jetpack}"
  else
    echo "board:    not a Jetson (no etc/nv_tegra_release): ONNX Runtime on the CPU only"
  fi
}

# TensorRT comes with JetPack, and its Python module serves one Python only.
tensorrt() {
  python=python3
  [ -n "$jetpack" ] || return 0
  local module
  module=$(find "$root/usr/lib" -path '*/python3*/dist-packages/tensorrt' -type d 2>/dev/null | sort | head -n 1 || true)
  if [ -z "$module" ]; then
    problem "TensorRT's Python module is missing" "nothing at usr/lib/python3*/dist-packages/tensorrt" \
      "sudo apt install tensorrt python3-libnvinfer"
    return 0
  fi
  python=$(basename "$(dirname "$(dirname "$module")")")
  echo "tensorrt: for $python"
}

# A build takes more memory than the engine it makes; zram is no help, since it is the same memory.
memory() {
  local total swap
  total=$(awk '/^MemTotal:/ { print int($2 / 1024) }' "$root/proc/meminfo" 2>/dev/null || true)
  swap=$(awk 'NR > 1 && $1 !~ /zram/ { sum += $3 } END { print int(sum / 1024) }' "$root/proc/swaps" 2>/dev/null || true)
  echo "memory:   ${total:-?} MB, swap on disk ${swap:-?} MB"
  if [ -n "$jetpack" ] && [ "${total:-0}" -gt 0 ] && [ $((total + ${swap:-0})) -lt 12000 ]; then
    echo "note:     an engine build may run out of memory here. To add 8 GB of swap:"
    echo "          sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile"
  fi
}

headers() {
  local name
  for name in cuda.h curand.h; do
    [ -e "$root/usr/local/cuda/include/$name" ] ||
      problem "pycuda cannot be built" "no usr/local/cuda/include/$name" "sudo apt install nvidia-cuda-dev"
  done
  [ -x "$root/usr/local/cuda/bin/nvcc" ] ||
    problem "pycuda cannot be built" "no usr/local/cuda/bin/nvcc" "sudo apt install nvidia-cuda-dev"
}

service_checks() {
  [ -f "$bundle" ] || problem "the bundle is missing" "$bundle" "pass a file written by igate export"
  # What ProtectHome= and PrivateTmp= of the unit hide, by systemd's own names of these folders.
  case $venv in
    "$HOME"/* | /home/* | /root/* | /tmp/* | /var/tmp/*)
      problem "the service cannot see this environment" "$venv: the unit's own user has no home folder and a /tmp of its own" \
        "leave out --venv, or pass one below /opt" ;;
    *[[:space:]%]*) problem "a unit cannot name this environment" "$venv: a space or a percent sign" "pass another --venv" ;;
  esac
  [ -n "$root" ] || [ -d /run/systemd/system ] || problem "no systemd here" "/run/systemd/system" "leave out --service"
  [ $dry = 1 ] || [ "$(id -u)" = 0 ] || problem "a unit is installed by root" "you are $(id -un)" "run with sudo"
}

system_checks() {
  local version free folder=$venv
  if ! version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    problem "$python does not run" "not on PATH" "sudo apt install ${python}"
    return 0
  fi
  case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) problem "this Python is not supported" "$python is $version" "use Python 3.10 to 3.13" ;;
  esac
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    problem "virtual environments cannot be made" "$python has no ensurepip" "sudo apt install python3-venv"
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  free=$(df -Pm "$folder" | awk 'NR == 2 { print $4 }')
  [ "$free" -ge 1000 ] || problem "the disk is nearly full" "$free MB free at $folder" "free 1 GB, or pass --venv DIR"
  [ -w "$folder" ] || problem "the folder cannot be written" "$folder" "pass --venv DIR"
}

report() {
  [ ${#problems[@]} -gt 0 ] || return 0
  printf 'error: %s\n' "${problems[@]}" >&2
  echo "nothing was changed" >&2
  exit 3
}

run() {
  local text
  text=$(printf '%q ' "$@")
  printf '+ %s\n' "${text% }"
  [ $dry = 1 ] || "$@"
}

# Not named after a program: a function would be found before it.
carry_out() {
  local site=()
  [ -z "$jetpack" ] || site=(--system-site-packages)  # apt's TensorRT is seen only so
  [ -x "$venv/bin/python" ] || run "$python" -m venv "${site[@]}" "$venv"
  run "$venv/bin/python" -m pip install --quiet --upgrade "$(dirname "$here")[video,bag]"
  [ -z "$bindings" ] || run "$venv/bin/python" -m pip install --quiet "$bindings"
  if [ $pycuda = 1 ]; then
    # Its build looks for nvcc on PATH and for headers and libraries where only JetPack puts them.
    export PATH=/usr/local/cuda/bin:$PATH
    run env CUDA_ROOT=/usr/local/cuda CPATH=/usr/local/cuda/include \
      LIBRARY_PATH=/usr/local/cuda/lib64:/usr/local/cuda/lib64/stubs \
      "$venv/bin/python" -m pip install --quiet 'pycuda>=2024.1'
  fi
  [ -z "$bundle" ] || unit
  run "$venv/bin/igate" doctor
  [ $dry = 0 ] || echo "dry run: nothing was changed"
}

unit() {
  local where=/etc/systemd/system/igate-edge.service
  run install -D -m 644 "$bundle" /var/lib/igate-edge/scene.igate
  printf '+ write %s\n' "$where"
  if [ $dry = 0 ]; then
    local text
    text=$(<"$here/igate-edge.service")
    printf '%s\n' "${text//\/opt\/igate-edge/"$venv"}" >"$where.new"
    mv -- "$where.new" "$where"
  fi
  run systemctl daemon-reload
  run systemctl enable igate-edge.service
  # Its first start builds the engine, for minutes: `systemctl status igate-edge` shows when it is ready.
  run systemctl restart --no-block igate-edge.service
}

main "$@"
