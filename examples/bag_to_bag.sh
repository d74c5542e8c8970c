#!/bin/sh
# Bag in, bag out, without ROS: 20 s of a moving camera over a table, answered frame by frame and scored against the
# labels that the bag carries. The results are for Foxglove. Needs the extras bag, images and train: after `make test`
#   PYTHON=.venv-dev/bin/python examples/bag_to_bag.sh [FOLDER] [SECONDS]
set -eu
out=${1:-out/bag}
seconds=${2:-20}
bundle=$(dirname "$0")/tabletop.igate
python=${PYTHON:-python3}
mkdir -p "$out"

"$python" -m igate_edge.robotics.tabletop_bag "$out/in.mcap" --seconds "$seconds"
"$python" -m igate_edge run "$bundle" --bag "$out/in.mcap" --out "$out/results.mcap"
"$python" -m igate_edge.robotics.tabletop_bag "$out/in.mcap" --score "$out/results.mcap" --bundle "$bundle"
