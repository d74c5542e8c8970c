// What the emulated driver keeps: contexts, modules, memory; which images it takes; its errors and its attributes.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#ifndef IGATE_DRIVER
#error "define IGATE_DRIVER, as cuDriverGetVersion gives it, and IGATE_SOURCE, the digest of the kernels' source"
#endif

extern "C" {
const char* igate_emulator_error();
int igate_emulator_kernel(unsigned index, const char** name, unsigned* threads, unsigned* params);
void igate_emulator_map(const void* start, size_t bytes, int writable);
void igate_emulator_unmap(const void* start);
int igate_emulator_launch(const char* name, const unsigned* grid, const unsigned* block, unsigned shared,
                          const void* params, unsigned bytes, int order, int eager);
}

namespace {

enum Result {
    success = 0,
    invalid_value = 1,
    out_of_memory = 2,
    not_initialized = 3,
    invalid_device = 101,
    invalid_image = 200,
    invalid_context = 201,
    no_binary_for_gpu = 209,
    unsupported_ptx = 222,
    invalid_source = 300,
    invalid_handle = 400,
    not_found = 500,
    illegal_address = 700,
    launch_failed = 719,
    not_supported = 801,
};

constexpr unsigned kArch = 87;
constexpr unsigned kFreeShared = 48 * 1024, kMostShared = 163 * 1024;  // without and with opting in
constexpr size_t kMemory = size_t{8} << 30;
constexpr size_t kMostImage = 64u << 20;

struct Context {
    int users = 0;
};
struct Module {
    std::string code;
};
struct Function {
    std::string name;
    unsigned threads, params, shared = kFreeShared;
};
struct Stream {};
struct Event {
    double ms = 0;
};
using Address = unsigned long long;

std::recursive_mutex lock;
bool initialized = false;
Result sticky = success;
Context primary;
std::map<Address, size_t> memory;
std::map<const Module*, std::map<std::string, Function>> modules;
thread_local Context* current[8];
thread_local int depth = 0;  // current[depth - 1] is the current context

Result ready() {
    if (!initialized) return not_initialized;
    if (depth == 0) return invalid_context;
    return sticky;
}

// Whether [start, start + bytes) lies in one allocation.
bool allocated(Address start, size_t bytes) {
    auto found = memory.upper_bound(start);
    if (found == memory.begin()) return false;
    --found;
    return start - found->first <= found->second && found->second - (start - found->first) >= bytes;
}

template <typename T>
T read(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// The code of an image that this driver takes; its size is not given, so it is read from what it says itself.
Result accept(const char* image, std::string& code) {
    if (std::memcmp(image, "\x7f" "ELF", 4) == 0) {
        if (image[4] != 2 || read<uint16_t>(image + 18) != 190) return invalid_image;
        const unsigned abi = static_cast<unsigned char>(image[8]), flags = read<uint32_t>(image + 48);
        if (abi > 7 && IGATE_DRIVER < 13000) return no_binary_for_gpu;
        if ((abi > 7 ? flags >> 8 & 255 : flags & 255) != kArch) return no_binary_for_gpu;
        const size_t sections = read<uint64_t>(image + 40) + size_t{read<uint16_t>(image + 58)} * read<uint16_t>(image + 60);
        const size_t segments = read<uint64_t>(image + 32) + size_t{read<uint16_t>(image + 54)} * read<uint16_t>(image + 56);
        const size_t size = sections > segments ? sections : segments;
        if (size > kMostImage) return invalid_image;
        code.assign(image, size);
    } else {
        code.assign(image, strnlen(image, kMostImage));
        const size_t version = code.find(".version "), target = code.find(".target sm_");
        if (version == std::string::npos || target == std::string::npos) return invalid_image;
        unsigned major = 0, minor = 0, arch = 0;
        std::sscanf(code.c_str() + version, ".version %u.%u", &major, &minor);
        std::sscanf(code.c_str() + target, ".target sm_%u", &arch);
        if (arch > kArch) return no_binary_for_gpu;
        if (IGATE_DRIVER < 13000 && major * 10 + minor > 85) return unsupported_ptx;
    }
    const bool ours = code.find("igate source " IGATE_SOURCE) != std::string::npos;
    return ours ? success : invalid_source;
}

struct Named {
    Result code;
    const char* name;
    const char* text;
};
const Named kNames[] = {
    {success, "CUDA_SUCCESS", "no error"},
    {invalid_value, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {not_initialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {invalid_device, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {invalid_image, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {invalid_context, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {no_binary_for_gpu, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {unsupported_ptx, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain"},
    {invalid_source, "CUDA_ERROR_INVALID_SOURCE", "device kernel source is invalid"},
    {invalid_handle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {not_found, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {illegal_address, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {launch_failed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {not_supported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

int attribute(int which) {
    switch (which) {
        case 1: return 1024;                                   // threads a block
        case 2: case 3: return 1024;                           // block sides
        case 4: return 64;
        case 5: return 2147483647;                             // grid sides
        case 6: case 7: return 65535;
        case 8: return kFreeShared;
        case 10: return 32;                                    // warp
        case 12: case 82: return 65536;                        // registers
        case 13: return 918000;                                // kHz
        case 16: return 8;                                     // multiprocessors
        case 39: return 1536;                                  // threads of a multiprocessor
        case 41: return 1;                                     // unified addressing
        case 75: return 8;                                     // compute capability
        case 76: return 7;
        case 97: return kMostShared;
        default: return 0;
    }
}

}  // namespace
