// All deploy kernels of igate_edge. `source.text()` writes these files into one text for NVRTC, nvcc and g++.
#include "igemm.cuh"
#include "image.cuh"
#include "merge.cuh"
